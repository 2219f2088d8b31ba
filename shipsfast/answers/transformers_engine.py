"""Rows of a generation through the model's own `generate`: for what only transformers has, and for hybrid models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from ..engine.ablate import dense_rows
from ..engine.decoder import Decoded
from ..engine.head_mask import HeadMask
from ..models.forward import padded
from .generation import Generation


def with_transformers(
    generation: Generation, rows: Iterable[tuple[int, int]], generate_kwargs: dict, progress: bool
) -> Iterator[list[Decoded]]:
    """The same rows through the model's own `generate`, a group at a time inside `ablate`, prompts left-padded.

    Draws then come from torch's generator, seeded for each group.
    """
    subject, sampling = generation.subject, generation.sampling
    settings = {
        "max_new_tokens": generation.max_new_tokens, "do_sample": sampling.do_sample, "num_beams": 1,
        "eos_token_id": sorted(generation.end_tokens) or None, "return_dict_in_generate": False,
    }  # fmt: skip
    if sampling.do_sample:
        settings |= {"top_k": sampling.top_k, "temperature": sampling.temperature, "top_p": 1.0}
    own = {name: x for name, x in generate_kwargs.items() if hasattr(GenerationConfig(), name)}
    generate_kwargs = {name: x for name, x in generate_kwargs.items() if name not in own}
    config = GenerationConfig(**settings | own)
    prompts_of: dict[int, list[int]] = {}
    for group, prompt in rows:
        prompts_of.setdefault(group, []).append(prompt)
    pad = min(generation.end_tokens, default=0)
    config.pad_token_id = pad
    for group, prompts in tqdm(prompts_of.items(), desc="generate", unit=" groups", disable=not progress):
        mask = HeadMask((generation.groups[group],), subject.how, generation.values)
        out: list[Decoded] = []
        # Padding would pass through layers that know of no mask.
        most = 1 if subject.anatomy.plain_sequences else generation.plan.slots
        for start in range(0, len(prompts), most):
            part = prompts[start : start + most]
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
                text = subject.model.generate(**batch, generation_config=config, **generate_kwargs)
            for p, tokens in zip(part, text[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((i for i, t in enumerate(tokens) if t in generation.end_tokens), None)
                out.append(Decoded(group, p, tokens[:end], end is not None))
        yield out
