"""The published FedKSeed command line, run by fedkseed: `python main.py --help`."""

from fedkseed.published import main

if __name__ == "__main__":
    main()
