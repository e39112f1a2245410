"""The published code's command line, `python main.py`, as a translation onto `fedkseed simulate`."""

from fedkseed.published.app import main

__all__ = ["main"]
