"""Generation under ablation: groups of heads x prompts decode together, each row with its own heads off."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from ..engine.ablation import DEFAULT_SCALE, Ablation
from ..engine.decoder import Group
from ..engine.heads import Head, check_heads, unit_heads
from ..engine.layer_path import FP32_RESIDUAL
from ..engine.replacement_values import mean_outputs
from ..engine.subject import Subject, look_at
from ..errors import InputError, whole_number
from ..models.restore import untouched
from ..models.weights import check_in_memory
from .plan import make_generation_plan
from .queue import Generation, Longest
from .sampling import TOP_K, Sampling
from .self_check import check_generation
from .transformers_engine import with_transformers

NEW_TOKENS = 128  # arXiv 2410.13708, appendix B.2


@untouched
def generate(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer=None,
    *,
    groups: Iterable[Iterable[Sequence[int | None]]] = ((),),
    max_new_tokens: int = NEW_TOKENS,
    do_sample: bool = False,
    top_k: int = TOP_K,
    temperature: float = 1.0,
    seed: int = 0,
    template: str = "none",
    ablation: str | Ablation = "undifferentiated",
    scale: float = DEFAULT_SCALE,
    unit: str = "head",
    eos_token_id: int | Sequence[int] | None = None,
    engine: str = "auto",
    generate_kwargs: dict | None = None,
    backend: str = "auto",
    layers: str = "auto",
    max_memory: int | None = None,
    batch_rows: int | None = None,
    progress: bool = True,
) -> list[list[str]] | list[list[list[int]]]:
    """What the model answers with each group of heads off: groups x prompts rows decode together.

    The ablation acts on the prompt and in every decode step (arXiv 2410.13708, section 3.1), on visible tokens only;
    nothing is padded. Greedy texts are those of a plain loop without a cache, up to rounding: where two tokens are
    within rounding of each other, batches of other sizes may choose differently.

    Args:
        model, prompts, tokenizer, template: as in `scan`. Without a tokenizer, prompts are token-id lists, and so are
            the texts.
        groups: G groups of (layer, head) pairs, from 0; (layer, None) is a whole layer, and [] the unablated model.
        max_new_tokens: a text ends there or at an end-of-sequence token, which is not part of it.
        do_sample, top_k, temperature, seed: False is greedy; True draws from the softmax of logits / temperature over
            the top_k largest (0: all). What a row draws depends on seed, prompt, heads and, for equal rows, their
            number; not on the other rows.
        ablation, scale, unit: as in `scan`; `resample`, which matches positions one to one, is refused.
        eos_token_id: tokens that end a text; default: those of the model's generation config, or the tokenizer's.
            [] for none.
        engine: "continuous" decodes all rows in one batch that is refilled as rows end; "transformers" calls the
            model's own `generate` inside `ablate`, a group at a time. "auto" is the first, unless there are
            `generate_kwargs`.
        generate_kwargs: for the model's own `generate`: logits_processor, stopping_criteria, assistant_model, ...
            Settings that the model comes with (such as a repetition penalty) count in neither engine.
        backend, layers, max_memory: as in `scan`. batch_rows: rows that decode together; default 128 on a CPU, 512
            on CUDA, fewer where memory is short.
        progress: a progress bar on stderr.
    Returns:
        texts, [G][P]: strings, special tokens left out, or lists of token ids without a tokenizer.
    Raises:
        InputError: bad prompts, groups, ablation or settings. UnsupportedModelError: as in `scan`.
    """
    generation = prepare_generation(
        model, prompts, tokenizer, groups=groups, max_new_tokens=max_new_tokens,
        sampling=Sampling(do_sample, top_k, temperature, seed), template=template, ablation=ablation, scale=scale,
        unit=unit, eos_token_id=eos_token_id, backend=backend, layers=layers, max_memory=max_memory,
        batch_rows=batch_rows,
    )  # fmt: skip
    rows = [(g, p) for g in range(len(generation.groups)) for p in range(len(generation.subject.token_ids))]
    longest = Longest()
    if engine == "continuous" and generation.subject.anatomy.plain_sequences:
        raise InputError(
            f"engine 'continuous' cannot run: {type(generation.subject.model).__name__} has layers that keep a state of "
            "their own between tokens; use engine='auto' or 'transformers'"
        )
    if _use_transformers(engine, generate_kwargs):
        finished = with_transformers(generation, rows, generate_kwargs or {}, progress)
    else:
        finished = longest.watch(generation.run(rows, progress))
    out: list[list] = [[None] * len(generation.subject.token_ids) for _ in generation.groups]
    for some in finished:
        for row in some:
            out[row.group][row.prompt] = row.tokens
    check_generation(generation, longest.row)
    if tokenizer is None:
        return out
    return [tokenizer.batch_decode(texts, skip_special_tokens=True) for texts in out]


def prepare_generation(
    model: PreTrainedModel,
    prompts: Sequence,
    tokenizer,
    *,
    groups: Iterable[Iterable[Sequence[int | None]]],
    max_new_tokens: int,
    sampling: Sampling,
    template: str,
    ablation: str | Ablation,
    scale: float,
    unit: str,
    eos_token_id: int | Sequence[int] | None,
    backend: str,
    layers: str,
    max_memory: int | None,
    batch_rows: int | None,
) -> Generation:
    """Arguments as in `generate`. Raises InputError or UnsupportedModelError, as it does."""
    whole_number("max_new_tokens", max_new_tokens)
    if batch_rows is not None:
        whole_number("batch_rows", batch_rows)
    if layers == FP32_RESIDUAL:
        raise InputError(
            f"layers {layers!r} (--layers) is for scans: a text should be what the model itself says"
        )
    check_in_memory(model)
    subject = look_at(
        model, prompts, tokenizer, template=template, ablation=ablation, scale=scale, unit=unit, backend=backend,
        layers=layers, new_tokens=max_new_tokens,
    )  # fmt: skip
    if subject.how.kind == "resample":
        raise InputError(
            "ablation resample matches positions one to one, and new text has no counterpart: use another"
        )
    asked, chosen = check_groups(groups, subject)
    sampling.check(subject.anatomy.vocab_size)
    values = None
    if subject.how.kind == "mean" and any(chosen):
        values = mean_outputs(model, subject.anatomy, subject.other_ids, subject.backend)
    plan = make_generation_plan(subject, len(chosen), max_new_tokens, max_memory, batch_rows)
    end_tokens = find_end_tokens(model, tokenizer, eos_token_id, subject.anatomy.vocab_size)
    return Generation(subject, chosen, sampling, max_new_tokens, end_tokens, plan, values, asked)


def check_groups(groups, subject: Subject) -> tuple[list[list[Head]], list[Group]]:
    """The groups' units, and their query heads. `groups`: as in `generate`, or a function of the subject.

    Raises InputError, naming the first group that is wrong.
    """
    anatomy = subject.anatomy
    groups = groups(subject) if callable(groups) else groups
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Iterable):
        raise InputError(f"groups must be a list of lists of (layer, head) pairs, got {groups!r}")
    asked: list[list[Head]] = []
    for number, group in enumerate(groups):
        if (
            isinstance(group, Sequence)
            and len(group) > 1
            and all(isinstance(x, numbers.Number) for x in group)
        ):
            raise InputError(
                f"group {number} is a single head: groups is a list of lists of heads, such as [[(0, 2)]]"
            )
        group = list(group) if isinstance(group, Iterable) and not isinstance(group, (str, bytes)) else group
        if group == []:
            asked.append([])
            continue
        try:
            units = check_heads(group, anatomy.num_layers, subject.num_units, subject.unit)
        except InputError as error:
            raise InputError(f"group {number}: {error}") from None
        named = [(entry[0], h) for entry in group for h in _heads_of(entry, subject.num_units)]
        twice = next((head for head in named if named.count(head) > 1), None)
        if twice is not None:
            raise InputError(
                f"group {number} names {subject.unit} {twice[0]}-{twice[1]} twice: name each once"
            )
        asked.append(units)
    if not asked:
        raise InputError("there are no groups: give at least one, such as [] for the unablated model")
    return asked, [
        tuple(head for each in units for head in unit_heads(each, subject.unit, anatomy)) for units in asked
    ]


def _heads_of(entry: Sequence[int | None], num_units: int) -> Iterable[int]:
    return range(num_units) if entry[1] is None else [entry[1]]


def find_end_tokens(
    model: PreTrainedModel, tokenizer, given: int | Sequence[int] | None, vocab_size: int
) -> frozenset[int]:
    """The tokens that end a text. Raises InputError if nobody names one, or `given` names none of the vocabulary."""
    if given is not None:
        named = given if isinstance(given, Iterable) else [given]
        tokens = [whole_number("eos_token_id", each, 0) for each in named]
        if max(tokens, default=0) >= vocab_size:
            raise InputError(
                f"eos_token_id {max(tokens)} is no token of the model: its vocabulary has {vocab_size}"
            )
        return frozenset(tokens)
    for tokens in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if tokens is not None:
            return frozenset(map(int, [tokens] if isinstance(tokens, int) else tokens))
    raise InputError(
        "neither the model nor the tokenizer names an end-of-sequence token: give eos_token_id (--eos-token-id), or [] "
        "(--eos-token-id none) to let every text run to max_new_tokens"
    )


def _use_transformers(engine: str, generate_kwargs: dict | None) -> bool:
    if engine not in ("auto", "continuous", "transformers"):
        raise InputError(f"unknown engine {engine!r}: expected auto, continuous or transformers")
    if engine == "continuous" and generate_kwargs:
        raise InputError(
            f"engine 'continuous' takes no generate_kwargs ({', '.join(generate_kwargs)}): use 'auto' or 'transformers'"
        )
    return engine == "transformers" or bool(generate_kwargs)
