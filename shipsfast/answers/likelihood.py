"""How likely the unablated model finds answers, whichever heads were off when they were given.

    nll_nats = -(sum_t log p(token t | prompt, tokens before t) + log p(end | prompt, all tokens)) / n

log p is the unablated model's, without temperature and top_k; its softmax is taken in float32, or in float64 for such a
model. p(end) is that of all tokens that end a text, and counts for answers that ended by one; n is the number of terms. So
exp(nll_nats) is the perplexity of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..engine.decoder import Decoded
from ..engine.memory_plan import HEAD_BYTES
from ..errors import UnsupportedModelError
from ..memory import once_more
from ..models.anatomy import LOGIT_COPIES
from ..models.forward import plain_pass
from .generation import Generation

DIGITS = 6  # of nll_nats


class Likelihood:
    """Of the answers of one generation, from plain forward passes of the model itself. Equal answers to equal prompts are
    looked at once: most heads change few answers."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._known: dict[tuple, float] = {}

    def of(self, rows: Sequence[Decoded]) -> list[float]:
        """nll_nats of each row. Raises UnsupportedModelError where it is no number."""
        new = list({key: row for row in rows if (key := self._key(row)) not in self._known}.values())
        new.sort(key=self._length)
        for some in self._batches(new):

            def each_alone(some=some):
                return [self._pass([row])[0] for row in some]

            found = once_more(
                "taking the likelihood of answers", lambda some=some: self._pass(some), each_alone
            )
            self._known |= zip(map(self._key, some), found, strict=True)
        return [self._known[self._key(row)] for row in rows]

    def _key(self, row: Decoded) -> tuple:
        return self.generation.same_prompt[row.prompt], np.array(row.tokens).tobytes(), row.finished

    def _length(self, row: Decoded) -> int:
        return len(self.generation.subject.token_ids[row.prompt]) + len(row.tokens)

    def _batches(self, rows: list[Decoded]) -> list[list[Decoded]]:
        """rows: by length. A batch has as many as keep its logits small. Layers that know of no mask get one row each."""
        anatomy = self.generation.subject.anatomy
        limit = self.generation.plan.prefill.memory_limit_bytes // (4 * LOGIT_COPIES)
        batches: list[list[Decoded]] = []
        for row in rows:
            size = self._length(row) * anatomy.vocab_size * 4
            if (
                not batches
                or anatomy.plain_sequences
                or (len(batches[-1]) + 1) * size > min(limit, HEAD_BYTES)
            ):
                batches.append([])
            batches[-1].append(row)
        return batches

    @torch.inference_mode()
    def _pass(self, rows: list[Decoded]) -> list[float]:
        subject = self.generation.subject
        ids = [[*subject.token_ids[row.prompt], *row.tokens] for row in rows]
        longest = max(map(len, ids))
        # Filled up on the right, where no token before can look.
        logits = plain_pass(subject.model, [[*each, *each[-1:] * (longest - len(each))] for each in ids])
        return [self._nll(row, own) for row, own in zip(rows, logits, strict=True)]

    def _nll(self, row: Decoded, logits: torch.Tensor) -> float:
        first = len(self.generation.subject.token_ids[row.prompt]) - 1
        own = logits[first : first + len(row.tokens) + row.finished]
        log_p = torch.log_softmax(own.double() if own.dtype == torch.float64 else own.float(), -1)
        tokens = torch.tensor(row.tokens, dtype=torch.long, device=log_p.device)
        terms = log_p.gather(-1, tokens[:, None])[:, 0] if row.tokens else log_p.new_empty(0)
        if row.finished:
            ends = torch.tensor(sorted(self.generation.end_tokens), device=log_p.device)
            terms = torch.cat([terms, log_p[-1].index_select(0, ends).logsumexp(0)[None]])
        nll = -float(terms.double().mean())
        if not math.isfinite(nll):
            raise UnsupportedModelError(
                f"the unablated model's likelihood of an answer to prompt {row.prompt} is not a number: repair the weights, "
                "or use a wider dtype"
            )
        # -0.0, and what rounding leaves above a probability of 1. Digits that depend on the batch say nothing.
        return max(0.0, round(nll, DIGITS))
