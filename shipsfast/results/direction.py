"""A direction of the residual stream that tells two sets of prompts apart, one for each decoder layer, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import InputError, whole_number
from ..runs.whole_files import write_whole
from ..text import counted, visible
from .equality import Compared
from .statistics import or_none

FORMAT = "shipsfast direction 1"
SAID = ("identity", "record")  # in the file's metadata, as JSON


@dataclass(repr=False, eq=False)
class Direction(Compared):
    """Difference of means of the residual stream between two sets of prompts (arXiv 2406.11717, section 2.3).

    vectors: float64 [L, hidden], mean over prompts_a less mean over prompts_b of the stream as it leaves each decoder
        layer. Layers count all decoder layers, those without attention heads too: row l is hidden_states[l + 1] of
        transformers' output_hidden_states, but the last row, which stands before the final norm and theirs behind it.
    auroc: float64 [L], how well each layer tells prompts apart that its direction was not made of: the chance that a
        prompt of A lies further along than one of B, of two halves each in turn. NaN where a set has one prompt.
    layer: the layer chosen, whose direction is `.vector`.
    position: the token of each prompt that was read, from the end if negative.
    identity: what it was made of: weights, dtype, prompts (hashes of their tokens); record: what ran.
    """

    vectors: np.ndarray
    auroc: np.ndarray
    layer: int
    position: int = -1
    identity: dict = field(default_factory=dict)
    record: dict = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Raises InputError for what is no direction."""
        self.vectors, self.auroc = (np.asarray(x, dtype=np.float64) for x in (self.vectors, self.auroc))
        if self.vectors.ndim != 2 or not self.vectors.size or self.auroc.shape != self.vectors.shape[:1]:
            raise InputError(
                f"a direction has vectors [L, hidden] and auroc [L], got {list(self.vectors.shape)} and "
                f"{list(self.auroc.shape)}"
            )
        if not np.isfinite(self.vectors).all():
            raise InputError("a direction has numbers that are not finite")
        if ((self.auroc < 0) | (self.auroc > 1)).any():
            raise InputError("a direction has an auroc that is not from 0 to 1")
        self.layer = check_layer(self.layer, len(self.vectors))

    @property
    def vector(self) -> np.ndarray:
        """float64 [hidden], not normalised."""
        return self.vectors[self.layer]

    def cosine(self, other: Direction | np.ndarray) -> np.ndarray:
        """Cosine with another direction of as many layers, or with a vector [hidden], layer by layer: float64 [L]. NaN
        where one of the two is 0.

        Raises InputError for other shapes.
        """
        theirs = np.asarray(getattr(other, "vectors", other), dtype=np.float64)
        if theirs.shape not in (self.vectors.shape, self.vectors.shape[1:]):
            raise InputError(
                f"this direction has vectors {list(self.vectors.shape)}, the other {list(theirs.shape)}: they are of other "
                "models"
            )
        with np.errstate(invalid="ignore"):
            return (_unit(self.vectors) * _unit(theirs)).sum(-1)

    def save(self, path: str | Path) -> None:
        """A safetensors file: tensors `vectors` and `auroc`, and the rest as text in its metadata. Raises OSError."""
        about = {
            "format": FORMAT, "layer": str(self.layer), "position": str(self.position),
            "model": str((self.record.get("model") or {}).get("name", "")),
            **{name: json.dumps(getattr(self, name)) for name in SAID},
        }  # fmt: skip
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in ("vectors", "auroc")}
        write_whole(Path(path), lambda temporary: save_file(tensors, temporary, about))

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """The direction that `save` wrote. Raises InputError for any other file."""
        try:
            with safe_open(path, framework="numpy") as file:
                about, names = file.metadata() or {}, ("vectors", "auroc")
                arrays = {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118 (it is no dict)
        except (
            SafetensorError,
            OSError,
            TypeError,
            AttributeError,
        ) as error:  # the last two: a dtype that NumPy does not have
            raise InputError(f"{path} cannot be read as a direction: {error}") from error
        if about.get("format") != FORMAT:
            raise InputError(
                f"{path} holds no direction: expected a file of shipsfast direction, or of Direction.save"
            )
        try:
            said = {name: json.loads(about[name]) for name in SAID}
            sets = [said["identity"].get(name, []) for name in ("prompts_a", "prompts_b")]
            whole = all(
                isinstance(each, dict) for each in (*said.values(), said["record"].get("model") or {})
            )
            if not whole or not all(isinstance(each, list) for each in sets):
                raise ValueError("identity and record are not what was written")
            numbers = {name: int(about[name]) for name in ("layer", "position")}
            return cls(**arrays, **said, **numbers)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def as_json(self) -> dict:
        """All but the vectors, for JSON."""
        return {
            "layer": self.layer,
            "position": self.position,
            "norm": np.linalg.norm(self.vectors, axis=1).tolist(),
            "auroc": [or_none(float(x)) for x in self.auroc],
            "identity": self.identity,
            "record": self.record,
        }

    def show(self, console: Console | None = None) -> None:
        """Print a table of all layers."""
        console = console or Console(highlight=False)
        table = Table()
        for name in ("layer", "AUROC, held out", "norm", "cosine with the chosen"):
            table.add_column(Text(name), justify="right")
        norms, cosines = np.linalg.norm(self.vectors, axis=1), self.cosine(self.vector)
        for layer, row in enumerate(zip(self.auroc, norms, cosines, strict=True)):
            style = "bold" if layer == self.layer else None
            table.add_row(
                f"{layer}{' chosen' * (layer == self.layer)}", *(f"{x:.4g}" for x in row), style=style
            )
        console.print(table)
        console.print(Text(visible(repr(self))), soft_wrap=True)

    def __repr__(self) -> str:
        model = (self.record.get("model") or {}).get("name") or "a model"
        sets = [counted(len(self.identity.get(name) or []), "prompt") for name in ("prompts_a", "prompts_b")]
        return (
            f"Direction of {model}: {sets[0]} less {sets[1]}, layer {self.layer} of {len(self.vectors)}, position "
            f"{self.position}, AUROC {self.auroc[self.layer]:.4g}"
        )


def check_layer(layer: int, layers: int) -> int:
    """Raises InputError for a decoder layer that is not there."""
    layer = whole_number("layer", layer, 0)
    if layer >= layers:
        raise InputError(f"layer {layer}: the model has {counted(layers, 'decoder layer')}, counted from 0")
    return layer


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
