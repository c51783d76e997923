"""`python -m funcprecond`: the comparison, and what there is to compare."""

import sys

from funcprecond.compare.cli import main

if __name__ == "__main__":
    sys.exit(main())
