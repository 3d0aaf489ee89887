"""stub"""
import sys
def main() -> int:
    from shmheap.coordinator.process import is_detached, main as run
    if sys.argv[1] == "run":
        return run(sys.argv[2], foreground=not is_detached())
    return 2
