"""Which next tokens a head raises and lowers: mean probabilities over prompts, with the head off and without.

For each head and token, p(token | prompt, head off) - p(token | prompt), mean over the prompts. Rows of the growing batch
become probabilities chunk by chunk; of a block of heads their sums over prompts are held, [heads, V], and of all heads only
the tokens that moved most.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.heads import Head
from ..engine.measurement import PlannedExecution, called_with
from ..engine.nonfinite import bad_logits
from ..errors import InputError, UnsupportedModelError
from ..memory import once_more
from ..models.forward import alarm
from ..models.restore import untouched
from ..ops.divergences import SCRATCH_BYTES, kl_rows
from ..prompts.tokens import token_text
from ..results.top_tokens import TokenChange, TopTokens
from .nonfinite import check_base_logits, explain
from .prepare import Prepared, prepare, run_blocks
from .scan_bar import ScanBar
from .self_check import ablated_outputs, longest_prompt, own_layers_hint, packing_noise_nats, plain_outputs
from .token_measurement import TokensMeasurement


@called_with(TokensMeasurement, PlannedExecution)
@untouched
def top_tokens(
    model: PreTrainedModel, tokenizer, measurement: TokensMeasurement, execution: PlannedExecution
) -> TopTokens:
    """Switch off a head, and list the next tokens that become likelier and less likely.

    Of every token the mean probability over the prompts, of the token that follows each, without and with the head off;
    float64, of the logits in float32 (float64 for models in float64).

    Returns:
        TopTokens with .raised and .lowered, by head: the k tokens whose mean probability rises and falls most, TokenChange
        (token, text, before, after, difference). tokenizer=None leaves texts empty.
    Raises:
        InputError: bad prompts, heads, ablation or backend; logits that are not finite.
        UnsupportedModelError: the model cannot be scanned exactly.
    """
    started = time.perf_counter()
    prepared = prepare(model, tokenizer, measurement, execution)
    groups = len(prepared.plan.prompt_groups)
    steps = prepared.layer_passes(prepared.units, prepared.units, groups)
    scores = len(prepared.units) * len(prepared.read_ids)
    with ScanBar("top-tokens", steps, scores, prepared, execution) as bar:
        work = _Work(prepared, tokenizer, bar)
        run_blocks(prepared, prepared.units, work.missing, work.block, bar, passes=groups)
    noise_floor = once_more("checking by plain forward passes", work.check)
    record = prepared.record | {"plan": prepared.plan.to_json(), "packing_noise": work.packing_noise}
    record["seconds"] = seconds_since(started)
    identity = {"dtype": str(prepared.model.dtype).removeprefix("torch."), "unit": prepared.unit}
    return TopTokens(
        work.raised, work.lowered, work.moved, len(prepared.token_ids), noise_floor, record, identity
    )


class _Work:
    """A block of heads at a time, over all prompts."""

    def __init__(self, prepared: Prepared, tokenizer, bar: ScanBar) -> None:
        self.prepared, self.bar = prepared, bar
        self.text = functools.lru_cache(None)(functools.partial(token_text, tokenizer))
        self.raised: dict[Head, list[TokenChange]] = {}
        self.lowered: dict[Head, list[TokenChange]] = {}
        self.moved: dict[Head, float] = {}
        # Of each read, so that prompts count alike: as a rule a prompt has one.
        count = Counter(prompt for prompt, _ in prepared.read_places)
        self.weights = torch.tensor(
            [1 / (len(count) * count[prompt]) for prompt, _ in prepared.read_places], dtype=torch.float64
        )
        # What is held against plain passes: the logits [V] of the longest read, with no head off and with one.
        self.read = longest_prompt(prepared, range(len(prepared.read_ids)))
        self.unit = prepared.units[len(prepared.units) // 2]
        self.seen: dict[Head | None, torch.Tensor] = {}
        self.packing_noise = 0.0

    def missing(self) -> list[Head]:
        return [unit for unit in self.prepared.units if unit not in self.moved]

    def block(self, units: Sequence[Head]) -> None:
        before, *after = sum(self._sums(units, some) for some in self.prepared.plan.prompt_groups).numpy()
        for unit, own in zip(units, after, strict=True):
            change = own - before
            self.raised[unit] = self._first(-change, before, own)
            self.lowered[unit] = self._first(change, before, own)
            self.moved[unit] = float(np.abs(change).sum() / 2)

    def _first(self, key: np.ndarray, before: np.ndarray, after: np.ndarray) -> list[TokenChange]:
        """The k tokens with the smallest key, all below 0; of equal ones the lower ids."""
        order = np.argsort(key, kind="stable")[: self.prepared.measurement.k]
        return [self._change(int(token), before, after) for token in order if key[token] < 0]

    def _change(self, token: int, before: np.ndarray, after: np.ndarray) -> TokenChange:
        old, new = float(before[token]), float(after[token])
        return TokenChange(token, self.text(token), old, new, new - old)

    def _sums(self, units: Sequence[Head], together: tuple[int, ...]) -> torch.Tensor:
        """Weighted sums of probabilities over the reads of what is packed together, float64 [1 + units, V]: with no head off, and
        with each."""
        prepared, reads = self.prepared, self.prepared.sequences.reads(together)
        found: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        bad: list[tuple[Head, int]] = []
        packed, values = prepared.pack(together)
        with prepared.growing_batch(packed, self.bar.update) as batch:
            place = batch.prompt_place
            ends = torch.bincount(torch.as_tensor(place), self.weights[reads])  # of the nodes that are read

            def consume(rows: slice, logits: torch.Tensor, base: torch.Tensor) -> None:
                kept[:] = [base]
                found.append(_weighted(logits, ends.to(logits.device)).cpu())
                for row, end in np.argwhere(bad_logits(logits).cpu().numpy()):
                    if rows.start + row:  # the unablated model's are looked at below
                        bad.append((units[rows.start + row - 1], reads[int((place == end).argmax())]))
                if self.read in reads:
                    at = place[reads.index(self.read)]
                    for row, unit in enumerate((None, *units)[rows]):
                        if unit in (None, self.unit):
                            self.seen[unit] = logits[row, at].clone()

            batch.run(prepared.mask(units, values), consume)
        check_base_logits(prepared, reads, place, kept[0])
        if bad:
            self._refuse(*bad[0])
        return torch.cat(found)

    def _refuse(self, unit: Head, read: int) -> NoReturn:
        place, _ = explain(self.prepared, read, unit)
        raise InputError(
            f"the next token of {self.prepared.read_name(read)} with {self.prepared.unit} {unit[0]}-{unit[1]} off has no "
            f"probabilities, with {self.prepared.how.describe()}: {place or 'packing the prompts does it'}; use a smaller scale or "
            "a wider dtype"
        )

    def check(self) -> float:
        """The unablated model and one head at the longest read by plain forward passes: the largest difference of a
        probability. Raises UnsupportedModelError where they are not the same model."""
        prepared, read, (layer, index) = self.prepared, self.read, self.unit
        base = self.seen[None]
        plain = plain_outputs(prepared, read, 1)[None][0].to(base.device)
        self.packing_noise = packing_noise_nats(prepared, read, plain, base)
        own = self.seen[self.unit]
        expected = ablated_outputs(prepared, read, [self.unit])[None][0].to(own.device)
        nats = float(kl_rows(expected[None], own[None].to(expected.dtype), torch.zeros(1, dtype=torch.long)))
        if not nats <= alarm(prepared.model)[0]:
            raise UnsupportedModelError(
                f"the next token of {prepared.read_name(read)} with {prepared.unit} {layer}-{index} off differs by {nats:.3g} nats from "
                f"that of a plain forward pass: {type(prepared.model).__name__} cannot be scanned exactly"
                f"{own_layers_hint(prepared)}"
            )
        pairs = ((plain, base), (expected, own))
        return max(float((_probabilities(one) - _probabilities(other)).abs().max()) for one, other in pairs)


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits.double(), -1)


def _weighted(logits: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Float64 [n, V] of logits [n, U, V]: the sum of their probabilities over U, each weighted by `ends` [U]."""
    out = torch.zeros(logits.shape[0], logits.shape[2], dtype=torch.float64, device=logits.device)
    step = max(1, SCRATCH_BYTES // (2 * 8 * logits.shape[2]))
    for row, each in zip(out, logits, strict=True):
        for some, weights in zip(each.split(step), ends.split(step), strict=True):
            row += weights @ _probabilities(some)
    return out
