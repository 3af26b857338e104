"""`python -m rlboard` is `rlboard`."""

import sys

from rlboard.cli import main

if __name__ == "__main__":
    sys.exit(main())
