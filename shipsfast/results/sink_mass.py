"""The sink mass of heads: how far the unablated model's heads rest on the first token, and how much they write."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..text import counted
from .statistics import or_none

if TYPE_CHECKING:
    import pandas as pd

REST = 0.9  # of a head's attention weight on the first token: it rests there


@dataclass(frozen=True, repr=False, eq=False)
class SinkMass:
    """Of every head, float64 [L, H]; means over the positions after a prompt's first, and then over prompts.

    first_token: the attention weight on the first token, 0 where a window hides it.
    first_token_at_end: the same at the prompts' last tokens alone.
    learned_sink: the weight that goes to a sink of the model's own (gpt-oss), which is no token and gives nothing; 0 in other
        models. The weights on all tokens and on this sink sum to 1.
    output_norm: the Euclidean norm of the head's output o_h.
    output_spread: the root of the mean square distance of o_h from its mean: 0 if the head gives the same everywhere.
    residual_norm: the norm of what the output projection makes of this head alone, W_o o_h without bias, before a norm that may
        follow (Gemma 2); NaN where a layer's projection does not take the heads' outputs as they are, side by side.
    prompts: how many there were.
    unit: "head", or "kv_group" for means over the query heads of a key/value head.
    """

    first_token: np.ndarray
    first_token_at_end: np.ndarray
    learned_sink: np.ndarray
    output_norm: np.ndarray
    output_spread: np.ndarray
    residual_norm: np.ndarray
    prompts: int
    unit: str = "head"

    def __repr__(self) -> str:
        layers, heads = self.first_token.shape
        return (
            f"SinkMass({layers} layers x {heads} {self.unit}s, {counted(self.prompts, 'prompt')}, weight on the first token "
            f"{np.nanmin(self.first_token):.2g} to {np.nanmax(self.first_token):.2g})"
        )

    @classmethod
    def numbers(cls) -> list[str]:
        """The names of its maps."""
        return [f.name for f in fields(cls) if f.name not in ("prompts", "unit")]

    @property
    def varies(self) -> np.ndarray:
        """[L, H]: `output_spread` over `output_norm`; 0 for a head that gives the same wherever it looks from."""
        return np.divide(
            self.output_spread,
            self.output_norm,
            out=np.zeros_like(self.output_norm),
            where=self.output_norm > 0,
        )

    @property
    def at_rest(self) -> np.ndarray:
        """bool [L, H]: heads with a weight of at least REST on the first token."""
        return self.first_token >= REST

    def of_groups(self, groups: int) -> SinkMass:
        """Means over the query heads of each of so many key/value heads."""
        maps = {name: getattr(self, name) for name in self.numbers()}
        layers = len(self.first_token)
        return replace(
            self,
            **{name: x.reshape(layers, groups, -1).mean(-1) for name, x in maps.items()},
            unit="kv_group",
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per head: layer, head and all maps."""
        import pandas as pd

        layer, head = np.indices(self.first_token.shape).reshape(2, -1)
        maps = {name: getattr(self, name).ravel() for name in self.numbers()}
        return pd.DataFrame({"layer": layer, "head": head} | maps)

    def of(self, layer: int, head: int) -> dict:
        """One head's numbers, for JSON; None where not known."""
        return {
            name: or_none(float(getattr(self, name)[layer, head])) for name in (*self.numbers(), "varies")
        }

    def to_json(self) -> dict:
        maps = {
            name: [[or_none(float(x)) for x in row] for row in getattr(self, name)] for name in self.numbers()
        }
        return maps | {"prompts": self.prompts, "unit": self.unit}

    @classmethod
    def from_json(cls, body: dict) -> SinkMass:
        """Raises InputError for what `to_json` did not write."""
        try:
            maps = {name: np.array(body[name], dtype=np.float64) for name in cls.numbers()}
            shape = maps["first_token"].shape
            if len(shape) != 2 or any(x.shape != shape for x in maps.values()):
                raise ValueError("maps of unequal shapes")
            return cls(**maps, prompts=int(body["prompts"]), unit=str(body["unit"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this does not describe the sink mass of heads: {error}") from error
