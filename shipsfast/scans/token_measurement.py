"""What is measured of next tokens: which ones a head raises and lowers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_doc import Doc

from ..engine.heads import Head, check_heads, check_unit
from ..engine.measurement import Heads, Measurement, as_heads
from ..errors import whole_number

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class TokensMeasurement(Measurement):
    """Heads that are switched off, one at a time, and the tokens that this moves most."""

    kind = "top_tokens"

    head: Annotated[
        Sequence[int] | Heads,
        Doc(
            "a (layer, head) pair, from 0, or a list of them, each switched off on its own; (layer, None) for a whole layer."
        ),
    ]
    k: Annotated[int, Doc("how many tokens each way.")] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(head=as_heads(_as_list(self.head)), k=whole_number("k", self.k))

    def units(self, anatomy: Anatomy) -> list[Head]:
        """What is switched off, in ascending order. Raises InputError for heads that the model does not have."""
        return check_heads(self.head, anatomy.num_layers, check_unit(self.unit, anatomy), self.unit)

    def identity(self) -> dict:
        """What the identity of a run says of it beside prompts, ablation and heads."""
        return {"k": self.k}


def _as_list(head) -> object:
    """One head as a list of one."""
    if isinstance(head, (str, bytes)) or not isinstance(head, Iterable):
        return head
    head = tuple(head[:2]) if hasattr(head, "score") else tuple(head)
    single = len(head) == 2 and not any(isinstance(x, Iterable) and getattr(x, "ndim", 1) for x in head)
    return (head,) if single else head
