"""What shmheap does for other packages: one file each, imported only when asked for."""
