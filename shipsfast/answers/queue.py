"""A generation at work: rows that wait in a queue, and rows in the slots of a decoder, which others fill as they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..engine.decoder import Decoded, Decoder
from ..errors import InputError
from ..memory import out_of_memory
from .answers_bar import AnswersBar
from .generation import Generation
from .self_check import NotFinite, refuse_token

REFILL = 8  # rows wait until an 1/8 of the slots is free, so that prefills are not of a row each


def continuous(
    generation: Generation, rows: Iterable[tuple[int, int]], progress: bool = False
) -> Iterator[list[Decoded]]:
    """Decode the (group, prompt) rows together; finished ones come out in batches, in any order.

    After running out of memory, rows in flight start anew with half as many at a time: their texts are the same.
    """
    waiting = deque(sorted(rows, key=lambda row: (row[1], generation.fork_layer(row[0]))))
    bar = AnswersBar(len(waiting), generation.max_new_tokens, progress)
    try:
        while waiting:
            burst = _Burst(generation, min(generation.plan.slots, len(waiting)), bar)
            with out_of_memory() as found:
                try:
                    with burst.decoder:
                        while waiting or burst.running:
                            burst.refill(waiting)
                            yield burst.decode(more=bool(waiting))
                except NotFinite as bad:  # the model is as it was again, so that a plain pass can look
                    refuse_token(generation, *bad.args)
            if not found:
                continue
            if generation.plan.slots == 1:
                raise InputError(
                    "out of memory with a single row: free some, or lower max_new_tokens (--max-new-tokens)"
                ) from found[0]
            yield burst.finished
            waiting.extendleft(reversed(burst.abandoned()))
            generation.plan.halve()
    finally:
        bar.close()


class _Burst:
    """Rows in the slots of one decoder."""

    def __init__(self, generation: Generation, slots: int, bar) -> None:
        self.generation, self.bar = generation, bar
        subject, plan = generation.subject, generation.plan
        self.decoder = Decoder(
            subject,
            generation.values,
            slots=slots,
            capacity=plan.capacity,
            prefill=plan.prefill,
            joined=plan.joined,
        )
        self.row: list[tuple[int, int] | None] = [None] * slots
        self.uniform = np.zeros((slots, generation.max_new_tokens))
        self.text = np.zeros((slots, generation.max_new_tokens), dtype=np.int64)
        self.count = np.zeros(slots, dtype=np.int64)
        self.ended = np.zeros(slots, dtype=bool)  # by an end-of-sequence token
        self.refill_at = max(1, slots // REFILL)
        self.finished: list[Decoded] = []  # not yet handed out

    @property
    def running(self) -> bool:
        return any(row is not None for row in self.row)

    def abandoned(self) -> list[tuple[int, int]]:
        """The rows in flight, whose work is lost."""
        rows = [row for row in self.row if row is not None]
        return sorted(rows, key=lambda row: (row[1], self.generation.fork_layer(row[0])))

    def refill(self, waiting: deque) -> None:
        """Rows from the queue into the free slots."""
        free = [slot for slot, row in enumerate(self.row) if row is None]
        if not waiting or not free:
            return
        generation, sampling = self.generation, self.generation.sampling
        groups_of: dict[int, list[int]] = {}
        slot_of: dict[tuple[int, int], int] = {}
        for slot in free[: len(waiting)]:
            row = waiting.popleft()
            self.row[slot], slot_of[row] = row, slot
            groups_of.setdefault(row[1], []).append(row[0])
            if sampling.do_sample:
                self.uniform[slot] = sampling.uniforms(generation.row_name(*row), generation.max_new_tokens)
            self.count[slot], self.ended[slot] = 0, False
        together: dict[tuple[int, ...], list[int]] = {}
        for prompt, groups in groups_of.items():
            together.setdefault(tuple(groups), []).append(prompt)
        ids = generation.subject.token_ids
        most_prompts = max(map(len, generation.plan.prefill.prompt_groups))
        most_groups = generation.plan.prefill.rows_per_block
        for groups, prompts in together.items():
            prompts.sort(key=lambda p: tuple(ids[p]))  # neighbours share the longest prefixes
            for some in _cut(prompts, most_prompts):
                for heads in _cut(groups, most_groups):
                    slots = np.array([[slot_of[g, p] for p in some] for g in heads])
                    self.decoder.prefill(
                        [ids[p] for p in some], [generation.groups[g] for g in heads], slots, self._take
                    )
        slots = np.array(sorted(slot_of.values()))
        self.decoder.started(slots, np.array([generation.same_prompt[self.row[s][1]] for s in slots]))

    def decode(self, more: bool) -> list[Decoded]:
        """Step until enough slots are free for more rows to come in, or all are done."""
        self._collect()
        enough = self.refill_at if more else len(self.row)
        with self.decoder.stepping():
            while self.running and sum(row is None for row in self.row) < enough:
                slots = np.array([slot for slot, row in enumerate(self.row) if row is not None])
                logits = self.decoder.step(slots, self.text[slots, self.count[slots] - 1])
                self._take(slots, logits)
                self._collect()
                self.bar.underway(int(self.count[[row is not None for row in self.row]].sum()))
        out, self.finished = self.finished, []
        return out

    def _take(self, slots: np.ndarray, logits: torch.Tensor) -> None:
        generation = self.generation
        count = self.count[slots]
        tokens = generation.sampling.choose(logits, self.uniform[slots, count])
        # The chosen logit is NaN or infinite if any is: NaN sorts first.
        chosen = logits.gather(-1, torch.as_tensor(tokens, device=logits.device)[:, None])[:, 0]
        if not bool(torch.isfinite(chosen).all()):
            slot = int(slots[int((~torch.isfinite(chosen)).nonzero()[0])])
            raise NotFinite(*self.row[slot], self.text[slot, : self.count[slot]].tolist())
        self.text[slots, count] = tokens
        self.count[slots] += 1
        self.ended[slots] = np.isin(tokens, list(generation.end_tokens))

    def _collect(self) -> None:
        """Rows that are done leave their slots."""
        limit = self.generation.max_new_tokens
        for slot, row in enumerate(self.row):
            if row is not None and (self.ended[slot] or self.count[slot] == limit):
                ended = bool(self.ended[slot])
                tokens = self.text[slot, : self.count[slot] - ended].tolist()
                self.finished.append(Decoded(*row, tokens, ended))
                self.bar.done()
                self.row[slot] = None


def _cut(items: Sequence, most: int) -> Iterator[Sequence]:
    for start in range(0, len(items), most):
        yield items[start : start + most]
