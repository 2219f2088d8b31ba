"""The kinds of runs, one row each: what a kind keeps, how its run.json is checked, and whose result it is.

A new kind is a row here, a result class in results/, and a measurement. The result class is named and not imported: this
room knows files, not what numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .fields import an_object, check_fields, flag, list_of, need, number, or_none, scanned_head, text
from .fields import count as whole
from .part_file import ANSWER, COLUMNS, NLL

# Of an answer. The first is what counts as success; unfinished: the text ended before an answer began.
LABELS = ("complied", "refusal", "degenerate", "incoherent", "unfinished")
SCORES, GRAMS, COMPLETIONS, CONTROL, BASIS, SCREEN = (
    "scores", "grams", "completions", "control", "basis", "screen",
)  # fmt: skip
COUNTED = (SCORES, COMPLETIONS, SCREEN)  # the rooms whose rows a person counts
CONTROL_COLUMNS = ("step", "beam", "prompt", "layer", "head")  # of a search's control
RANGE_DEG = 1e-6  # by how much rounding may carry an angle out of its range
BYTES_OF_A_COMPLETION = 128
HEAD = ("layer", "head")


@dataclass(frozen=True)
class Table:
    """What the parts of a room hold. index: columns and how many values each may have, from `lowest`; value: the column
    of numbers, in [low, high]; expected: how many rows there are in the end, None where that is not known; more: columns
    beside index and value; marks: may a value be NaN, of a score that was marked?"""

    index: dict[str, int]
    value: str | None = None
    low: float = -math.inf
    high: float = math.inf
    expected: int | None = None
    lowest: int = 0
    more: tuple[str, ...] = ()
    marks: bool = False

    def __post_init__(self) -> None:
        assert set(self.columns) <= set(COLUMNS), "a column that part_file.COLUMNS has no type for"

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.index, *([] if self.value is None else [self.value]), *self.more)


@dataclass(frozen=True)
class Kind:
    """One kind of run.

    result: module and class in results/ that a folder is loaded as. It has load, show, as_json, and plot or view;
    index: the columns of its scores beside that of their value;
    read: the rooms that its loader reads, and so checks;
    check(file, manifest, identity): raises InputError for a run.json that no run of this kind has written, and gives the
    bytes that its result takes;
    tables(identity, manifest): the table of every room.
    """

    result: str
    index: tuple[str, ...]
    read: tuple[str, ...]
    check: Callable[[Path, dict, dict], int]
    tables: Callable[[dict, dict], dict[str, Table]]


def _check_groups(file: Path, manifest: dict, prompts: int) -> None:
    groups = (manifest.get("prompts_from") or {}).get("group_by")
    if groups:
        need(file, "prompts_from.group_by.labels", len(groups["labels"]) == prompts, "one for each prompt")


def _check_rule(file: Path, identity: dict) -> None:
    rule = identity.get("incoherent")
    if rule is not None:
        check_fields(file, "identity.incoherent.", rule, INCOHERENT, all_of=INCOHERENT)


def _check_shape(file: Path, manifest: dict, identity: dict) -> list[int]:
    shape = identity.get("shape")
    form = isinstance(shape, list) and len(shape) == 3
    form = form and all(whole(1, most)(n) for n, most in zip(shape, (1 << 40, 1 << 14, 1 << 14), strict=True))
    need(file, "identity.shape", form, "three whole numbers: prompts, layers, heads")
    if "prompts" in identity:
        fits = len(identity["prompts"]) == shape[0]
        need(file, "identity.prompts", fits, "as many as the shape has prompts")
    if "plan" in manifest and not _of_answers(identity):
        check_fields(file, "plan.", manifest["plan"], PLAN | PLAN_CUT_BY_WORK, all_of=PLAN)
        own = manifest["plan"].keys() - PLAN_CUT_BY_WORK.keys()
        need(file, "plan", own == PLAN.keys(), f"an object with {', '.join(PLAN)}")
    return shape


def _of_answers(identity: dict) -> bool:
    """Whole answers, under the name of a scan: those of `scan_asr`."""
    metric = identity.get("metric")
    return isinstance(metric, dict) and metric.get("name") == "asr"


def _units(identity: dict) -> tuple[int, dict[str, int], int]:
    """Prompts, the grid of layers and heads, and how many heads are scanned."""
    prompts, layers, heads = (int(n) for n in identity["shape"])
    units = layers * heads if identity["heads"] == "all" else len(identity["heads"])
    return prompts, {"layer": layers, "head": heads}, units


def _answers(identity: dict, groups: int, prompts: int, expected: int | None) -> Table:
    more = ANSWER[2:] + (NLL,) * has_likelihoods(identity) + ("text",) * identity["keep_text"]
    return Table({"group": groups, "prompt": prompts}, expected=expected, more=more)


def has_likelihoods(identity: dict) -> bool:
    """Was it measured how likely the unablated model finds each answer? Runs of earlier versions were without."""
    return "incoherent" in identity


def unablated_row(identity: dict) -> int | None:
    """Which row of `completions` is the unablated model's: the first group without heads, or one after the groups, which
    earlier versions lacked."""
    groups = identity["groups"]
    return groups.index([]) if [] in groups else len(groups) if has_likelihoods(identity) else None


def completion_rows(identity: dict) -> int:
    """Of an evaluation."""
    at = unablated_row(identity)
    return max(len(identity["groups"]), 0 if at is None else at + 1)


def read_counts(identity: dict) -> list[int]:
    """How many tokens each prompt is read at; empty where each is read behind its last token."""
    if "answer_tokens" in identity:
        return list(map(int, identity["answer_tokens"]))
    return list(map(len, identity.get("read_at", [])))


def _check_ships(file: Path, manifest: dict, identity: dict) -> int:
    prompts, layers, heads = _check_shape(file, manifest, identity)
    _check_groups(file, manifest, prompts)
    _check_rule(file, identity)
    if identity.get("control") is not None:
        hashes = {"prompts": CONTROLLED["prompts"]}
        check_fields(file, "identity.control.", identity["control"], hashes, all_of=hashes)
    counts = read_counts(identity)
    if counts or "answer_tokens" in identity or "read_at" in identity:
        need(
            file,
            "identity",
            len(counts) == prompts and min(counts) > 0,
            "tokens that are read of each prompt",
        )
    for name in ("degenerate", "incoherent", "cut", "perplexity"):
        if "unablated_scores" in manifest:
            found = manifest.get(name)
            fits = isinstance(found, list) and [len(row) for row in found] == [heads] * layers
            need(file, name, fits, "a number or null by layer and head")
    if "unablated_scores" in manifest:
        need(file, "unablated_scores", len(manifest["unablated_scores"]) == prompts, "one for each prompt")
    tokens = prompts * (1 + max(counts, default=0))
    results = 1
    for further in ("further_metrics", "further_ablations"):
        results *= 1 + len(identity.get(further, []))
    return 8 * tokens * layers * heads * results


def _ships_tables(identity: dict, manifest: dict) -> dict[str, Table]:
    prompts, grid, units = _units(identity)
    name, answers = identity["metric"]["name"], _of_answers(identity)
    low, high = {"kl": -1e-3, "asr": 0.0}.get(name, -math.inf), 1.0 if answers else math.inf
    value = "kl_nats" if name == "kl" else "score"
    counts = read_counts(identity)
    index = {"prompt": prompts} | ({"token": max(counts)} if counts else {}) | grid
    expected = (sum(counts) or prompts) * units
    tables = {SCORES: Table(index, value, low, high, expected, marks=not answers)}
    if answers:
        # A result that was saved has no answers.
        expected = None if manifest.get("saved") is True else (1 + units) * prompts
        tables[COMPLETIONS] = _answers(identity, 1 + units, prompts, expected)
    return tables


def _check_subspace(file: Path, manifest: dict, identity: dict) -> int:
    _, layers, heads = _check_shape(file, manifest, identity)
    need(file, "identity.prompts", "prompts" in identity, "the prompts' hashes")
    need(file, "identity.rank", "rank" in identity, "a whole number")
    return 8 * layers * heads


def _subspace_tables(identity: dict, manifest: dict) -> dict[str, Table]:
    _, grid, units = _units(identity)
    return _angle_tables(identity, grid, units)


def _angle_tables(identity: dict, index: dict[str, int], expected: int | None) -> dict[str, Table]:
    prompts, rank = int(identity["shape"][0]), int(identity["rank"])
    return {
        SCORES: Table(index, "angle_deg", -RANGE_DEG, 90.0 * rank + RANGE_DEG, expected),
        BASIS: Table({"prompt": prompts, "vector": rank}, "value", -1.0 - 1e-9, 1.0 + 1e-9),
        GRAMS: Table(index, lowest=-1, more=("gram",)),
    }


def _check_sahara(file: Path, manifest: dict, identity: dict) -> int:
    one_step = _check_subspace(file, manifest, identity)
    _, layers, heads = identity["shape"]
    need(file, "identity.beam", "beam" in identity, "a whole number")
    steps = identity.get("group_size", 1)
    if manifest.get("status") == "complete":
        need(file, "chosen", "chosen" in manifest and "beams" in manifest, "the heads of a finished search")
        chosen = manifest["chosen"]
        steps = len(chosen)
        inside = steps >= 1 and all(i < layers and j < heads for i, j in chosen)
        need(file, "chosen", inside, "heads of the model")
        path = manifest.get("path") or [0] * steps
        fits = len(path) == steps and all(at < identity["beam"] for at in path)
        need(file, "path", fits, "a place in the beam for each head")
        need(file, "beams", all(map(_beam, manifest["beams"])), "groups with their angles")
    control = identity.get("control")
    if control is None:
        return steps * identity["beam"] * one_step
    check_fields(file, "identity.control.", control, CONTROLLED, all_of=("prompts",))
    need(file, "identity.penalty", number(identity.get("penalty")), "a number")
    if "control_plan" in manifest:
        check_fields(file, "control_plan.", manifest["control_plan"], PLAN | PLAN_CUT_BY_WORK, all_of=PLAN)
        need(
            file,
            "control_plan",
            manifest["control_plan"].keys() <= (PLAN | PLAN_CUT_BY_WORK).keys(),
            "a plan",
        )
    known = all(number(each.get("control_kl_nats")) for each in manifest.get("beams", []))
    need(file, "beams", known, "groups with what they do to the control prompts")
    return steps * identity["beam"] * one_step * (1 + len(control["prompts"]))


def _check_top(file: Path, manifest: dict, identity: dict) -> int:
    """Of a search for the top heads."""
    prompts, layers, heads = _check_shape(file, manifest, identity)
    check_fields(file, "identity.", identity, SEARCHED, all_of=SEARCHED)
    plans = manifest.get("plans", {})
    need(file, "plans", isinstance(plans, dict), "plans by name")
    for name, plan in plans.items():
        check_fields(file, f"plans.{name}.", plan, PLAN | PLAN_CUT_BY_WORK, all_of=PLAN)
        need(file, f"plans.{name}", plan.keys() <= (PLAN | PLAN_CUT_BY_WORK).keys(), "a plan")
    ends = manifest.get("round_ends", [prompts])
    rising = list_of(whole(1, prompts))(ends) and ends == sorted(set(ends)) and ends[-1:] == [prompts]
    need(file, "round_ends", rising, "rising numbers of prompts, up to all of them")
    screen = manifest.get("screen", {"dtype": None, "why": ""})
    fits = isinstance(screen, dict) and screen.get("dtype") in SCREENING and text(screen.get("why"))
    need(file, "screen", fits, "the dtype of a screening copy, and why")
    if manifest.get("status") == "complete":
        for name in ("metric", "chosen", "screen"):
            need(file, name, name in manifest, "of a finished search")
        need(
            file, "chosen", all(i < layers and j < heads for i, j in manifest["chosen"]), "heads of the model"
        )
        check_fields(file, "certificate.", manifest.get("certificate"), CERTIFICATE, all_of=CERTIFICATE)
        own = manifest["certificate"].keys()
        need(file, "certificate", own == CERTIFICATE.keys(), f"an object with {', '.join(CERTIFICATE)}")
        upper = manifest.get("upper")
        need(file, "upper", _map(upper, layers, heads), "a number or null by layer and head")
        check_fields(file, "rows.", manifest.get("rows"), ROWS, all_of=ROWS)
    return 2 * 8 * prompts * layers * heads


def _map(x, layers: int, heads: int) -> bool:
    return list_of(list_of(or_none(number)))(x) and [len(row) for row in x] == [heads] * layers


def _top_tables(identity: dict, manifest: dict) -> dict[str, Table]:
    prompts, grid, _ = _units(identity)
    kl = identity["metric"]["name"] == "kl"
    index, value = {"prompt": prompts} | grid, "kl_nats" if kl else "score"
    rows = manifest.get("rows", {}) if manifest.get("status") == "complete" else {}
    return {
        SCORES: Table(index, value, -1e-3 if kl else -math.inf, expected=rows.get(SCORES), marks=True),
        # A copy in low precision may round a KL of 0 further below it, and its numbers may be none.
        SCREEN: Table(index, value, -1.0 if kl else -math.inf, expected=rows.get(SCREEN), marks=True),
    }


def _beam(x) -> bool:
    return isinstance(x, dict) and list_of(scanned_head)(x.get("heads")) and number(x.get("angle_deg"))


def _sahara_tables(identity: dict, manifest: dict) -> dict[str, Table]:
    _, grid, units = _units(identity)
    size, beam = int(identity["group_size"]), int(identity["beam"])
    if size > units:
        raise ValueError(f"group_size {size} is above the {units} to choose from")
    # Every group of the beam leaves out its own heads; there is one group in the first step.
    filled = [1] + [_sets(units, step, beam) for step in range(1, size)]
    expected = sum(groups * (units - step) for step, groups in enumerate(filled))
    if manifest.get("saved") is True and beam > 1:  # a result has the best group's steps only
        expected = None
    tables = _angle_tables(identity, {"step": size, "beam": beam} | grid, expected)
    if identity.get("control") is not None:
        prompts = len(identity["control"]["prompts"])
        index = dict(zip(CONTROL_COLUMNS, (size, beam, prompts, *grid.values()), strict=True))
        every = None if expected is None else expected * prompts
        tables[CONTROL] = Table(index, "kl_nats", -1e-3, expected=every)
    return tables


def _sets(units: int, size: int, most: int) -> int:
    """How many sets of `size` units there are, or `most` if there are more: the whole number may have a million digits."""
    count = 1
    for taken in range(min(size, units - size)):
        count = count * (units - taken) // (taken + 1)  # which grows, up to half of the units
        if count >= most:
            return most
    return count


def _check_evaluation(file: Path, manifest: dict, identity: dict) -> int:
    for name in ("groups", "prompts", "keep_text", "control"):
        need(file, f"identity.{name}", name in identity, "what was evaluated")
    _check_rule(file, identity)
    prompts, control = len(identity["prompts"]), identity["control"]
    _check_groups(file, manifest, prompts)
    if manifest.get("prompt_texts") is not None:
        need(file, "prompt_texts", len(manifest["prompt_texts"]) == prompts, "one for each prompt")
    if control is not None:
        check_fields(file, "identity.control.", control, CONTROLLED, all_of=CONTROLLED)
        prompts += len(control["prompts"])
    if "generation" in identity:
        drawn = identity["generation"].get("do_sample") is True
        check_fields(
            file, "identity.generation.", identity["generation"], GENERATION, all_of=DRAWN if drawn else (),
        )  # fmt: skip
    return BYTES_OF_A_COMPLETION * (len(identity["groups"]) + 2) * prompts


def _evaluation_tables(identity: dict, manifest: dict) -> dict[str, Table]:
    groups, prompts = len(identity["groups"]), len(identity["prompts"])
    rows = completion_rows(identity)
    tables = {COMPLETIONS: _answers(identity, rows, prompts, rows * prompts)}
    if identity["control"] is not None:
        ordinary = len(identity["control"]["prompts"])
        tables[CONTROL] = _answers(identity, groups + 1, ordinary, (groups + 1) * ordinary)
        index = {"group": groups, "prompt": ordinary}
        tables[SCORES] = Table(index, "kl_nats", -1e-3, expected=groups * ordinary)
    return tables


# Of a scan: how what is left of it will be cut.
PLAN = {
    "prompt_groups": (list_of(whole(1, 1 << 40)), "a list of numbers of prompts"),
    **dict.fromkeys(
        ("rows_per_block", "chunk_tokens", "head_rows"), (whole(1, 1 << 62), "a whole number of at least 1")
    ),
    **dict.fromkeys(("memory_limit_bytes", "predicted_bytes"), (whole(0, 1 << 62), "a whole number")),
}
PLAN_CUT_BY_WORK = {"steps_per_block": (whole(1, 1 << 62), "a whole number of at least 1")}
CONTROLLED = {
    "prompts": (list_of(text), "a list of hashes"),
    "tokens": (whole(1, 1 << 31), "a whole number"),
}
INCOHERENT = dict.fromkeys(
    ("margin_nats", "turn_nats"), (lambda x: number(x) and 0 <= x <= 1000, "a number from 0 to 1000")
)
SCREENING = (None, "bfloat16", "float16", "float32")
SEARCHED = {
    "k": (whole(1, 1 << 62), "a whole number of at least 1"),
    "error": (lambda x: number(x) and 0 <= x <= 1, "a chance"),
    "screen": (text, "a text"),
    "seed": (whole(0, 1 << 62), "a whole number"),
    "metric": (an_object, "a metric"),
}
ROWS = dict.fromkeys((SCORES, SCREEN), (whole(0, 1 << 62), "a whole number"))
CERTIFICATE = {
    **dict.fromkeys(
        ("k", "heads", "prompts", "scored", "left_out", "errors", "drawn", "dropped", "race_k"), (whole(0, 1 << 62), "a whole number")
    ),
    **dict.fromkeys(("error", "screen_allowed", "chance_left", "race_allowed", "chance"), (number, "a chance")),
    **dict.fromkeys(("error_mean", "error_sd", "error_largest"), (or_none(number), "a number or null")),
    **dict.fromkeys(("metric", "unit", "dtype", "screen_why", "race_bound", "race_about"), (text, "a text")),
    **dict.fromkeys(("by_root", "contradicted"), (flag, "true or false")),
    **dict.fromkeys(("extra", "rounds"), (list_of(whole(0, 1 << 62)), "a list of whole numbers")),
    "screen": (lambda x: x in SCREENING, "the dtype of a screening copy"),
    "work": (lambda x: isinstance(x, dict) and all(map(number, x.values())), "shares by name"),
}  # fmt: skip
DRAWN = ("top_k", "temperature", "seed")
GENERATION = {
    "max_new_tokens": (whole(0, 1 << 31), "a whole number"),
    "do_sample": (flag, "true or false"),
    "top_k": (whole(0, 1 << 31), "a whole number"),
    "temperature": (number, "a number"),
    "seed": (number, "a number"),
}
KINDS = {
    "ships": Kind("ships.ShipsResult", ("prompt", *HEAD), (SCORES,), _check_ships, _ships_tables),
    "subspace": Kind("subspace.SubspaceResult", HEAD, (SCORES, GRAMS), _check_subspace, _subspace_tables),
    "sahara": Kind(
        "sahara.SaharaResult", ("step", "beam", *HEAD), (SCORES, GRAMS, CONTROL), _check_sahara, _sahara_tables
    ),
    "top": Kind("top_heads.TopHeads", ("prompt", *HEAD), (SCORES, SCREEN), _check_top, _top_tables),
    "evaluate": Kind(
        "evaluation.EvalResult", ("group", "prompt"), (COMPLETIONS, CONTROL, SCORES),
        _check_evaluation, _evaluation_tables,
    ),
}  # fmt: skip
ROOMS = (SCORES, GRAMS, COMPLETIONS, CONTROL, BASIS, SCREEN)
