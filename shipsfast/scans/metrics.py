"""What a scan measures: how far the ablated next-token logits are from the base ones, one number a row.

    kl, reverse_kl, js, total_variation   divergences of the next-token distributions (ops/divergences.py)
    logit_diff(token_a, token_b)          change of logit(token_a) - logit(token_b)
    refusal_logit(tokens)                 change of the log-odds that the next token is one of `tokens`
    log_prob, prob, log_prob_diff, ...    of the answer's own token (answer_metrics.py)
    a callable                            (base_logits [P, V], ablated_logits [N, V], prompt_index [N]) -> [N]
    projection, probe                     of hidden states, behind a decoder layer (hidden_metrics.py)

`as_metric` makes a Metric of any of these, `parse_metric` of the command line's text.
"""

from __future__ import annotations

import contextlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType

import torch

from ..errors import InputError, from_digits
from ..ops import divergences
from ..ops.divergences import DIVERGENCES, check_rows, divergence_rows
from .functions import function_name, has_name, real_numbers

Token = int | str
_DIVERGENCE_LABELS = {
    "kl": "KL(base || ablated)",
    "reverse_kl": "KL(ablated || base)",
    "js": "Jensen-Shannon divergence",
    "total_variation": "total variation distance",
}
_TEXT_FORMS = "logit_diff:TOKEN_A,TOKEN_B, refusal_logit:TOKEN,TOKEN,... or projection:FILE[,LAYER]"
_LIVE_LOG_ODDS_ARRAYS = 4  # float64 arrays of a chunk's size that _log_odds holds at once


class Metric(ABC):
    """One number per ablated row of logits.

    name, label       what it is called in results, and in plots and tables
    unit              "nats", "logits" or "", without unit or unknown
    signed            whether scores have a sign: heads are then ranked by size
    sees_all_prompts  whether `rows` wants the base rows of every prompt, in order
    is_named          whether describe() tells it from any other metric
    of_answers        whether it is of the answers' own tokens (answer_metrics.py): it has `scores` in the place of `rows`
    layer             None, or the decoder layer behind which `rows` wants hidden states [., hidden] in the place of logits
    """

    name: str
    label: str
    unit: str = ""
    signed: bool = True
    sees_all_prompts: bool = False
    is_named: bool = True
    of_answers: bool = False
    layer: int | None = None

    @abstractmethod
    def describe(self) -> dict:
        """What identifies the metric, for JSON."""

    @abstractmethod
    def rows(
        self, base_logits: torch.Tensor, ablated_logits: torch.Tensor, row_map: torch.Tensor
    ) -> torch.Tensor:
        """Scores float64 [N] on the logits' device, of ablated [N, V] against base [P, V] rows row_map [N].

        Raises InputError for arguments that kl_rows refuses, tokens that V does not hold, tokens still to be
        resolved (as_metric does it), and a callable that does not return N real numbers.
        """

    def resolve(self, tokenizer=None, vocab_size: int | None = None) -> Metric:
        """The same metric with tokens as ids, checked against vocab_size."""
        return self

    def to_text(self) -> str:
        """The text that parse_metric makes this metric of. Raises InputError if there is none."""
        raise InputError(
            f"metric {self.name} is a function of this process: only metrics with a name can be sent elsewhere"
        )


def measure_rows(
    metrics: Sequence[Metric], base_logits: torch.Tensor, ablated_logits: torch.Tensor, row_map: torch.Tensor
) -> list[torch.Tensor]:
    """`rows` of several metrics; all divergences among them come from one read of the logits."""
    names = [m.name for m in metrics if isinstance(m, _Divergence)]
    read = iter(divergence_rows(base_logits, ablated_logits, row_map, names=names)) if names else iter(())
    return [
        next(read) if isinstance(m, _Divergence) else m.rows(base_logits, ablated_logits, row_map)
        for m in metrics
    ]


