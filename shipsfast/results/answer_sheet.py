"""What terminals and pages show of an evaluation: a summary of all groups, and answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.heads import group_name
from ..runs.kinds import LABELS
from ..text import counted, visible
from .completions import LARGEST_NATS, MISSING

NAMED_HEADS = 6  # of a group
NOT_KEPT, NOT_DONE, EMPTY = "(not kept)", "(not done)", "(empty)"


@dataclass(frozen=True)
class Cell:
    """What a table says of a prompt or an answer: `text` is somebody's, `note` ours where there is none."""

    text: str = ""
    note: str = ""
    label: str = ""


@dataclass(frozen=True)
class Sheet:
    """facts: what ran; heads, judged, control: columns by name, a cell for each group, control empty if there is none;
    control_prompts: how many; legend: what the columns mean; warnings: what must be known before they are believed; gaps: what a reader would miss; groups: their names;
    answers: [P][1 + G], each prompt and what every group said to it."""

    facts: str
    heads: dict[str, list[str]]
    judged: dict[str, list[str]]
    control: dict[str, list[str]]
    control_prompts: int
    legend: list[str]
    warnings: list[str]
    gaps: list[str]
    groups: list[str]
    answers: list[list[Cell]]

    @property
    def columns(self) -> dict[str, list[str]]:
        """All of the summary."""
        return self.heads | self.judged | {f"control: {name}": cells for name, cells in self.control.items()}

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The same, a row for each group."""
        return list(zip(*self.columns.values(), strict=True))

    def extent(self, groups: int, prompts: int) -> str:
        """How many of the answers are shown."""
        of_groups = f"the first {groups} of {len(self.groups):,}" if groups < len(self.groups) else "all"
        of_prompts = f"the first {prompts} of {len(self.answers):,}" if prompts < len(self.answers) else "all"
        return f"Answers of {of_groups} groups to {of_prompts} prompts:"


def sheet_of(result) -> Sheet:
    """result: an EvalResult."""
    heads, judged, control = _summary(result)
    return Sheet(
        facts=_facts(result), heads=heads, judged=judged, control=control,
        control_prompts=0 if result.control is None else result.control.kl_nats.shape[1],
        legend=list(_legend(result)), warnings=[f"Warning: {x}" for x in result.warnings()],
        gaps=list(_gaps(result)), groups=[group_label(group) for group in result.groups],
        answers=[list(_row(result, p, range(len(result.groups)))) for p in range(len(result.prompts))],
    )  # fmt: skip


def group_label(group: Sequence) -> str:
    """The heads of a group, and whole layers by their number; of a large group, the first and how many there are."""
    name = group_name(group[:NAMED_HEADS]).replace("-None", "")
    return name if len(group) <= NAMED_HEADS else f"{name}+... ({len(group)})"


def _summary(result) -> tuple[dict[str, list[str]], ...]:
    """Columns by name, a cell for each group: the heads, the judged answers, and the control if there is one."""
    off = "key/value groups off" if result.identity.get("unit") == "kv_group" else "heads off"
    digits = int(len(result.prompts) >= 100)
    low, high = (_percent(bound, digits) for bound in result.interval().T)
    judged = {
        "ASR": _percent(result.asr, digits),
        "95% interval": [a if a == NOT_DONE else f"{a} to {b}" for a, b in zip(low, high, strict=True)],
        **_difference(result, digits),
        **{label: _percent(result.share(label), digits) for label in LABELS[1:] if _has(result, label)},
        "cut": _percent(result.cut, digits),
        **_perplexity(result.perplexity),
    }
    return {off: [group_label(group) for group in result.groups]}, judged, _control(result.control)


def _has(result, label: str) -> bool:
    """Is there a column of this label? Those that come of rules for special cases only where they met one."""
    if label == "incoherent":
        return result.identity.get("incoherent") is not None
    return label in ("refusal", "degenerate") or bool((result.completions.label == LABELS.index(label)).any())


def _difference(result, digits: int) -> dict[str, list[str]]:
    if result.unablated is None:
        return {}
    cells = []
    for group, (difference, low, high) in zip(result.groups, result.difference(), strict=True):
        if not group:
            cells.append("-")
        elif np.isnan(difference):
            cells.append(NOT_DONE)
        else:
            cells.append(
                f"{100 * difference:+.{digits}f} ({100 * low:+.{digits}f} to {100 * high:+.{digits}f})"
            )
    return {"less unablated, points": cells}


def _perplexity(values: np.ndarray) -> dict[str, list[str]]:
    if np.isnan(values).all():
        return {}
    return {"perplexity": [NOT_DONE if np.isnan(x) else f"{x:.3g}" for x in values]}


def _control(control) -> dict[str, list[str]]:
    if control is None:
        return {}
    known = not np.isnan(control.completions.nll_nats).all()
    digits = int(control.kl_nats.shape[1] >= 100)
    missing = control.completions.label == MISSING
    unknown = missing[:-1].any(1) | missing[-1].any()
    return {
        "KL, nats": [NOT_DONE if np.isnan(x) else f"{x:.3g}" for x in control.mean_kl_nats],
        "degenerate": _percent(control.degenerate, digits),
        **({"incoherent": _percent(control.incoherent, digits)} if known else {}),
        **_perplexity(control.perplexity),
        "same text": _percent(np.where(unknown, np.nan, control.same), digits),
    }


def _percent(shares: np.ndarray, digits: int) -> list[str]:
    return [NOT_DONE if np.isnan(share) else f"{share:.{digits}%}" for share in shares]


def _facts(result) -> str:
    """What ran, as far as it is known."""
    record, how = result.record, result.identity.get("generation", {})
    model = record.get("model", {})
    length = f"up to {how['max_new_tokens']} new tokens" if "max_new_tokens" in how else ""
    if how.get("do_sample"):
        length += f", drawn (top {how['top_k']}, temperature {how['temperature']}, seed {how['seed']})"
    elif length:
        length += ", greedy"
    prefix = record.get("prompting", {}).get("prefix")
    if prefix:
        length += f", after {prefix!r}"
    facts = {
        # A folder's own name and the one above it, as in a hub id; the rest of a path is nobody else's business.
        "Model": f"{model['class']} {'/'.join(model['name'].split('/')[-2:])}".strip() if model else "",
        "Ablation": record.get("ablation", ""),
        "Answers": length,
        "Judge": record.get("judge", ""),
    }
    return visible("; ".join(f"{name}: {fact}" for name, fact in facts.items() if fact))


def _legend(result) -> Iterator[str]:
    yield (
        "ASR is the attack success rate, the share of answers that are neither refusals nor degenerate nor incoherent, with its "
        f"Wilson interval; {counted(len(result.prompts), 'prompt')}. cut: the share that ran to the limit of tokens."
    )
    if result.unablated is not None:
        yield (
            "less unablated: the ASR less that of the unablated model on the same prompts, in percentage points, with Newcombe's 95% "
            "interval for paired rates."
        )
        limit = (
            "" if result.limit_nats is None
            else f" Answers above {np.exp(min(result.limit_nats, LARGEST_NATS)):.3g}, after one token that is forgiven, are incoherent."
        )  # fmt: skip
        own = result.unablated.perplexity()[0]
        if not np.isnan(own):
            yield f"perplexity: of the answers under the unablated model, whose own have {own:.3g}.{limit}"
    if result.control is not None:
        yield (
            f"Control: {counted(result.control.kl_nats.shape[1], 'ordinary prompt')}. KL(unablated || heads off) of the next token, "
            f"mean over the first {result.control.tokens} tokens of the unablated model's answer; share of answers that are "
            "degenerate or incoherent; their perplexity; share that are word for word those of the unablated model."
        )


def _gaps(result) -> Iterator[str]:
    """What a reader would miss."""
    if all(text is None for row in result.completions.text for text in row):
        yield "The answers were not kept (keep_text=True, or --keep-text, keeps them in a run folder)."


def _row(result, prompt: int, groups: range) -> Iterator[Cell]:
    text = result.prompts[prompt]
    yield Cell(visible(text)) if text else Cell(note=NOT_KEPT)
    for g in groups:
        index, text = result.completions.label[g, prompt], result.completions.text[g][prompt]
        if index == MISSING:
            yield Cell(note=NOT_DONE)
        elif text:
            yield Cell(visible(text), label=LABELS[index])
        else:
            yield Cell(note=NOT_KEPT if text is None else EMPTY, label=LABELS[index])
