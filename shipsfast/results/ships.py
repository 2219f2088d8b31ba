"""What the scans return: the results of scans of the next token here, those of searches from subspace.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..runs.identity import beside, control_of
from ..runs.kinds import CONTROL, read_counts
from ..runs.manifest import ABLATIONS, FURTHER, MANIFEST, read_manifest
from ..runs.part_file import inside
from ..runs.tables import read_scores, score_frame
from ..text import counted
from .bootstrap import RankStability, rank_stability
from .by_ablation import ByAblation
from .cells import cells_of
from .groups import GroupedScores, labels_of, recorded
from .head_map import Ranked, save_scores
from .statistics import paired_difference, wilson_interval

if TYPE_CHECKING:
    import pandas as pd

MARKED = "nonfinite"  # what run.json says of marked scores
KL = {"name": "kl", "unit": "nats", "signed": False, "label": "KL(base || head ablated)"}


@dataclass(repr=False, eq=False)
class ShipsResult(ByAblation, Ranked):
    """Ships of every head and prompt (arXiv 2410.13708, eq. 9), or another metric in its place.

    scores: float64 [P, L, H]; NaN for heads not scanned. For the metric "kl" they are KL(p(base) || p(head
        ablated)) of the next token in nats, and `.kl` is another name for them.
    noise_floor: what packing, chunking and rounding alone make of a score (results/score_error.py has the definition);
        scores at or under it cannot be told from zero.
    error: a `ScoreError`, how far scores are off: a sample of them, computed again in a wider dtype.
    record: what really ran: model, ablation, precision, backend, versions, device, plan, timings.
    also: the results of further metrics of the same scan, by their names.
    marked: bool [P, L, H], scores that are NaN because they were not finite (`scan(nonfinite="mark")`), or None where
        there are none. A head with one of them has no mean, and is in no ranking.
    tokens: float64 [P, most of any prompt, L, H], NaN behind a prompt's last: scores of every token of an answer, or of every
        position that was read, of which `scores` are the means; None where each prompt is read behind its last token.
        `by_token` has them without the padding. marked_tokens: bool of that shape, as `marked`.
    control: the same scan of the control prompts (`scan(control=...)`), or None.
    further: the results of further ablations of the same scan, which `by_ablation` has by their names.
    """

    scores: np.ndarray
    noise_floor: float = 0.0
    record: dict = field(default_factory=dict, compare=False)
    identity: dict = field(default_factory=dict)
    also: dict[str, ShipsResult] = field(default_factory=dict)
    marked: np.ndarray | None = None
    tokens: np.ndarray | None = None
    marked_tokens: np.ndarray | None = None
    control: ShipsResult | None = None
    further: tuple[ShipsResult, ...] = ()

    @classmethod
    def of_reads(
        cls,
        scores: np.ndarray,
        floor: float,
        record: dict,
        identity: dict,
        also: dict,
        marked: np.ndarray | None,
    ) -> ShipsResult:
        """Of scores, and marks or None, [M, L, H] by reads."""
        at = cells_of(identity)
        if not at.counts:
            return cls(scores, floor, record, identity, also, marked)
        starts = np.cumsum([0, *at.counts])[:-1]
        mean = np.add.reduceat(scores, starts) / np.reshape(at.counts, (-1, 1, 1))
        of_tokens = None if marked is None else at.padded(marked, False)
        if marked is not None:
            marked = np.logical_or.reduceat(marked, starts)
        return cls(mean, floor, record, identity, also, marked, at.padded(scores, np.nan), of_tokens)

    @property
    def by_token(self) -> np.ndarray | list[np.ndarray]:
        """Scores of every token that was read, float64 [P, A, L, H]; where prompts have different numbers of them, a list with
        [A, L, H] for each prompt."""
        if self.tokens is None:
            return self.scores[:, None]
        counts = cells_of(self.identity).counts
        if len(set(counts)) == 1:
            return self.tokens
        return [each[:count] for each, count in zip(self.tokens, counts, strict=True)]

    def plot_tokens(
        self,
        prompt: int = 0,
        path: str | Path | None = None,
        *,
        k: int = 10,
        texts: Sequence[str] | None = None,
    ):
        """Scores of the k best heads of the ranking at every token that was read of one prompt, heads x tokens. prompt: from 0;
        texts: of these tokens, as the axis shows them; default their numbers. Returns the matplotlib Figure; saved if a path is
        given."""
        if self.tokens is None:
            raise InputError(
                "each prompt was read behind its last token only: plot_tokens is for answers, or several positions"
            )
        if not 0 <= prompt < len(self.scores):
            raise InputError(
                f"there is no prompt {prompt}: the run has {counted(len(self.scores), 'prompt')}, from 0"
            )
        from .plots import by_token

        own, top = self.by_token[prompt], self.top(k)
        texts = [str(number) for number in range(len(own))] if texts is None else list(texts)
        if len(texts) != len(own):
            raise InputError(
                f"prompt {prompt} was read at {counted(len(own), 'token')}, and {len(texts)} texts are given"
            )
        scores = np.array([own[:, each.layer, each.head] for each in top])
        names = [f"{each.layer}-{each.head}" for each in top]
        title = f"prompt {prompt}, {self.record.get('ablation', '')}"
        return by_token(scores, names, texts, self.label, title, self.signed, path)

    def reads_in_words(self) -> str:
        """How many prompts, and what of them was read."""
        prompts, counts = counted(self.scores.shape[0], "prompt"), read_counts(self.identity)
        if "answer_tokens" in self.identity:
            return f"{prompts} with answers of {counted(sum(counts), 'token')} in all"
        return prompts + (f" read at {counted(sum(counts), 'position')} in all" if counts else "")

    @property
    def marked_heads(self) -> list[tuple[int, int]]:
        """Heads with a marked score, which are in no ranking."""
        return heads_of(self.marked)

    def marks(self) -> dict:
        """count, heads and the first mark with its reason, for JSON; empty where no score is marked."""
        return marks_of(self.marked, self.record)

    @property
    def metric(self) -> dict:
        """name, unit, signed and label of what was measured."""
        return self.record.get("metric", KL)

    @property
    def kl(self) -> np.ndarray:
        if self.metric["name"] != "kl":
            raise InputError(f"this scan measured {self.metric['name']}: its numbers are in .scores")
        return self.scores

    @property
    def signed(self) -> bool:
        return self.metric["signed"]

    @property
    def is_rate(self) -> bool:
        return self.metric["name"] == "asr"

    @property
    def floor_name(self) -> str:
        return self.metric.get("floor", super().floor_name)

    @property
    def label(self) -> str:
        """What the scores are, with their unit."""
        return self.metric["label"] + (f", {self.metric['unit']}" if self.metric["unit"] else "")

    def rate_interval(self, layer: int, head: int, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson score interval of a head's rate, for metrics of 0 and 1."""
        scores = self.scores[:, layer, head]
        return wilson_interval(np.nansum(scores), np.isfinite(scores).sum(), confidence)

    def difference(
        self, layer: int, head: int, confidence: float = 0.95
    ) -> tuple[float, float, float] | None:
        """A head's rate less the unablated model's on the same prompts, and the interval of paired rates: difference, low,
        high. None for other metrics, and for runs of earlier versions."""
        own = self.record.get("unablated_scores")
        if own is None:
            return None
        scores = self.scores[:, layer, head]
        known = np.isfinite(scores)
        return paired_difference(scores[known] == 1, np.array(own)[known] == 1, confidence)

    def mean(self) -> np.ndarray:
        """Mean over prompts, float64 [L, H]."""
        return self.scores.mean(axis=0)

    def stability(
        self, k: int = 10, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
    ) -> RankStability:
        """Bootstrap over prompts: how often each head is in the top k, and intervals of its mean and rank."""
        scores = self.scores if self.marked is None else np.where(self.marked.any(0), np.nan, self.scores)
        return rank_stability(
            scores, k, resamples=resamples, confidence=confidence, seed=seed, signed=self.signed
        )

    def quick_stability(self, k: int) -> tuple[RankStability | None, str]:
        if self.is_rate:
            return None, "heads of one rate share a rank; intervals are Wilson's, of the rate"
        if self.scores.shape[0] == 1:
            return None, "one prompt: no intervals"
        return super().quick_stability(k)

    def contrast(self, **options):
        """`shipsfast.contrast` of this scan with its control: which heads matter more here than there."""
        from .contrast import contrast

        return contrast(self, **options)

    def quick_contrast(self):
        """`contrast` for tables and JSON; None and the reason where it cannot be."""
        try:
            return self.contrast(), ""
        except InputError as problem:
            return None, f"no contrast: {problem}"

    def to_pandas(self) -> pd.DataFrame:
        """One row per prompt and head: prompt, layer, head, and kl_nats or the metric's name; with answers or several positions
        one per token too."""
        if self.tokens is not None:
            return score_frame(
                self.tokens, cells_of(self.identity).names, column(self.metric), self.marked_tokens
            )
        return score_frame(self.scores, ("prompt", "layer", "head"), column(self.metric), self.marked)

    def by_group(self, labels: Sequence | None = None) -> GroupedScores:
        """The same scores by group of prompts: a map for each, and how far the groups name the same heads.

        labels: the group of each prompt, P texts or whole numbers; default what the run has recorded (`--group-by`).
        Raises InputError where there are none.
        """
        column, labels = labels_of(self.record, len(self.scores), labels)
        return GroupedScores(self, labels, column)

    @property
    def title(self) -> str:
        """What was measured, in a word or two."""
        return "Ships" if self.metric["name"] == "kl" else self.metric.get("title", self.metric["name"])

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """Heatmap of the mean scores, layers x heads; of several ablations side by side. Returns the matplotlib Figure; saved if a
        path is given."""
        if self.further:
            return self.several.plot(path, title=title)
        title = title or f"{self.title}, mean of {self.reads_in_words()}"
        return self.heatmap(self.label, title, path)

    def panel(self, label: str = "", title: str = ""):
        panel = super().panel(label or self.label, title)
        if self.marked is None:
            return panel
        note = f"x: {self.marks()['count']:,} scores not finite"
        return replace(panel, marked=self.marked_heads, marked_note=note)

    def bars(self, label: str):
        bars = super().bars(label)
        if not self.is_rate:
            return bars
        low, high = np.array([self.rate_interval(s.layer, s.head) for s in bars.top]).T
        title = f"{bars.title}\n95% Wilson intervals, {counted(self.scores.shape[0], 'prompt')}"
        return replace(bars, low=low, high=high, title=title)

    @property
    def score_name(self) -> str:
        return "mean_kl_nats" if self.metric["name"] == "kl" else "mean_score"

    def show(self, top: int, console) -> None:
        """Print the top heads, how firm they are, and the noise floor; and the same of further metrics and ablations, compared."""
        if self.further:
            from .several_table import show_several

            return show_several(self, top, console)
        from .tables import show_ships

        show_ships(self, top, console)

    def as_json(self, top: int) -> dict:
        body = super().as_json(top) | {"metric": self.metric, "prompts": int(self.scores.shape[0])}
        if self.marked is not None:
            body["nonfinite"] = self.marks()
        if recorded(self.record) is not None:
            body["by_group"] = self.by_group().as_json(top)
        if self.also:
            body["also"] = {
                name: other.as_json(top) | {"run_folder": None} for name, other in self.also.items()
            }
        if self.control is not None:
            found, problem = self.quick_contrast()
            body["control"] = self.control.as_json(top) | {"run_folder": None}
            body["contrast"] = {"not_known": problem} if found is None else found.as_json(top)
        if self.further:
            each = {
                name: other.as_json(top) | {"run_folder": None} for name, other in self.by_ablation.items()
            }
            doses = {kind: dose.to_json(top) for kind, dose in self.doses.items()}
            body |= {"by_ablation": each, "several": self.several.to_json(top), "doses": doses}
        return body

    def save(self, folder: str | Path) -> Path:
        """Write a run folder. Raises InputError if the folder holds anything else."""
        record = self.record | {"noise_floor": self.noise_floor}
        at = cells_of(self.identity)
        scores, marked = self.scores, self.marked
        if self.tokens is not None:
            scores, marked = self.tokens, self.marked_tokens
        args = (scores, at.names, column(self.metric))
        inner = {
            also_place(number): replace(other, further=())
            for number, other in enumerate(self.also.values(), 1)
        }
        inner |= {ablation_place(number): other for number, other in enumerate(self.further, 1)}
        inner |= {} if self.control is None else {CONTROL: self.control}
        if inner:  # complete when all are
            path = save_scores(folder, self.identity, record | {"status": "running"}, *args, marked=marked)
            for place, other in inner.items():
                other.save(path / place)
        return save_scores(folder, self.identity, record, *args, marked=marked)

    @classmethod
    def load(cls, folder: str | Path) -> ShipsResult:
        """Read a run folder; scores that a killed scan never reached are NaN."""
        folder = Path(folder)
        result = cls.load_ablations(folder)
        complete = result.record.get("status") == "complete"
        if result.identity.get("control") is None or not (complete or (folder / CONTROL / MANIFEST).exists()):
            return result
        place = folder / CONTROL
        result.control = cls.load_ablations(inside(folder, place) if place.exists() else place)
        own, wanted = result.control.identity, control_of(result.identity)
        if any(own.get(name) != value for name, value in wanted.items()) or "control" in own:
            raise InputError(
                f"{place} is damaged: it is not the scan of the control prompts; delete the folder"
            )
        return result

    @classmethod
    def load_ablations(cls, folder: Path) -> ShipsResult:
        """The same without its control."""
        result = cls.load_metrics(folder)
        if "further_ablations" not in result.identity:
            return result
        found = cls._beside(folder, result, "further_ablations", ablation_place, cls.load_metrics)
        return result.with_further(list(found))

    @classmethod
    def load_metrics(cls, folder: Path) -> ShipsResult:
        """The same without further ablations."""
        result = cls.load_one(folder)
        for other in cls._beside(folder, result, "further_metrics", also_place, cls.load_one):
            result.also[other.metric["name"]] = other
        return result

    @staticmethod
    def _beside(
        folder: Path,
        result: ShipsResult,
        what: str,
        where: Callable[[int], str],
        load: Callable[[Path], ShipsResult],
    ) -> Iterator[ShipsResult]:
        """Those that the identity names; of an unfinished run some may not have been begun."""
        complete = result.record.get("status") == "complete"
        for number in range(1, 1 + len(result.identity.get(what, []))):
            place = folder / where(number)
            if not complete and not (place / MANIFEST).exists():
                continue
            found = load(inside(folder, place) if place.exists() else place)
            if found.identity != beside(result.identity, what, number):
                name = what.replace("_", " ").removesuffix("s")
                raise InputError(
                    f"{place} is damaged: it is not the scan of {name} {number} of {folder}; delete the folder"
                )
            yield found

    @classmethod
    def load_one(cls, folder: Path) -> ShipsResult:
        """The same without further metrics and ablations."""
        manifest = read_manifest(folder, "ships")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        at = cells_of(identity)
        done = np.zeros(at.shape, dtype=bool)
        scores = at.flat(read_scores(folder, at.shape, at.names, column(manifest.get("metric", KL)), done))
        marked = at.flat(done) & ~np.isfinite(scores)  # infinite ones are of earlier versions
        scores[marked] = np.nan
        floor = manifest.get("noise_floor") or 0.0
        return cls.of_reads(scores, floor, manifest, identity, {}, marked if marked.any() else None)


def heads_of(marked: np.ndarray | None) -> list[tuple[int, int]]:
    """Heads with a mark, of marks [P, L, H]."""
    return [] if marked is None else [tuple(map(int, at)) for at in np.argwhere(marked.any(0))]


def marks_of(marked: np.ndarray | None, record: dict) -> dict:
    """What there is to say of marks; nothing where there are none."""
    if marked is None:
        return {}
    found = {"count": int(marked.sum()), "heads": [list(head) for head in heads_of(marked)]}
    return found | record.get(MARKED, {})


def also_place(number: int) -> str:
    """Where in a run folder the run folder of a scan's further metrics lies, counted from 1."""
    return f"{FURTHER}/{number}"


def ablation_place(number: int) -> str:
    """The same of further ablations."""
    return f"{ABLATIONS}/{number}"


def column(metric: dict) -> str:
    """The column of a metric's scores in tables on disk."""
    return "kl_nats" if metric["name"] == "kl" else "score"