@dataclass(frozen=True)
class _Divergence(Metric):
    name: str
    signed = False

    @property
    def label(self) -> str:
        return _DIVERGENCE_LABELS[self.name]

    @property
    def unit(self) -> str:
        return "" if self.name == "total_variation" else "nats"

    def describe(self) -> dict:
        return {"name": self.name}

    def to_text(self) -> str:
        return self.name

    def rows(
        self, base_logits: torch.Tensor, ablated_logits: torch.Tensor, row_map: torch.Tensor
    ) -> torch.Tensor:
        return divergence_rows(base_logits, ablated_logits, row_map, names=[self.name])[0]


@dataclass(frozen=True)
class _TokenMetric(Metric):
    """A value of each row's logits, of which the change from base to ablated is the score."""

    tokens: tuple[Token, ...]
    # The tokens as they were given, for the label.
    written: tuple[Token, ...] = field(default=(), compare=False)
    kind = ""
    unit = "logits"

    def __post_init__(self) -> None:
        """What can be checked without a tokenizer and a vocabulary."""

    @abstractmethod
    def values(self, logits: torch.Tensor) -> torch.Tensor:
        """Float64 [R] of logits [R, V]."""

    @property
    def name(self) -> str:
        return f"{self.kind}({', '.join(map(repr, self.tokens))})"

    def describe(self) -> dict:
        return {"name": self.kind, "tokens": list(self.tokens)}

    def to_text(self) -> str:
        text = f"{self.kind}:{','.join(map(str, self.tokens))}"
        with contextlib.suppress(InputError):  # a text with a comma is several tokens, or one too many
            if parse_metric(text) == self:
                return text
        raise InputError(f"metric {self.name} cannot be written as text: give its tokens as ids")

    def resolve(self, tokenizer=None, vocab_size: int | None = None) -> Metric:
        ids = tuple(self._token_id(token, tokenizer) for token in self.tokens)
        metric = replace(self, tokens=ids, written=self.written or self.tokens)
        if vocab_size is not None:
            metric.check_vocab(vocab_size)
        return metric

    def check_vocab(self, vocab_size: int) -> None:
        for token in self.tokens:
            if token >= vocab_size:
                raise InputError(
                    f"{self.name}: expected token ids below the vocabulary's {vocab_size}, got {token}"
                )

    def rows(
        self, base_logits: torch.Tensor, ablated_logits: torch.Tensor, row_map: torch.Tensor
    ) -> torch.Tensor:
        check_rows(base_logits, ablated_logits, row_map)
        if any(isinstance(token, str) for token in self.tokens):
            raise InputError(
                f"{self.name} has tokens as text: resolve them with as_metric(metric, tokenizer)"
            )
        self.check_vocab(base_logits.shape[1])
        row_map = row_map.to(device=base_logits.device, dtype=torch.int64)
        base = self.values(base_logits.detach())
        in_range = (row_map >= 0) & (row_map < len(base))  # checked above, unless row_map is on a GPU
        change = self.values(ablated_logits.detach()) - base[torch.where(in_range, row_map, 0)]
        return change.masked_fill_(~in_range, torch.nan)

    def _token_id(self, token: Token, tokenizer) -> int:
        if not isinstance(token, str):
            return token
        if tokenizer is None:
            raise InputError(
                f"{self.name} has a token as text, {token!r}: pass the model's tokenizer, or an id"
            )
        ids = list(tokenizer(token, add_special_tokens=False)["input_ids"])
        if len(ids) != 1:
            names = f": {tokenizer.convert_ids_to_tokens(ids)}, ids {ids}" if ids else ""
            raise InputError(
                f"{self.name}: {token!r} is {len(ids)} tokens of this tokenizer{names}; expected one: choose "
                "another text, mind its leading space, or give an id"
            )
        return int(ids[0])


class _LogitDiff(_TokenMetric):
    kind = "logit_diff"

    @property
    def label(self) -> str:
        a, b = self.written or self.tokens
        return f"change of logit({a!r}) - logit({b!r})"

    def __post_init__(self) -> None:
        a, b = self.tokens
        if a == b:
            raise InputError(f"logit_diff: token_a and token_b are the same, {a!r}: give two")

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        a, b = logits[:, list(self.tokens)].double().unbind(dim=1)
        return a - b


