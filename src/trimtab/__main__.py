"""`python -m trimtab`: the command line, where the script `trimtab` is not on the path."""

import sys

from trimtab.cli import main

if __name__ == "__main__":
    sys.exit(main())
