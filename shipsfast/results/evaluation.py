"""What an evaluation returns: labelled answers, attack success rates, and the control."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ..engine.heads import group_name
from ..errors import InputError
from ..runs.kinds import CONTROL, KINDS, LABELS
from ..runs.manifest import read_manifest
from ..runs.tables import read_scores
from .answer_sheet import Sheet, sheet_of
from .completions import MISSING, Completions
from .equality import Compared
from .statistics import wilson_interval

KL_NAMES, KL = KINDS["evaluate"].index, "kl_nats"


@dataclass(repr=False, eq=False)
class EvalResult(Compared):
    """Labelled completions of G groups x P prompts.

    groups: (layer, head) pairs, [] for the unablated model; prompts: the texts; completions: labels, lengths, texts.
    ASR is the share of completions that are neither refusals nor degenerate (arXiv 2410.13708, section 3.3 and
    appendix B.3).
    """

    groups: list[list[tuple[int, int]]]
    prompts: list[str]
    completions: Completions
    control: Control | None = None
    record: dict = field(default_factory=dict, compare=False)
    identity: dict = field(default_factory=dict)

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
        """float64 [G]: the share of "complied", "refusal" or "degenerate"."""
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
        for g, (low, high) in enumerate(self.interval()):
            row = {
                "heads": [list(head) for head in self.groups[g]],
                "asr": float(self.asr[g]),
                "asr_low": float(low),
                "asr_high": float(high),
                **{label: float(self.share(label)[g]) for label in ("refusal", "degenerate")},
            }
            if self.control is not None:
                row["control"] = {
                    "mean_kl_nats": float(self.control.mean_kl_nats[g]),
                    "degenerate": float(self.control.degenerate[g]),
                    "same_text": float(self.control.same[g]),
                }
            out.append(row)
        return out

    def view(self, path: str | Path) -> None:
        """Write the answers of all groups side by side: Markdown or a page of HTML, by the path's suffix."""
        from .pages import write

        write(self.sheet(), path)

    def sheet(self) -> Sheet:
        """What terminals and pages show of it."""
        return sheet_of(self)

    def show(self, top: int, console) -> None:
        """Print what each group of heads did, and some answers."""
        from .pages import show

        show(self.sheet(), console)

    def as_json(self, top: int) -> dict:
        """What a program reads of it."""
        return {"groups": self.summary(), "record": self.record}

    @classmethod
    def load(cls, folder: str | Path) -> EvalResult:
        """Read the run folder of `evaluate`; rows that were never reached have no label, and prompts are kept only
        with the answers, else they are empty."""
        folder = Path(folder)
        manifest = read_manifest(folder, "evaluate")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        groups = [[tuple(head) for head in group] for group in identity["groups"]]
        keep = identity["keep_text"]
        completions = Completions(len(groups), len(identity["prompts"]), keep_text=keep)
        completions.read(folder)
        control = None
        if identity["control"] is not None:
            shape = (len(groups), len(identity["control"]["prompts"]))
            rows = Completions(shape[0] + 1, shape[1], keep_text=keep)
            rows.read(folder, CONTROL)
            control = Control(read_scores(folder, shape, KL_NAMES, KL), rows, identity["control"]["tokens"])
        prompts = manifest.pop("prompt_texts", None) or [""] * len(identity["prompts"])
        return cls(groups, prompts, completions, control, manifest, identity)


@dataclass(eq=False)
class Control(Compared):
    """Groups on ordinary prompts.

    kl_nats: float64 [G, P], KL(unablated || group off) of the next token, mean over the first `tokens` tokens of the
        unablated model's answer; completions: of the groups and, last, of the unablated model, labelled "degenerate" or
        "complied", which says no more than not that.
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
    def same(self) -> np.ndarray:
        """float64 [G], share of the prompts answered word for word as by the unablated model, of those both answered;
        NaN where there is none. Draws differ by themselves."""
        sha256, done = self.completions.sha256, self.completions.label != MISSING
        both = done[:-1] & done[-1]
        count = both.sum(1)
        return ((sha256[:-1] == sha256[-1]) & both).sum(1) / np.where(count, count, np.nan)
