"""`python -m fedkseed`: the command line."""

from fedkseed.cli import main

if __name__ == "__main__":
    main()
