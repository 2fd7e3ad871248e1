"""`python -m lhcompile`: the command line, where its script is not on the path."""

from lhcompile.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
