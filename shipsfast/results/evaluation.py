"""What an evaluation returns: labelled answers, attack success rates, and the control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..engine.heads import group_name
from ..errors import InputError
from ..runs.kinds import CONTROL, KINDS, LABELS, completion_rows, has_likelihoods, unablated_row
from ..runs.manifest import read_manifest
from ..runs.tables import read_scores
from .answer_sheet import Sheet, sheet_of
from .completions import MISSING, Completions
from .equality import Compared
from .evaluation_warnings import of_evaluation
from .groups import labels_of, rates_json, recorded
from .incoherence import limit_nats, mark
from .statistics import or_none, paired_difference, wilson_interval

if TYPE_CHECKING:
    import pandas as pd

KL_NAMES, KL = KINDS["evaluate"].index, "kl_nats"


@dataclass(repr=False, eq=False)
class EvalResult(Compared):
    """Labelled completions of G groups x P prompts.

    groups: (layer, head) pairs, [] for the unablated model; prompts: the texts; completions: labels, lengths, texts.
    unablated: the unablated model's, one row: that of the group [], or one that was answered beside the groups; None in runs of
    earlier versions without it.
    limit_nats: from which nll_nats on an answer is incoherent (incoherence.py), None where there is no such limit.
    ASR is the share of completions that are neither refusals nor degenerate (arXiv 2410.13708, section 3.3 and
    appendix B.3), and not incoherent either.
    """

    groups: list[list[tuple[int, int]]]
    prompts: list[str]
    completions: Completions
    control: Control | None = None
    record: dict = field(default_factory=dict, compare=False)
    identity: dict = field(default_factory=dict)
    unablated: Completions | None = None
    limit_nats: float | None = None

    @classmethod
    def of(
        cls, groups: list, prompts: list[str], rows: Completions, record: dict, identity: dict
    ) -> EvalResult:
        """rows: of the groups, and of the unablated model where none of them is."""
        at = unablated_row(identity)
        unablated = None if at is None else rows.rows(slice(at, at + 1))
        return cls(groups, prompts, rows.rows(slice(len(groups))), None, record, identity, unablated)

    def finish(self) -> None:
        """Tell which answers are incoherent, once they and the control's are there."""
        rule = self.identity.get("incoherent")
        own = [] if self.unablated is None else [self.unablated]
        if self.control is not None:
            own.append(self.control.completions.rows(slice(-1, None)))
        self.limit_nats = limit_nats(rule, own)
        for each in (self.completions, *([] if self.control is None else [self.control.completions])):
            mark(rule, self.limit_nats, each)

    def warnings(self) -> list[str]:
        """What must be known before the rates are believed, a plain sentence each."""
        return list(of_evaluation(self))

    def difference(self, confidence: float = 0.95) -> np.ndarray:
        """Each group's ASR less the unablated model's on the same prompts, and Newcombe's interval for paired rates: float64
        [G, 3], difference, low, high; NaN where there is nothing to compare."""
        out = np.full((len(self.groups), 3), np.nan)
        if self.unablated is None:
            return out
        own = self.unablated.label[0]
        for g, row in enumerate(self.completions.label):
            both = (row != MISSING) & (own != MISSING)
            out[g] = paired_difference(row[both] == 0, own[both] == 0, confidence)
        return out

    @property
    def perplexity(self) -> np.ndarray:
        """float64 [G]: of each group's answers under the unablated model, exp of the mean of nll_nats."""
        return self.completions.perplexity()

    @property
    def cut(self) -> np.ndarray:
        """float64 [G]: the share of answers that ran to the limit of tokens."""
        return self.completions.cut()

    def __repr__(self) -> str:
        rates = ", ".join(
            f"{group_name(g)}: {rate:.0%}" for g, rate in zip(self.groups[:4], self.asr, strict=False)
        )
        more = ", ..." if len(self.groups) > 4 else ""
        return f"EvalResult({len(self.groups)} groups x {len(self.prompts)} prompts, ASR {rates}{more})"

    @property
    def labels(self) -> list[list[str | None]]:
        """[G][P], None for rows not done."""
        return [[None if i == MISSING else LABELS[i] for i in row] for row in self.completions.label]

    @property
    def asr(self) -> np.ndarray:
        """float64 [G]: the share of each group's completions that complied."""
        return self.completions.share("complied")

    def share(self, label: str) -> np.ndarray:
        """float64 [G]: the share of one of the labels, such as "refusal"."""
        if label not in LABELS:
            raise InputError(f"unknown label {label!r}: expected one of {', '.join(LABELS)}")
        return self.completions.share(label)

    def interval(self, confidence: float = 0.95) -> np.ndarray:
        """Wilson score interval of each group's ASR, float64 [G, 2]; NaN where no row is done.

        It is about prompts like these, and counts none of what a judge gets wrong.
        """
        out = np.empty((len(self.groups), 2))
        for g, row in enumerate(self.completions.label):
            out[g] = wilson_interval((row == 0).sum(), (row != MISSING).sum(), confidence)
        return out

    def to_pandas(self) -> pd.DataFrame:
        """One row per completion: group, heads, prompt, label, num_tokens, finished, text_sha256, text."""
        frame = self.completions.frame()
        frame.insert(1, "heads", [group_name(self.groups[g]) for g in frame["group"]])
        return frame

    def summary(self) -> list[dict]:
        """One object per group, for JSON."""
        out = []
        differences = self.difference()
        for g, (low, high) in enumerate(self.interval()):
            row = {
                "heads": [list(head) for head in self.groups[g]],
                "asr": float(self.asr[g]),
                "asr_low": float(low),
                "asr_high": float(high),
                **dict(
                    zip(
                        ("difference", "difference_low", "difference_high"),
                        map(or_none, differences[g]),
                        strict=True,
                    )
                ),
                **{label: float(self.share(label)[g]) for label in LABELS[1:]},
                "cut": or_none(self.cut[g]),
                "perplexity": or_none(self.perplexity[g]),
            }
            if self.control is not None:
                row["control"] = {
                    "mean_kl_nats": float(self.control.mean_kl_nats[g]),
                    "degenerate": float(self.control.degenerate[g]),
                    "incoherent": float(self.control.incoherent[g]),
                    "perplexity": or_none(self.control.perplexity[g]),
                    "same_text": float(self.control.same[g]),
                }
            out.append(row)
        return out

    def by_group(self, labels: Sequence | None = None) -> pd.DataFrame:
        """The attack success rates by group of prompts: one row per group of heads and group of prompts: heads, group,
        prompts, asr, and its Wilson interval of 95 %, asr_low and asr_high. labels: as in `ShipsResult.by_group`."""
        import pandas as pd

        names = np.array(labels_of(self.record, self.completions.label.shape[1], labels)[1])
        rows = []
        for heads, labelled in zip(self.groups, self.completions.label, strict=True):
            for name in sorted(set(names)):
                own = labelled[names == name]
                trials, complied = int((own != MISSING).sum()), int((own == 0).sum())
                low, high = wilson_interval(complied, trials)
                rate = complied / trials if trials else np.nan
                rows.append((group_name(heads), str(name), trials, rate, low, high))
        return pd.DataFrame(rows, columns=["heads", "group", "prompts", "asr", "asr_low", "asr_high"])

    def view(self, path: str | Path) -> None:
        """Write the answers of all groups side by side: Markdown or a page of HTML, by the path's suffix."""
        from .pages import write

        write(self.sheet(), path)

    def sheet(self) -> Sheet:
        """What terminals and pages show of it."""
        return sheet_of(self)

    def show(self, top: int, console) -> None:
        """Print what each group of heads did, and what must be known before it is believed."""
        from .pages import show
        from .tables import show_rates

        show(self.sheet(), console)
        found = recorded(self.record)
        if found is not None:
            show_rates(self.by_group(), found[0], console)

    def show_answers(self, console=None) -> None:
        """Print all answers, whole."""
        from .pages import show_answers

        show_answers(self.sheet(), console)

    def as_json(self, top: int) -> dict:
        """What a program reads of it."""
        body = {"groups": self.summary(), "warnings": self.warnings(), "record": self.record}
        if self.unablated is not None:
            own = self.unablated
            body["unablated"] = {label: or_none(own.share(label)[0]) for label in LABELS} | {
                "cut": or_none(own.cut()[0]), "perplexity": or_none(own.perplexity()[0]),
                "limit_nats": self.limit_nats,
            }  # fmt: skip
        found = recorded(self.record)
        if found is not None:
            body["by_group"] = {"column": found[0], "rates": rates_json(self.by_group())}
        return body

    @classmethod
    def load(cls, folder: str | Path) -> EvalResult:
        """Read the run folder of `evaluate`; rows that were never reached have no label, and prompts are kept only
        with the answers, else they are empty."""
        folder = Path(folder)
        manifest = read_manifest(folder, "evaluate")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        groups = [[tuple(head) for head in group] for group in identity["groups"]]
        keep = identity["keep_text"]
        how = {"keep_text": keep, "likelihoods": has_likelihoods(identity)}
        completions = Completions(completion_rows(identity), len(identity["prompts"]), **how)
        completions.read(folder)
        prompts = manifest.pop("prompt_texts", None) or [""] * len(identity["prompts"])
        result = cls.of(groups, prompts, completions, manifest, identity)
        if identity["control"] is not None:
            shape = (len(groups), len(identity["control"]["prompts"]))
            rows = Completions(shape[0] + 1, shape[1], **how)
            rows.read(folder, CONTROL)
            result.control = Control(
                read_scores(folder, shape, KL_NAMES, KL), rows, identity["control"]["tokens"]
            )
        result.finish()
        return result


