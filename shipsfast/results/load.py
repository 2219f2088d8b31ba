"""Any run folder as the result of what was run there."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ..errors import InputError
from ..runs.kinds import KINDS
from ..runs.manifest import read_manifest


def load(folder: str | Path):
    """Read any run folder: the ShipsResult, TopHeads, SubspaceResult, SaharaResult or EvalResult of what was run there.

    Raises InputError if it is missing, damaged, or of a search that is not finished.
    """
    kind = read_manifest(Path(folder))["identity"].get("kind")
    if kind not in KINDS:
        raise InputError(f"{folder} holds a run of kind {kind!r}, expected one of {', '.join(KINDS)}")
    module, _, name = KINDS[kind].result.rpartition(".")
    return getattr(import_module(f".{module}", __package__), name).load(folder)
