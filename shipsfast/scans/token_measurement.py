"""What is measured of next tokens: which ones a head raises and lowers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_doc import Doc

from ..engine.heads import Head, check_heads, check_unit
from ..engine.measurement import Heads, as_heads
from ..errors import whole_number
from ..prompts.reads import Reads, as_places, at_places
from .measurements import ScanMeasurement

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class TokensMeasurement(ScanMeasurement):
    """Heads that are switched off, one at a time, and the tokens that this moves most."""

    kind = "top_tokens"

    head: Annotated[
        Sequence[int] | Heads,
        Doc(
            "a (layer, head) pair, from 0, or a list of them, each switched off on its own; (layer, None) for a whole layer."
        ),
    ]
    k: Annotated[int, Doc("how many tokens each way.")] = 10
    at: Annotated[
        object,
        Doc(
            'where a head is off: at "all" positions, or only at the "end", the position that is read. Or the position of the '
            "prompt behind which the next token is looked at: a number, from the end where negative, or a text that stands in the "
            "prompt once, of which it is the last token."
        ),
        Doc(
            "None for what the ablation says, and behind the last token. Positions may also be a list, one for each prompt."
        ),
    ] = None
    heads: None = None  # it is `head` here

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(head=as_heads(_as_list(self.head)), k=whole_number("k", self.k))

    def _set_places(self) -> None:
        self._set(at=as_places(self.at, len(self.prompts)))

    def reads(self, ids: list[list[int]], tokenizer) -> Reads | None:
        return None if self.at is None else at_places(ids, self.at, tokenizer)

    def units(self, anatomy: Anatomy) -> list[Head]:
        """What is switched off, in ascending order. Raises InputError for heads that the model does not have."""
        return check_heads(self.head, anatomy.num_layers, check_unit(self.unit, anatomy), self.unit)


def _as_list(head) -> object:
    """One head as a list of one."""
    if isinstance(head, (str, bytes)) or not isinstance(head, Iterable):
        return head
    head = tuple(head[:2]) if hasattr(head, "score") else tuple(head)
    single = len(head) == 2 and not any(isinstance(x, Iterable) and getattr(x, "ndim", 1) for x in head)
    return (head,) if single else head
