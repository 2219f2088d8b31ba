"""Rows of a generation through the model's own `generate`: for what only transformers has, and for hybrid models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from transformers import GenerationConfig

from ..engine.ablate import dense_rows
from ..engine.decoder import Decoded
from ..engine.head_mask import HeadMask
from ..errors import InputError
from ..models.forward import padded
from ..text import one_line
from .answers_bar import AnswersBar
from .generation import Generation

PROMPTS = "the prompts say it"
TEXTS = "only texts come back"
# What another argument of ours says, or what has no place in a list of texts.
REFUSED = {
    **dict.fromkeys(
        ("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache_position"),
        PROMPTS,
    ),
    **dict.fromkeys(
        ("max_new_tokens", "do_sample", "top_k", "temperature", "eos_token_id"), "it is a keyword of its own"
    ),
    "generation_config": "give its settings one by one",
    "max_length": "max_new_tokens says it",
    "max_time": "texts would depend on how fast this machine is",
    "num_return_sequences": "every row is one text: give the prompt several times",
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"), TEXTS
    ),
}  # fmt: skip
# With these a row goes on its own: they are asked about, or end, a whole batch.
ALONE = (
    "stopping_criteria", "stop_strings", "prefix_allowed_tokens_fn", "assistant_model", "prompt_lookup_num_tokens",
    "streamer", "custom_generate",
)  # fmt: skip


def check_generate_kwargs(given: dict) -> None:
    """Raises InputError for settings that would be dropped or not understood."""
    for name, why in REFUSED.items():
        if name in given and not (name == "num_return_sequences" and given[name] == 1):
            raise InputError(f"generate_kwargs has {name}, which cannot be given: {why}")


def with_transformers(
    generation: Generation, rows: Iterable[tuple[int, int]], generate_kwargs: dict, progress: bool
) -> Iterator[list[Decoded]]:
    """The same rows through the model's own `generate`, a group at a time inside `ablate`, prompts left-padded.

    Draws then come from torch's generator, seeded for each batch. With settings of the caller's own, which may read a row's
    tokens, rows of one batch have equally many: padding would be read with them.
    """
    check_generate_kwargs(generate_kwargs)
    if generate_kwargs.get("stop_strings") is not None and "tokenizer" not in generate_kwargs:
        if generation.tokenizer is None:
            raise InputError(
                "generate_kwargs has stop_strings, and there is no tokenizer to find them with: pass one"
            )
        generate_kwargs = generate_kwargs | {"tokenizer": generation.tokenizer}
    subject, sampling = generation.subject, generation.sampling
    settings = {
        "max_new_tokens": generation.max_new_tokens, "do_sample": sampling.do_sample, "num_beams": 1,
        "eos_token_id": sorted(generation.end_tokens) or None, "return_dict_in_generate": False,
    }  # fmt: skip
    if sampling.do_sample:
        settings |= {"top_k": sampling.top_k, "temperature": sampling.temperature, "top_p": 1.0}
    own = {name: x for name, x in generate_kwargs.items() if hasattr(GenerationConfig(), name)}
    generate_kwargs = {name: x for name, x in generate_kwargs.items() if name not in own}
    with _told(own):
        config = GenerationConfig(**settings | own)
    prompts_of: dict[int, list[int]] = {}
    for group, prompt in rows:
        prompts_of.setdefault(group, []).append(prompt)
    pad = min(generation.end_tokens, default=0)
    config.pad_token_id = pad
    bar = AnswersBar(sum(map(len, prompts_of.values())), generation.max_new_tokens, progress)
    for group, prompts in prompts_of.items():
        mask = HeadMask((generation.groups[group],), subject.how, generation.values)
        out: list[Decoded] = []
        for part in _batches(generation, prompts, generate_kwargs | own):
            ids = [subject.token_ids[p] for p in part]
            batch = padded(ids, pad, "left", subject.device)
            devices = [subject.device] if subject.device.type == "cuda" else []
            with contextlib.ExitStack() as undo:
                # What a call leaves open would be taken from the settings that the model comes with.
                undo.callback(setattr, subject.model, "generation_config", subject.model.generation_config)
                subject.model.generation_config = GenerationConfig()
                undo.enter_context(torch.random.fork_rng(devices))
                undo.enter_context(dense_rows(subject.model, subject.anatomy, mask))
                torch.manual_seed(sampling.seed)
                with _told(own | generate_kwargs):
                    text = subject.model.generate(**batch, generation_config=config, **generate_kwargs)
            for p, tokens in zip(part, text[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((i for i, t in enumerate(tokens) if t in generation.end_tokens), None)
                ended = end is not None or len(tokens) < generation.max_new_tokens
                out.append(Decoded(group, p, tokens[:end], ended))
            bar.done(len(part))
            bar.underway(0)
        yield out
    bar.close()


@contextlib.contextmanager
def _told(given: dict) -> Iterator[None]:
    """What transformers says of settings that it does not know, or that do not fit together."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not given or isinstance(error, InputError):
            raise
        raise InputError(
            f"generate_kwargs ({', '.join(given)}) cannot be used: {one_line(str(error))}"
        ) from error


def _batches(generation: Generation, prompts: list[int], given: dict) -> Iterator[list[int]]:
    """The prompts that go through together."""
    ids, most = generation.subject.token_ids, generation.plan.slots
    # Padding would pass through layers that know of no mask.
    if generation.subject.anatomy.plain_sequences or any(given.get(name) is not None for name in ALONE):
        most = 1
    together = [prompts]
    if given:
        lengths = sorted({len(ids[p]) for p in prompts})
        together = [[p for p in prompts if len(ids[p]) == length] for length in lengths]
    for some in together:
        for start in range(0, len(some), most):
            yield some[start : start + most]
