"""The top heads: a complete scan, shipsfast's search for them, and what people use in the place of scanning everything.

All in one run, on the same token ids in float32, with KL of undifferentiated attention as what counts. The complete scan says which
heads are the true ones; recall is the share of them that a way finds. Ways that scan a part are timed by real runs of that part, and
random subsets of prompts are drawn many times from the complete scan's scores to say what to expect of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import shipsfast
from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.prompts.tokens import to_token_ids

from . import attribution
from .half import MILD
from .provenance import append, provenance, rows_of
from .timing import Paths

COMPLETE, SEARCH = "complete scan", "shipsfast.top_heads"
LAYERS = "every second layer"
ABLATION = "undifferentiated"
TOLERANCE_NATS = 1e-4  # between two ways to the same float32 score
ERROR = 0.01
BETWEEN = 3  # ways after each complete scan, which takes longer than most of them together
DRAWS = 2000  # of each random subset of prompts
STEP, SLOPES = (
    1e-3,
    1e-3,
)  # of finite differences in float64, and how far gradients may be off, of the largest
CHECKED = 2  # prompts, and heads of each kind, whose gradients are checked


@dataclass
class TopCase:
    """A model, prompts, how many heads are looked for, and of how many prompts random subsets are."""

    name: str
    title: str
    load: Callable[[], tuple]  # -> model, token ids
    tops: tuple[int, ...] = (10, 20)  # the search is for the first of them
    subsets: tuple[int, ...] = (4, 8, 16)


def _village() -> tuple:
    model, tokenizer = load_model(str(MODEL), dtype="float32"), load_tokenizer(str(MODEL))
    return model, to_token_ids(load_prompts(PROMPTS / "ordinary.csv")[:10], tokenizer, "chat")


def _smollm2() -> tuple:
    from tools.real.fetch import smollm2

    file = str(smollm2())
    model, tokenizer = load_model(file, dtype="float32"), load_tokenizer(file)
    return model, to_token_ids(load_prompts(MILD), tokenizer, "chat")


SMOLLM2 = TopCase("top-smollm2-135m", "SmolLM2-135M-Instruct, 64 mild prompts", _smollm2)
SMOKE = TopCase("top-smoke-village", "the embedded model, 10 prompts", _village, tops=(3, 5), subsets=(2,))


@dataclass
class Found:
    """Scores float64 [L, H] that a way ranks heads by, NaN for heads that it has none of; exact: a search's top heads."""

    scores: np.ndarray
    exact: dict = field(default_factory=dict)

    def top(self, k: int) -> set[tuple[int, int]]:
        order = np.argsort(-np.nan_to_num(self.scores, nan=-np.inf), axis=None, kind="stable")[:k]
        known = order[~np.isnan(self.scores.ravel()[order])]
        return {(int(i), int(j)) for i, j in zip(*np.unravel_index(known, self.scores.shape), strict=True)}


