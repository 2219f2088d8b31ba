"""Metrics of hidden states: what switching a head off does to the residual stream as it leaves a decoder layer.

    projection(direction, layer)    change of the dot product with a vector, of length 1 unless told otherwise
    probe(weights, layer)           change of the log-odds w.h + b that a linear probe gives
    probe(a callable, layer)        change of what it returns, hidden [N, hidden] -> [N]

Such a metric has a `layer`, counted as the model counts its decoder layers, and its rows are states [N, hidden] in the place of
logits. The change of a linear value is w.(h' - h): states are taken from each other first, so that no rounding of w.h is in it.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError, from_digits, whole_number
from ..ops import divergences
from ..ops.divergences import check_rows
from ..results.direction import Direction, check_layer
from ..text import counted
from .functions import function_name, has_name, real_numbers
from .metrics import Metric

FORM = "projection:FILE[,LAYER]"  # on the command line
_LIVE_ARRAYS = 2  # float64 arrays of a chunk's size that a linear metric holds at once


class HiddenMetric(Metric):
    """The change of a number that is made of a state [hidden]."""

    layer: int
    title: str  # what it is called, beside its layer

    @property
    def name(self) -> str:
        return f"{self.title}@{self.layer}"

    @property
    def where(self) -> str:
        """For labels."""
        about = {"projection": "the direction", "probe": "the probe"}.get(self.title, self.title)
        return f"{about} after layer {self.layer}"

    def fitted(self, layers: int, hidden: int | None, dtype: torch.dtype) -> Metric:
        """The same for a model of so many decoder layers, numbers in a state (None if that is not known) and dtype.

        Raises InputError where it does not fit.
        """
        try:
            check_layer(self.layer, layers)
        except InputError as error:
            raise InputError(f"metric {self.name}: {error}") from None
        return self

    def size(self, base: torch.Tensor) -> float:
        """How large the number is that changes, roughly, for a state [hidden]: what rounding is a part of."""
        raise NotImplementedError

    @abstractmethod
    def change(self, base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor) -> torch.Tensor:
        """float64 [N] of ablated [N, hidden] against base [P, hidden] rows row_map [N]."""

    def rows(
        self, base_hidden: torch.Tensor, ablated_hidden: torch.Tensor, row_map: torch.Tensor
    ) -> torch.Tensor:
        check_rows(base_hidden, ablated_hidden, row_map)
        row_map = row_map.to(device=base_hidden.device, dtype=torch.int64)
        in_range = (row_map >= 0) & (row_map < len(base_hidden))  # checked above, unless row_map is on a GPU
        found = self.change(base_hidden.detach(), ablated_hidden.detach(), torch.where(in_range, row_map, 0))
        return found.masked_fill_(~in_range, torch.nan)


@dataclass(frozen=True, eq=False)
class _Linear(HiddenMetric):
    """vector: float64 [hidden]; source: the text that it was made of; made_of, layers: fingerprint of the weights that a
    direction is of, and how many decoder layers they have."""

    kind: str
    vector: torch.Tensor
    title: str
    layer: int
    normalize: bool = False
    source: str = ""
    made_of: str = ""
    layers: int | None = None

    @property
    def label(self) -> str:
        if self.kind == "probe":
            return f"change of log-odds of {self.where}"
        return f"change along {self.where}" + ("" if self.normalize else ", not normalised")

    @property
    def unit(self) -> str:
        return "logits" if self.kind == "probe" else ""

    def describe(self) -> dict:
        digest = hashlib.sha256(self.vector.numpy().astype("<f8").tobytes()).hexdigest()[:16]
        about = {"normalize": self.normalize} if self.kind == "projection" else {}
        return {"name": self.kind, "layer": self.layer, "vector": digest} | about

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Linear) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(tuple(self.describe().values()))

    def to_text(self) -> str:
        if not self.source:
            raise InputError(
                f"metric {self.name} is made of numbers of this process: only directions of a file can be sent elsewhere, "
                f"as {FORM}"
            )
        return f"projection:{self.source},{self.layer}"

    def fitted(self, layers: int, hidden: int | None, dtype: torch.dtype) -> Metric:
        super().fitted(layers, hidden, dtype)
        if hidden is not None and hidden != len(self.vector):
            self._refuse(hidden)
        if self.layers not in (None, layers):
            raise InputError(
                f"metric {self.name}: its direction is of a model of {counted(self.layers, 'decoder layer')}, and this one has "
                f"{layers}: make one of this model, or give the vector itself (direction.vectors[{self.layer}])"
            )
        return self

    def size(self, base: torch.Tensor) -> float:
        return float(self.vector.norm() * base.double().norm().cpu())

    def change(self, base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor) -> torch.Tensor:
        if base.shape[1] != len(self.vector):
            self._refuse(base.shape[1])
        vector, wide = self.vector.to(base.device), base.double()
        rows = max(1, divergences.SCRATCH_BYTES // (_LIVE_ARRAYS * 8 * base.shape[1]))
        parts = zip(ablated.split(rows), row_map.split(rows), strict=True)
        return torch.cat([(part.double() - wide[index]) @ vector for part, index in parts])

    def _refuse(self, hidden: int) -> None:
        raise InputError(
            f"metric {self.name} has a vector of {len(self.vector)} numbers, and the model's hidden states have {hidden}: it is "
            "of another model"
        )


@dataclass(frozen=True, eq=False)
class _Callable(HiddenMetric):
    """dtype: of the states that the function gets, float64 for a model in float64."""

    function: Callable
    title: str
    layer: int
    dtype: torch.dtype = torch.float32

    @property
    def is_named(self) -> bool:
        return has_name(self.function)

    @property
    def label(self) -> str:
        return f"change of {self.where}"

    def describe(self) -> dict:
        return {"name": "probe", "layer": self.layer, "function": function_name(self.function)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Callable) and (self.function, self.layer) == (other.function, other.layer)

    def __hash__(self) -> int:
        return hash((id(self.function), self.layer))

    def fitted(self, layers: int, hidden: int | None, dtype: torch.dtype) -> Metric:
        super().fitted(layers, hidden, dtype)
        return replace(self, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def size(self, base: torch.Tensor) -> float:
        return abs(float(self._values(base[None])[0]))

    def change(self, base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor) -> torch.Tensor:
        return self._values(ablated) - self._values(base)[row_map]

    def _values(self, states: torch.Tensor) -> torch.Tensor:
        own = states.to(self.dtype, copy=True)  # it may write to what it gets
        found = real_numbers(self.function(own), len(states), f"metric {self.name}")
        return found.to(device=states.device, dtype=torch.float64)


def projection(
    direction: Direction | object,
    layer: int | None = None,
    normalize: bool = True,
    *,
    name: str | None = None,
) -> Metric:
    """Change along a vector: v.h of the ablated model less v.h of the base model, of the residual stream h as it leaves decoder
    layer `layer`, in float64.

    direction   a `Direction`, whose vector of that layer is taken (for one layer's vector behind another layer, give
                `direction.vectors[i]`), or the numbers [hidden]
    layer       counted as the model counts its decoder layers, from 0; by default the direction's own
    normalize   the vector is made to have length 1, so that scores are in units of the stream; else it is taken as it is
    name        what it is called in results, beside its layer

    Heads of later layers cannot change it: their scores are 0, and cost nothing.
    Raises InputError for a vector that is none, or 0, and for a layer that a direction does not have.
    """
    made_of, layers = "", None
    if isinstance(direction, Direction):
        layers = len(direction.vectors)
        layer = check_layer(direction.layer if layer is None else layer, len(direction.vectors))
        made_of = str(direction.identity.get("fingerprint", ""))
        direction = direction.vectors[layer]
    if layer is None:
        raise InputError("projection: after which layer? give layer=, or a Direction, which has one")
    vector = _as_vector(direction, "projection")
    length = vector.norm()
    if not length > 0:
        raise InputError("projection: the vector is 0, and no change is along it")
    if normalize:
        vector = vector / length
    layer = whole_number("layer", layer, 0)
    return _Linear(
        "projection", vector, name or "projection", layer, bool(normalize), made_of=made_of, layers=layers
    )


def probe(probe: Callable | object, layer: int, *, bias: float = 0.0, name: str | None = None) -> Metric:
    """Change of what a probe says of the residual stream h as it leaves decoder layer `layer`.

    probe   weights [hidden] of a linear probe (numbers, a torch.nn.Linear with one output, a fitted linear model of
            scikit-learn with one row of `coef_`): the score is the change of its log-odds w.h + b, in float64. Or a callable
            hidden [N, hidden] -> [N] real numbers, a tensor or an array: the change of what it returns. It gets states on the
            model's device, in float64 for a model in float64 and float32 for any other, of several heads and prompts at a
            time, and may not look from one row at another.
    layer   counted as the model counts its decoder layers, from 0
    bias    b of plain weights, which no change of w.h + b depends on
    name    what it is called in results, beside its layer

    Heads of later layers cannot change it: their scores are 0, and cost nothing.
    A callable is identified by its module and name, nothing else; one without (lambda, module, partial, object) cannot be used
    with a run folder.
    Raises InputError for anything else.
    """
    layer, title = whole_number("layer", layer, 0), name or "probe"
    weights = probe.weight if isinstance(probe, torch.nn.Linear) else getattr(probe, "coef_", probe)
    if weights is probe and callable(probe):
        return _Callable(probe, name or function_name(probe).rsplit(".", 1)[-1], layer)
    if not np.isfinite(float(bias)):
        raise InputError(f"probe: bias must be a finite number, got {bias!r}")
    return _Linear("probe", _as_vector(weights, "probe"), title, layer)


def parse_projection(text: str, rest: str) -> Metric:
    """Of the command line's text, `projection:` and rest, FILE[,LAYER]. Raises InputError."""
    file, comma, digits = rest.rpartition(",")
    layer = None
    if comma and digits.isascii() and digits.isdigit() and not os.path.exists(rest):
        layer = from_digits(digits)
    else:
        file = rest
    if not file:
        raise InputError(f"metric {text!r}: expected {FORM}")
    metric = projection(Direction.load(file), layer, name=Path(file).stem)
    return replace(metric, source=file)


def _as_vector(given: object, what: str) -> torch.Tensor:
    """float64 [hidden] on the CPU. Raises InputError."""
    given = given.detach().cpu() if isinstance(given, torch.Tensor) else given
    try:
        vector = torch.as_tensor(given).detach()
        if vector.is_complex():
            raise InputError(f"{what}: expected real numbers [hidden], got {vector.dtype}")
        vector = vector.to(dtype=torch.float64, device="cpu", copy=True)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{what}: expected numbers [hidden]{' or a callable' * (what == 'probe')}, got {type(given).__name__}"
        ) from error
    if vector.dim() == 2 and len(vector) == 1:
        vector = vector[0]
    if vector.dim() != 1 or not vector.numel():
        several = "; for several outputs give one row, or the difference of two" if vector.dim() == 2 else ""
        raise InputError(f"{what}: expected numbers [hidden], got shape {list(vector.shape)}{several}")
    if not torch.isfinite(vector).all():
        raise InputError(f"{what}: numbers of the vector are not finite")
    return vector
