"""Generation under ablation: groups of heads x prompts decode together, each row with its own heads off."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..engine.measurement import called_with
from ..models.restore import untouched
from .decode import decode, longest
from .generation import prepare_generation
from .measurements import EngineExecution, GenerationMeasurement
from .self_check import check_generation


@called_with(GenerationMeasurement, EngineExecution)
@untouched
def generate(
    model: PreTrainedModel, tokenizer, measurement: GenerationMeasurement, execution: EngineExecution
) -> list[list[str]] | list[list[list[int]]]:
    """What the model answers with each group of heads off: groups x prompts rows decode together.

    The ablation acts on the prompt and in every decode step (arXiv 2410.13708, section 3.1), on visible tokens only;
    nothing is padded. Greedy texts are those of a plain loop without a cache, up to rounding: where two tokens are
    within rounding of each other, batches of other sizes may choose differently.

    `resample`, which matches positions one to one, is refused.

    Returns:
        texts, [G][P]: strings, special tokens left out, or lists of token ids without a tokenizer.
    Raises:
        InputError: bad prompts, groups, ablation or settings. UnsupportedModelError: as in `scan`.
    """
    generation = prepare_generation(model, tokenizer, measurement, execution)
    decoded = decode(
        generation, generation.rows, engine=execution.engine, generate_kwargs=execution.generate_kwargs,
        progress=execution.progress,
    )  # fmt: skip
    checked = None
    out: list[list] = [[None] * len(generation.subject.token_ids) for _ in generation.groups]
    for rows in decoded:
        checked = longest([checked, *rows])
        for row in rows:
            out[row.group][row.prompt] = row.tokens
    # Settings of the model's own `generate` may choose otherwise.
    if execution.engine != "transformers" and not execution.generate_kwargs:
        check_generation(generation, checked)
    if tokenizer is None:
        return out
    return [tokenizer.batch_decode(texts, skip_special_tokens=True) for texts in out]
