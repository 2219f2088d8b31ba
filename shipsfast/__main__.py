"""`python -m shipsfast`: the same as the command `shipsfast`."""

from .cli import main

main()
