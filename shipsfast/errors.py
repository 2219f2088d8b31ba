"""What goes wrong because of the input, told in one line: the thing, what was expected, what to do."""


class InputError(ValueError):
    """Bad input. The command line prints its message as one line and exits with status 2."""


class UnsupportedModelError(InputError):
    """The model does something shipsfast cannot reproduce exactly. It is refused, never approximated."""
