"""`python -m fedkseed.published`: the published command line, also from an installed wheel."""

from fedkseed.published import main

if __name__ == "__main__":
    main()
