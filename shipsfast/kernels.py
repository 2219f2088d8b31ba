"""Makes the Triton kernels importable as `shipsfast.kernels.<name>`.

In an installed package the files lie in the folder shipsfast/kernels, in a checkout in the top-level
folder kernels. Neither folder may have an __init__.py: transformers imports whatever package named
`kernels` it can find.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_installed, _checkout = _here / "kernels", _here.parent / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _checkout)]