class Bench:
    """One model and its prompts, and every way to its top heads."""

    def __init__(self, case: TopCase) -> None:
        self.case = case
        self.model, self.ids = case.load()
        config = self.model.config
        self.shape = (config.num_hidden_layers, config.num_attention_heads)
        self.complete: np.ndarray | None = None  # float64 [P, L, H], of the last complete scan
        self.ran: dict[str, dict] = {}  # of ways by shipsfast: what really ran

    def ways(self) -> dict[str, Callable[[], Found]]:
        """The complete scan is not among them."""
        drawn = {
            f"{size} of {len(self.ids)} prompts": partial(self.subset, size) for size in self.case.subsets
        }
        return {
            SEARCH: self.search,
            "attribution patching, logit difference": partial(self.patched, ABLATION),
            "attribution patching, logit difference, zeros": partial(self.patched, "zero"),
            f"second order of KL, {attribution.DRAWS} backward passes": self.second_order,
            **drawn,
            LAYERS: self.every_second_layer,
        }

    def scan(self, ids: list | None = None, heads: list | None = None) -> shipsfast.ShipsResult:
        return shipsfast.scan(
            self.model, ids or self.ids, heads=heads, ablation=ABLATION, rescored=0, progress=False
        )

    def scan_all(self) -> Found:
        found = self.scan()
        self.complete = found.scores
        self.ran[COMPLETE] = {
            "resolved_backend": found.record["attention_backend"],
            "layers": found.record["layers"],
        }
        return Found(found.mean())

    def search(self) -> Found:
        found = shipsfast.top_heads(
            self.model,
            self.ids,
            k=self.case.tops[0],
            error=ERROR,
            ablation=ABLATION,
            rescored=0,
            progress=False,
        )
        self.ran[SEARCH] = {"screen": found.record["screen"], "certificate": found.certificate.text()}
        exact = {(head.layer, head.head): head.score for head in found.heads}
        scores = np.full(self.shape, np.nan)
        for at, score in exact.items():
            scores[at] = score
        return Found(scores, exact)

    def patched(self, ablation: str) -> Found:
        """Heads by the mean size of the estimate: its sign varies over prompts."""
        return Found(attribution.patching(self.model, self.ids, ablation).abs().mean(-1).numpy())

    def second_order(self) -> Found:
        return Found(attribution.second_order_kl(self.model, self.ids, ABLATION).mean(-1).numpy())

    def subset(self, size: int) -> Found:
        chosen = np.random.default_rng(size).choice(len(self.ids), size, replace=False)
        return Found(self.scan([self.ids[p] for p in chosen]).mean())

    def every_second_layer(self) -> Found:
        layers, heads = self.shape
        return Found(self.scan(heads=[(i, h) for i in range(0, layers, 2) for h in range(heads)]).mean())

    def recall(self, found: Found) -> dict[str, float]:
        """Of the true top k, the share that is among the k that were found."""
        true = Found(self.complete.mean(axis=0))
        wanted = self.case.tops[:1] if found.exact else self.case.tops
        return {str(k): len(found.top(k) & true.top(k)) / k for k in wanted}

    def drawn_recall(self, size: int) -> dict[str, float]:
        """The mean over DRAWS random subsets of the prompts."""
        rng, prompts = np.random.default_rng(0), len(self.ids)
        chosen = (rng.choice(prompts, size, replace=False) for _ in range(DRAWS))
        each = [self.recall(Found(self.complete[some].mean(axis=0))) for some in chosen]
        return {k: float(np.mean([one[k] for one in each])) for k in each[0]}

    def check(self, name: str, found: Found) -> str | None:
        """What is wrong with exact scores, if anything: they must be those of the complete scan."""
        if name not in (SEARCH, LAYERS):
            return None
        off = np.nanmax(np.abs(found.scores - self.complete.mean(axis=0)))
        return None if off <= TOLERANCE_NATS else f"scores differ from the complete scan's by {off:.2g} nats"

    def check_gradients(self) -> dict[str, float]:
        """How far attribution is off, before anything is timed: raises RuntimeError where it is not what it says.

        Its forward pass must be the model's, and its gradients in float64 the slopes of finite differences.
        """
        some = self.ids[:CHECKED]
        with torch.no_grad():
            plain = torch.stack([self.model(torch.tensor([each])).logits[0, -1] for each in some])
            with attribution.Heads(self.model, ABLATION).watched():
                own = attribution.next_logits(self.model, some)
        logits = float((plain - own).abs().max())
        self.model.double()
        try:
            slopes = {ablation: self._slopes(some, ablation) for ablation in (ABLATION, "zero")}
        finally:
            self.model.float()
        worst = {"logits": logits} | slopes
        if logits > TOLERANCE_NATS * 10 or max(slopes.values()) > SLOPES:
            raise RuntimeError(f"attribution is not what it says: off by {worst}")
        return worst

    def _slopes(self, ids: list, ablation: str) -> float:
        got = attribution.patching(self.model, ids, ablation)
        largest = np.argsort(-got.abs().mean(-1).numpy(), axis=None)
        at = [np.unravel_index(i, self.shape) for i in (*largest[:CHECKED], *largest[-CHECKED:])]
        pairs = [
            (got[i, h], attribution.slope_by_steps(self.model, ids, ablation, (i, h), STEP)) for i, h in at
        ]
        return max(float((a - b).abs().max()) for a, b in pairs) / float(got.abs().max())


