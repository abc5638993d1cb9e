"""The command `python -m tests.planted`."""

import sys

from tests.planted.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
