"""Which next tokens heads raise and lower: what `top_tokens` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from .equality import Compared

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 3  # tokens each way in a line
WAYS = ("raised", "lowered")


class TokenChange(NamedTuple):
    """A token, its text, and its mean probability with no head off and with the head off."""

    token: int
    text: str
    before: float
    after: float
    difference: float  # after less before


@dataclass(repr=False, eq=False)
class TopTokens(Compared):
    """Next tokens that become likelier and less likely as a head is switched off, mean over P prompts.

    raised, lowered: by (layer, head), at most k tokens, the largest change first; tokens that do not move are in neither.
    moved: by (layer, head), the total variation distance between the two mean distributions: how much probability goes
        elsewhere.
    prompts: P. noise_floor: the largest difference of a probability from that of a plain forward pass, on the longest
        prompt, with no head off and with one; changes under it say nothing.
    record: what really ran. identity: dtype and unit.
    """

    raised: dict[tuple[int, int], list[TokenChange]]
    lowered: dict[tuple[int, int], list[TokenChange]]
    moved: dict[tuple[int, int], float]
    prompts: int
    noise_floor: float = 0.0
    record: dict = field(default_factory=dict, compare=False)
    identity: dict = field(default_factory=dict)

    @property
    def heads(self) -> list[tuple[int, int]]:
        return list(self.moved)

    @property
    def unit(self) -> str:
        """What was switched off: "head", or "kv_group"."""
        return self.identity.get("unit", "head")

    def __repr__(self) -> str:
        lines = [
            f"{layer}-{head}: "
            + "; ".join(
                f"{way} {', '.join(f'{x.text!r} {x.difference:+.2g}' for x in getattr(self, way)[layer, head][:SHOWN])}"
                for way in WAYS
            )
            for layer, head in self.heads
        ]
        return f"TopTokens({self.prompts} prompts)\n" + "\n".join(lines)

    def to_pandas(self) -> pd.DataFrame:
        """One row per head, way and token: layer, head, way, rank, token, text, before, after, difference."""
        import pandas as pd

        rows = [
            (*head, way, rank, *each)
            for head in self.heads
            for way in WAYS
            for rank, each in enumerate(getattr(self, way)[head], 1)
        ]
        return pd.DataFrame(rows, columns=["layer", "head", "way", "rank", *TokenChange._fields])

    def to_json(self) -> dict:
        """What a program reads of it."""
        heads = [
            {"layer": layer, "head": head, "moved": self.moved[layer, head]}
            | {way: [each._asdict() for each in getattr(self, way)[layer, head]] for way in WAYS}
            for layer, head in self.heads
        ]
        return {
            "heads": heads,
            "prompts": self.prompts,
            "noise_floor": self.noise_floor,
            "record": self.record,
        }

    def show(self, console=None) -> None:
        """Print a table for each head."""
        from .tables import show_tokens

        show_tokens(self, console)