def run_case(case: TopCase, repeats: int, console: Console) -> list[dict]:
    """Check, time and append the rows of one case; returns them."""
    bench = Bench(case)
    checked = bench.check_gradients()
    ways = bench.ways()
    paths, recalls = Paths(COMPLETE, ways), {}
    shipsfast.scan(bench.model, bench.ids[:2], progress=False, rescored=0)  # a warm-up
    for _ in range(repeats):
        for number, (name, way) in enumerate(ways.items()):
            if number % BETWEEN == 0:
                paths.timed(COMPLETE, bench.scan_all, lambda *_: None)
            paths.timed(name, way, partial(_kept, bench, recalls))
            paths.paired(name)
    for size in case.subsets:
        recalls[f"{size} of {len(bench.ids)} prompts"] = bench.drawn_recall(size)
    recalls[COMPLETE] = {str(k): 1.0 for k in case.tops}

    common = provenance("cpu") | {
        "bench": "top", "case": case.name, "dtype": "float32", "metric": "kl", "ablation": ABLATION, "error": ERROR, "rescored": 0,
        "prompts": len(bench.ids), "tokens": sum(map(len, bench.ids)), "heads": int(np.prod(bench.shape)), "checked": checked,
    }  # fmt: skip
    rows = []
    for name in paths.times:
        figures = paths.figures(name)
        if "failed" not in figures:
            figures["share_of_complete"] = figures.pop("times_slower_than_shipsfast")
            figures["recall"] = recalls[name]
        rows.append(common | {"path": name} | figures | bench.ran.get(name, {}))
    append("top", rows)
    show(case, rows, console)
    return rows


def _kept(bench: Bench, recalls: dict, name: str, found: Found) -> str | None:
    """Of a run that has just been timed: its recall, or what is wrong with it."""
    recalls[name] = bench.recall(found)
    return bench.check(name, found)


def cells(row: dict, tops: tuple[int, ...]) -> list[str]:
    """Of a row that did not fail: recalls, time and its share."""
    recall = [f"{row['recall'][str(k)]:.0%}" if str(k) in row["recall"] else "" for k in tops]
    return [*recall, f"{row['median_s']:.1f}", f"{row['share_of_complete']:.0%}"]


def show(case: TopCase, rows: list[dict], console: Console) -> None:
    table = Table(title=case.title, title_justify="left")
    for name in ["path", *(f"recall of the top {k}" for k in case.tops), "median s", "of the complete scan"]:
        table.add_column(name, justify="left" if name == "path" else "right")
    for row in rows:
        failed = "failed" in row
        table.add_row(row["path"], *(["failed: " + row["failed"]] if failed else cells(row, case.tops)))
    console.print(table)


def table(case: TopCase = SMOLLM2) -> str:
    """For docs/top-heads.md: the newest run."""
    rows = rows_of("top", case.name)
    if not rows:
        return f"{case.title}: not measured.\n"
    rows = rows[max(i for i, row in enumerate(rows) if row["path"] == COMPLETE) :]
    first, head = rows[0], [f"recall of the top {k}" for k in case.tops]
    lines = [
        f"| way | {' | '.join(head)} | seconds | of the complete scan |",
        "|---|" + "---:|" * (len(head) + 2),
    ]
    for row in rows:
        told = ["failed: " + row["failed"]] if "failed" in row else cells(row, case.tops)
        lines.append(f"| {row['path']} | {' | '.join(told)} |")
    about = (
        f"{case.title} ({first['tokens']:,} tokens), {first['dtype']}, KL, every head of {first['heads']}; {first['device']}, "
        f"{first['threads']} threads, torch {first['versions']['torch']}, {first['date']}, commit {first['commit']}. Medians of "
        f"interleaved runs, with a complete scan before every {BETWEEN}. The recall of prompts drawn at random is the mean over "
        f"{DRAWS:,} draws, from the complete scan's scores."
    )
    return "\n".join([*lines, "", about]) + "\n"
