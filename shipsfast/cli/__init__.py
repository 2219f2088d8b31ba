"""The command line: commands by family. May import everything."""

from .entry import app, main

__all__ = ["app", "main"]