class _RefusalLogit(_TokenMetric):
    kind = "refusal_logit"

    @property
    def label(self) -> str:
        return "change of log-odds of refusal tokens"

    def describe(self) -> dict:
        return {"name": self.kind, "tokens": sorted(self.tokens, key=str)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(dict.fromkeys(self.tokens)))  # a token counts once

    def check_vocab(self, vocab_size: int) -> None:
        super().check_vocab(vocab_size)
        if len(self.tokens) >= vocab_size:
            raise InputError(
                f"refusal_logit: the tokens are the whole vocabulary of {vocab_size}: give fewer"
            )

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        rows = max(1, divergences.SCRATCH_BYTES // (_LIVE_LOG_ODDS_ARRAYS * 8 * logits.shape[1]))
        chunks = [_log_odds(chunk, list(self.tokens)) for chunk in logits.split(rows)]
        return torch.cat(chunks)


@dataclass(frozen=True)
class _Custom(Metric):
    function: Callable
    sees_all_prompts = True

    @property
    def is_named(self) -> bool:
        return has_name(self.function)

    @property
    def name(self) -> str:
        return function_name(self.function)

    @property
    def label(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    def describe(self) -> dict:
        return {"name": "callable", "function": self.name}

    def rows(
        self, base_logits: torch.Tensor, ablated_logits: torch.Tensor, row_map: torch.Tensor
    ) -> torch.Tensor:
        check_rows(base_logits, ablated_logits, row_map)
        returned = self.function(base_logits, ablated_logits, row_map)
        scores = real_numbers(returned, len(row_map), f"metric {self.name}")
        return scores.to(device=ablated_logits.device, dtype=torch.float64)


def logit_diff(token_a: Token, token_b: Token) -> Metric:
    """(logit_a - logit_b) of the ablated model less the same of the base model, in logits, in float64.

    Positive where ablation moves the next token from token_b towards token_a; NaN where both logits are -inf.
    Tokens are ids, or text that is one token of the model's tokenizer.
    Raises InputError for what is neither, and for twice the same token.
    """
    return _LogitDiff((_as_token(token_a, "logit_diff"), _as_token(token_b, "logit_diff")))


def refusal_logit(tokens: Iterable[Token]) -> Metric:
    """log(sum_R p) - log(1 - sum_R p) of the ablated model less the same of the base model, for the tokens R with
    which refusals begin: the refusal metric of arXiv 2406.11717, in logits (log-odds), in float64.

    Computed as logsumexp over R less logsumexp over the rest, so that it does not round to 0 or infinity. Rows
    with NaN, +inf, or nothing but -inf give NaN. Tokens are ids, or text that is one token of the model's
    tokenizer; repeated ones count once.
    Raises InputError for what is neither, and for no tokens.
    """
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise InputError(f"refusal_logit: expected a list of tokens, got {tokens!r}: write [{tokens!r}]")
    chosen = tuple(_as_token(token, "refusal_logit") for token in tokens)
    if not chosen:
        raise InputError("refusal_logit: expected at least one token, got none")
    return _RefusalLogit(chosen)


def as_metric(metric: str | Metric | Callable, tokenizer=None, vocab_size: int | None = None) -> Metric:
    """A Metric, with its tokens as ids.

    metric      a name ("kl", "reverse-kl" as well as "reverse_kl", ...) or other text for parse_metric, a Metric,
                or a callable on (base_logits [P, V], ablated_logits [N, V], prompt_index int64 [N]) that
                returns N real numbers, a tensor or an array. It sees logits on the model's device, float32 for
                half-precision models.
    tokenizer   of the model; needed where tokens are text
    vocab_size  of the model; token ids are checked against it where it is given

    A callable is identified by its module and name, nothing else; one without (lambda, partial, inner function,
    object) cannot be used with a run folder.
    Raises InputError for anything else, for text that is not one token, and for ids outside the vocabulary.
    """
    if isinstance(metric, str):
        metric = parse_metric(metric)
    elif isinstance(metric, FunctionType) and metric in _makers():
        raise InputError(
            f"metric {metric.__name__} is not called yet: give it {_makers()[metric]}, {metric.__name__}(...)"
        )
    elif not isinstance(metric, Metric) and callable(metric):
        metric = _Custom(metric)
    if not isinstance(metric, Metric):
        raise InputError(
            f"metric {metric!r}: expected one of {', '.join(_names())}, logit_diff(token_a, token_b), "
            "refusal_logit(tokens), projection(direction), probe(weights, layer) or a callable"
        )
    return metric.resolve(tokenizer, vocab_size)


def _names() -> dict[str, type[Metric]]:
    """Metrics that are a name and nothing else."""
    from .answer_metrics import LABELS, AnswerMetric  # it imports this file

    return dict.fromkeys(DIVERGENCES, _Divergence) | dict.fromkeys(LABELS, AnswerMetric)


def _makers() -> dict[Callable, str]:
    """Functions that make a metric, and of what."""
    from .hidden_metrics import probe, projection  # it imports this file

    return {logit_diff: "tokens", refusal_logit: "tokens", projection: "a direction", probe: "weights"}


def as_metrics(given, tokenizer=None, vocab_size: int | None = None) -> list[Metric]:
    """Metrics that are measured together: `given` is what as_metric takes, or a list of it. Raises InputError."""
    many = list(given) if isinstance(given, (list, tuple)) else [given]
    metrics = [as_metric(each, tokenizer, vocab_size) for each in many]
    if not metrics:
        raise InputError("there are no metrics: give at least one, such as 'kl'")
    names = [each.name for each in metrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"two metrics are called {twice}: name each metric once, and directions of one file name apart (name=)"
        )
    return metrics


def parse_metric(text: str) -> Metric:
    """A Metric from text: "kl", "logit_diff:12,7", "refusal_logit:Sorry,I", "projection:refusal.safetensors,12".

    After the colon come the tokens, with commas between, or the file of a direction and, if it is to be another than the
    direction's own, the layer. Digits only are an id; anything else is text, taken as it
    is, spaces included, and resolved by as_metric. Text of digits or with a comma needs the Python functions.
    Raises InputError for anything else.
    """
    kind, colon, rest = text.partition(":")
    kind = kind.replace("-", "_")
    if kind in _names() and not colon:
        return _names()[kind](kind)
    if kind == "projection":
        from .hidden_metrics import parse_projection  # it imports this file

        return parse_projection(text, rest)
    if kind not in ("logit_diff", "refusal_logit"):
        raise InputError(f"unknown metric {text!r}: expected {', '.join(_names())}, {_TEXT_FORMS}")
    tokens = [from_digits(part) if part.isascii() and part.isdigit() else part for part in rest.split(",")]
    if "" in tokens or (kind == "logit_diff" and len(tokens) != 2):
        raise InputError(f"metric {text!r}: expected {', '.join(_names())}, {_TEXT_FORMS}")
    return logit_diff(*tokens) if kind == "logit_diff" else refusal_logit(tokens)


def _as_token(token: Token, kind: str) -> Token:
    if isinstance(token, str) and token:
        return token
    try:
        token_id = operator.index(token)
    except TypeError:
        token_id = -1
    if isinstance(token, bool) or token_id < 0:
        raise InputError(f"{kind}: token {token!r}: expected a token id from 0, or a token's text")
    return token_id


def _log_odds(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """log(sum_R p) - log(1 - sum_R p) for p = softmax(logits [R, V]), float64 [R]."""
    x = logits.to(torch.float64, copy=True)
    x.sub_(x.amax(dim=1, keepdim=True))  # NaN in a row with NaN, +inf, or nothing but -inf
    inside = x[:, tokens].logsumexp(dim=1)
    x[:, tokens] = -torch.inf
    return inside - x.logsumexp(dim=1)
