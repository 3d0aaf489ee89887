"""`python -m shmheap` is the command `shmheap`."""

import sys

from shmheap.cli import main

sys.exit(main())
