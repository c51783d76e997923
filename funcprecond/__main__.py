"""The command `python -m funcprecond`, which compares methods and lists methods and tasks."""

import sys

from funcprecond.compare.cli import main

if __name__ == "__main__":
    sys.exit(main())
