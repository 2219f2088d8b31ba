"""Any run folder as the result of what was run there."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..runs.manifest import read_manifest
from .sahara import SaharaResult
from .ships import ShipsResult
from .subspace import SubspaceResult


def load(folder: str | Path):
    """Read any run folder: the ShipsResult, SubspaceResult, SaharaResult or EvalResult of what was run there.

    Raises InputError if it is missing, damaged, or of a search that is not finished.
    """
    kinds = {"ships": ShipsResult, "subspace": SubspaceResult, "sahara": SaharaResult}
    kind = read_manifest(Path(folder))["identity"].get("kind")
    if kind == "evaluate":
        from .evaluation import EvalResult  # it imports this file

        return EvalResult.load(folder)
    if kind not in kinds:
        raise InputError(
            f"{folder} holds a run of kind {kind!r}, expected one of {', '.join([*kinds, 'evaluate'])}"
        )
    return kinds[kind].load(folder)