@dataclass(eq=False)
class Control(Compared):
    """Groups on ordinary prompts.

    kl_nats: float64 [G, P], KL(unablated || group off) of the next token, mean over the first `tokens` tokens of the
        unablated model's answer; completions: of the groups and, last, of the unablated model, labelled "degenerate",
        "incoherent" or "complied", which says no more than not that.
    """

    kl_nats: np.ndarray
    completions: Completions
    tokens: int

    @property
    def mean_kl_nats(self) -> np.ndarray:
        """float64 [G]"""
        return self.kl_nats.mean(1)

    @property
    def degenerate(self) -> np.ndarray:
        """float64 [G], share of the prompts"""
        return self.completions.share("degenerate")[:-1]

    @property
    def incoherent(self) -> np.ndarray:
        """float64 [G], share of the prompts"""
        return self.completions.share("incoherent")[:-1]

    @property
    def nonsense(self) -> np.ndarray:
        """float64 [G], share of the prompts: degenerate or incoherent"""
        return self.degenerate + self.incoherent

    @property
    def unablated_nonsense(self) -> float:
        """The same of the unablated model."""
        return float(sum(self.completions.share(label)[-1] for label in ("degenerate", "incoherent")))

    @property
    def perplexity(self) -> np.ndarray:
        """float64 [G]: of the answers, under the unablated model"""
        return self.completions.perplexity()[:-1]

    @property
    def same(self) -> np.ndarray:
        """float64 [G], share of the prompts answered word for word as by the unablated model, of those both answered;
        NaN where there is none. Draws differ by themselves."""
        sha256, done = self.completions.sha256, self.completions.label != MISSING
        both = done[:-1] & done[-1]
        count = both.sum(1)
        return ((sha256[:-1] == sha256[-1]) & both).sum(1) / np.where(count, count, np.nan)
