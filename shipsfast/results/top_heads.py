"""What a search for the top heads returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..runs.kinds import KINDS, SCREEN
from ..runs.manifest import read_manifest
from ..runs.tables import read_scores, score_frame
from ..text import counted
from .bootstrap import RankStability, rank_stability
from .certificate import Certificate
from .head_map import BARS, HeadScore, Ranked, error_json, ranked, save_scores
from .ships import KL, column, heads_of, marks_of

COLUMNS = KINDS["top"].index


@dataclass(repr=False, eq=False)
class TopHeads(Ranked):
    """The k heads with the largest mean scores, exactly, and how sure it is that there are no others.

    heads: HeadScore(layer, head, score), the largest first (of metrics with a sign: the largest in size), ties to the lower (layer,
        head), as `scan(...).top(k)` has them.
    per_prompt: float64 [P, L, H], exact scores of every prompt; NaN for heads that have none. `.kl` is another name for it where the
        metric is kl. marked: bool [P, L, H], scores that were not finite (`nonfinite="mark"`), None where there are none.
    upper: float64 [L, H], what the mean score of a head without an exact one does not exceed (its size, of metrics with a sign), all of
        them together but for the chance that the certificate states; NaN where the score is exact, or nothing is known.
    screened: float64 [L, H], the screening copy's mean over the prompts that it saw; NaN without a screen.
    certificate: what was assumed, and how sure that makes it.
    noise_floor, error: of the exact scores, as in `ShipsResult`. record: what really ran.
    """

    heads: list[HeadScore]
    per_prompt: np.ndarray
    upper: np.ndarray
    screened: np.ndarray
    certificate: Certificate
    noise_floor: float = 0.0
    record: dict = field(default_factory=dict, compare=False)
    identity: dict = field(default_factory=dict)
    marked: np.ndarray | None = None
    # What of the run folder is kept as it is: exact scores of heads that were dropped, and screened ones by prompt.
    stored: dict[str, np.ndarray] = field(default_factory=dict, compare=False)

    @property
    def scores(self) -> np.ndarray:
        """Exact means over the prompts, float64 [L, H]; NaN for heads that have none."""
        return self.per_prompt.mean(axis=0)

    def mean(self) -> np.ndarray:
        return self.scores

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
            raise InputError(f"this search measured {self.metric['name']}: its numbers are in .per_prompt")
        return self.per_prompt

    @property
    def signed(self) -> bool:
        return self.metric["signed"]

    @property
    def label(self) -> str:
        """What the scores are, with their unit."""
        return self.metric["label"] + (f", {self.metric['unit']}" if self.metric["unit"] else "")

    @property
    def score_name(self) -> str:
        return "mean_kl_nats" if self.metric["name"] == "kl" else "mean_score"

    def __repr__(self) -> str:
        found = ", ".join(f"{s.layer}-{s.head} {s.score:.4g}" for s in self.heads[:3])
        return f"TopHeads({self.certificate.k} of {counted(self.certificate.heads, self.unit)}: {found})"

    def top(self, k: int | None = None) -> list[HeadScore]:
        """The first k of the heads that were searched for: there are no others to be sure of."""
        return self.heads[: self.certificate.k if k is None else k]

    def stability(
        self, k: int | None = None, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
    ) -> RankStability:
        """Bootstrap over prompts, as `ShipsResult.stability`. Raises InputError where heads have no exact score: other prompts may rank
        them first."""
        if self.certificate.unscored:
            raise InputError(
                f"resampling the prompts ranks all heads, and {counted(self.certificate.unscored, self.unit)} have no exact score: "
                "shipsfast.scan has them all; .intervals() are of the heads that have one"
            )
        k = self.certificate.k if k is None else k
        return self._resampled(k, resamples=resamples, confidence=confidence, seed=seed)

    def intervals(
        self, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ends of bootstrap intervals (BCa, over prompts) of the exact means, float64 [L, H] each; NaN for heads without one. Raises
        InputError for a single prompt."""
        if len(self.per_prompt) == 1:
            raise InputError("one prompt: no intervals")
        found = self._resampled(1, resamples=resamples, confidence=confidence, seed=seed)
        return found.low, found.high

    def _resampled(self, k: int, **settings) -> RankStability:
        return rank_stability(self.per_prompt, k, signed=self.signed, **settings)

    def quick_stability(self, k: int) -> tuple[RankStability | None, str]:
        if len(self.per_prompt) == 1:
            return None, "one prompt: no intervals"
        return super().quick_stability(k)

    def to_pandas(self) -> pd.DataFrame:
        """One row per head that was a candidate: layer, head, rank (of the k first; else missing), score (NaN where it is not known
        exactly), upper (NaN where it is), screened."""
        ranks = {(s.layer, s.head): rank for rank, s in enumerate(self.heads, 1)}
        known = ~(np.isnan(self.scores) & np.isnan(self.upper) & np.isnan(self.screened))
        rows = [
            (i, j, ranks.get((i, j)), self.scores[i, j], self.upper[i, j], self.screened[i, j])
            for i, j in (map(int, at) for at in np.argwhere(known))
        ]
        frame = pd.DataFrame(rows, columns=["layer", "head", "rank", "score", "upper", "screened"])
        return frame.astype({"rank": "Int64"})

    def panel(self, label: str = "", title: str = ""):
        """The map: exact scores, and bounds where there is none."""
        panel, exact = super().panel(label or self.label, title), self.scores
        values = np.where(np.isnan(exact) & np.isfinite(self.upper), self.upper, exact)
        return replace(
            panel,
            values=values,
            weak=np.isnan(exact) & ~np.isnan(values),
            weak_note="dot: not scored exactly, an upper bound",
            named=self.top(BARS),
            marked=heads_of(self.marked),
            marked_note=f"x: {self.marks().get('count', 0):,} scores not finite",
        )

    def bars(self, label: str):
        from .plots import Bars

        bars = Bars(self.top(BARS), label, f"the top {min(BARS, len(self.heads))}, exact")
        if len(self.per_prompt) == 1 or not bars.top:
            return bars
        at = tuple(zip(*((s.layer, s.head) for s in bars.top), strict=True))
        low, high = (end[at] for end in self.intervals())
        said = f"95% intervals, {counted(len(self.per_prompt), 'prompt')} resampled"
        return replace(bars, low=low, high=high, title=f"{bars.title}\n{said}")

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """Heatmap of exact scores, and of bounds for the others, with the top heads beside it. Returns the matplotlib Figure; saved if a
        path is given."""
        sure = self.certificate
        title = title or (
            f"Top {sure.k} of {counted(sure.heads, self.unit)}, mean of {counted(sure.prompts, 'prompt')}, "
            f"{sure.scored} scored exactly"
        )
        return self.heatmap(self.label, title, path)

    def show(self, top: int | None = None, console=None) -> None:
        """Print the heads, the first `top` of them, and the certificate in words."""
        from .top_table import show_top

        show_top(self, self.certificate.k if top is None else top, console)

    def as_json(self, top: int) -> dict:
        marks = {} if self.marked is None else {"nonfinite": self.marks()}
        return marks | {
            "noise_floor": self.noise_floor,
            "error": error_json(self.error),
            "record": self.record,
            "metric": self.metric,
            "prompts": len(self.per_prompt),
            "top": [{"layer": s.layer, "head": s.head, self.score_name: s.score} for s in self.top(top)],
            "certificate": self.certificate.to_json() | {"text": self.certificate.lines()},
            "stability": self.stability_json(self.certificate.k),
        }

    def outcome(self) -> dict:
        """What run.json has of it beside the scores."""
        bounds = [[None if np.isnan(x) else float(x) for x in row] for row in self.upper]
        rows = {room: int((~np.isnan(stored)).sum()) for room, stored in self.stored.items()}
        if self.marked is not None:
            rows["scores"] += int(self.marked.sum())
        return {
            "chosen": [[s.layer, s.head] for s in self.heads],
            "certificate": self.certificate.to_json(),
            "upper": bounds,
            "rows": rows,
        }

    def save(self, folder: str | Path) -> Path:
        """Write a run folder. Raises InputError if the folder holds anything else."""
        record = self.record | self.outcome() | {"noise_floor": self.noise_floor}
        value = column(self.metric)

        def beside(new: np.ndarray) -> dict[str, pd.DataFrame]:
            return (
                {SCREEN: score_frame(self.stored[SCREEN], COLUMNS, value)} if (~np.isnan(new)).any() else {}
            )

        return save_scores(
            folder,
            self.identity,
            record,
            self.stored["scores"],
            COLUMNS,
            value,
            marked=self.marked,
            beside=beside,
        )

    @classmethod
    def load(cls, folder: str | Path) -> TopHeads:
        """Read the run folder of a finished search."""
        folder = Path(folder)
        manifest = read_manifest(folder, "top")
        if manifest.get("status") != "complete":
            raise InputError(f"{folder} holds a search that is not finished: run it again to continue")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        shape, value = tuple(identity["shape"]), column(manifest["metric"])
        done = np.zeros(shape, dtype=bool)
        stored = {
            "scores": read_scores(folder, shape, COLUMNS, value, done),
            SCREEN: read_scores(folder, shape, COLUMNS, value, room=SCREEN),
        }
        if manifest["screen"]["dtype"] is None:  # one that turned out not to run may have left some
            stored[SCREEN][:] = np.nan
        marked = done & np.isnan(stored["scores"])
        upper = np.array(
            [[np.nan if x is None else x for x in row] for row in manifest.pop("upper")], np.float64
        )
        certificate = Certificate.from_json(manifest.pop("certificate"))
        for name in ("chosen", "rows"):
            manifest.pop(name)
        return cls.of(stored, marked, upper, certificate, manifest, identity)

    @classmethod
    def of(
        cls,
        stored: dict[str, np.ndarray],
        marked: np.ndarray,
        upper: np.ndarray,
        certificate: Certificate,
        record: dict,
        identity: dict,
    ) -> TopHeads:
        """stored: exact and screened scores so far, [P, L, H] each."""
        exact = np.where(np.isnan(stored["scores"]).any(0), np.nan, stored["scores"])
        screened, seen = stored[SCREEN], ~np.isnan(stored[SCREEN])
        with np.errstate(invalid="ignore"):
            means = np.where(seen, screened, 0).sum(0) / np.where(seen.any(0), seen.sum(0), np.nan)
        heads = ranked(exact.mean(0), certificate.k, record["metric"]["signed"])
        floor = record.get("noise_floor") or 0.0
        marks = marked if marked.any() else None
        return cls(heads, exact, upper, means, certificate, floor, record, identity, marks, stored)
