"""Which heads rest on the first token: one packed pass of the unablated model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ..engine.measurement import Execution, Measurement
from ..engine.sink_mass import sink_numbers
from ..engine.subject import Subject, look_at
from ..errors import InputError
from ..memory import once_more
from ..models.restore import untouched
from ..prompts.wrapping import DATE
from ..results.sink_mass import SinkMass


@untouched
def sink_mass(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[Mapping]],
    tokenizer=None,
    *,
    template: str = "none",
    system: str | None = None,
    prefix: str = "",
    template_args: Mapping | None = None,
    template_date: str = DATE,
    unit: str = "head",
    backend: str = "auto",
) -> SinkMass:
    """How far every head of the unablated model rests on the prompts' first token, and how much it writes.

    Heads that look at the first token from everywhere are at rest, and give the same everywhere: switched off by `zero` or `mean`
    they are hardly missed, and made to look around by `undifferentiated` they write what they never do.

    Args: as of `scan`. Prompts of one token say nothing, and are left out.
    Raises:
        InputError: bad prompts, unit or backend, or prompts of one token only.
        UnsupportedModelError: the model cannot be scanned exactly.
    """
    about = Measurement(
        prompts=prompts, template=template, system=system, prefix=prefix, template_args=template_args,
        template_date=template_date, unit=unit,
    )  # fmt: skip
    found = sinks_of(look_at(model, tokenizer, about, Execution(backend=backend)))
    if found is None:
        raise InputError(
            "no prompt has more than one token, so that no head has anything but the first to look at: give longer prompts"
        )
    return found


def sinks_of(subject: Subject) -> SinkMass | None:
    """Of the heads, or key/value groups, of a subject; None where every prompt is a single token."""
    groups = subject.num_units
    ids = [each for each in subject.token_ids if len(each) > 1]
    if not ids:
        return None
    numbers = once_more(
        "measuring what heads rest on",
        lambda: sink_numbers(subject.model, subject.anatomy, ids, subject.backend),
    )
    found = SinkMass(**numbers, prompts=len(ids))
    return found if subject.unit == "head" else found.of_groups(groups)
