"""The command line: flags and TOML become validated settings for the functions below it."""

from fedkseed.cli.app import main

__all__ = ["main"]
