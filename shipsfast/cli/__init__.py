"""The command line: commands by family. May import everything."""

from .app import main

__all__ = ["main"]
