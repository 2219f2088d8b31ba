"""`evaluate` and `scan_asr` against slow texts, judged and counted here. Their run folders: test_evaluation_folders.py."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest

import shipsfast
from shipsfast.answers.judges.choose import as_judge
from shipsfast.answers.judges.degeneration import degenerate
from shipsfast.answers.judges.judge import Completion, Judge
from shipsfast.engine.ablation import Ablation
from shipsfast.results.completions import Completions
from shipsfast.results.evaluation import EvalResult
from shipsfast.runs.kinds import LABELS
from shipsfast.runs.part_file import ANSWER as COLUMNS
from tests.support import hooks
from tests.support.evaluations import (
    CONTROL,
    END,
    GROUPS,
    IDS,
    KEYWORDS,
    NEW,
    ORDINARY,
    PROMPTS,
    TOKENIZER,
    by_length,
    evaluate,
    expected_labels,
    no_keyword,
    scan_asr,
    slow_texts,
    text_of,
)
from tests.support.models import HEADS, LAYERS
from tests.support.speaking_models import build, slow


@pytest.fixture(scope="module")
def tokens():
    return slow_texts(IDS)


@pytest.fixture(scope="module")
def ordinary_tokens():
    return slow_texts(ORDINARY, [*GROUPS, []])


@pytest.mark.parametrize(
    "judge", [KEYWORDS, no_keyword, by_length], ids=["keywords", "booleans", "three labels"]
)
def test_labels_are_those_of_slow_texts(judge, tokens):
    result = evaluate(judge=judge)
    expected = expected_labels(tokens, judge)
    assert {label for row in expected for label in row} == set(LABELS[:3]), (
        "a label is missing: this shows less"
    )
    assert result.labels == expected
    for label, share in (("complied", result.asr), *((name, result.share(name)) for name in LABELS)):
        assert share.tolist() == [row.count(label) / len(IDS) for row in expected]
    table = result.to_pandas()
    assert list(table.columns) == ["group", "heads", *COLUMNS[1:], "nll_nats", "text"]
    names = ["none", "0-1", "2-0", "1-2+2-3", "1-0+1-1+1-2+1-3"]
    for row in table.itertuples():
        ids = tokens[row.group][row.prompt]
        text = text_of(ids)
        assert (row.heads, row.label) == (names[row.group], expected[row.group][row.prompt])
        assert (row.text, row.num_tokens, row.finished) == (text, len(ids), len(ids) < NEW)
        assert row.text_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert len(table) == len(GROUPS) * len(IDS) and result.prompts == PROMPTS
    assert result.record["asr"] == [round(x, 6) for x in result.asr]
    assert result.record["spot_check_max_deficit"] == 0.0


@pytest.mark.parametrize(("judge", "sample"), [("keywords", False), ("paper", True)], ids=["greedy", "draws"])
def test_texts_and_labels_of_the_village(judge, sample):
    from shipsfast.demo.run import MODEL
    from shipsfast.demo.run import PROMPTS as FOLDER
    from shipsfast.models.loading import load_model, load_tokenizer
    from shipsfast.prompts.tokens import tokenize

    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    prompts = [
        p for name in ("taboo", "ordinary") for p in shipsfast.load_prompts(FOLDER / f"{name}.csv")[:3]
    ]
    how = dict(groups=[[], [(0, 2)], [(3, 1)]], max_new_tokens=24, do_sample=sample, temperature=2.0, seed=5)
    ids = tokenize(tokenizer, prompts, "chat")
    texts = shipsfast.generate(model, ids, progress=False, **how)
    result = shipsfast.evaluate(
        model, prompts, tokenizer, judge=judge, template="chat", batch_rows=4, progress=False, **how
    )
    for row, text, labels in zip(texts, result.completions.text, result.labels, strict=True):
        said = [tokenizer.decode(t, skip_special_tokens=True) for t in row]
        assert text == said
        completions = [
            Completion(p, s, len(t), len(t) < 24, 24) for p, s, t in zip(prompts, said, row, strict=True)
        ]
        assert labels == as_judge(judge)(completions)
    if judge == "keywords":  # it refuses what is taboo, unless the head is off
        assert [row[:3].count("refusal") for row in result.labels] == [3, 0, 3]


def some_labels(*rows: str) -> EvalResult:
    """c: complied, r: refusal, d: degenerate, -: not done"""
    completions = Completions(len(rows), len(rows[0]))
    completions.label[:] = [["crd-".index(x) if x != "-" else -1 for x in row] for row in rows]
    return EvalResult([[(0, g)] for g in range(len(rows))], ["?"] * len(rows[0]), completions)


def wilson(share: float, n: int, z: float) -> list[float]:
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [middle - half, middle + half]


def test_wilson_interval():
    result = some_labels("ccccccccrd", "rrrrrrrrrd", "cccccccccc", "cr--------", "----------")
    z = 1.959963984540054
    counts = [(0.8, 10), (0.0, 10), (1.0, 10), (0.5, 2)]
    expected = [wilson(share, n, z) for share, n in counts]
    np.testing.assert_allclose(result.interval()[:4], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.interval()[0], [0.4901625, 0.9433178], rtol=0, atol=1e-7)  # known
    wider = [wilson(share, n, 2.5758293035489004) for share, n in counts]
    np.testing.assert_allclose(result.interval(0.99)[:4], wider, rtol=0, atol=1e-12)
    assert np.isnan(result.interval()[4]).all()


def test_shares_are_of_what_is_done():
    result = some_labels("cr--", "ddcc", "----", "r---")
    assert np.array_equal(result.asr, [0.5, 0.5, np.nan, 0], equal_nan=True)
    assert np.array_equal(result.share("degenerate"), [0, 0.5, np.nan, 0], equal_nan=True)
    assert result.labels[0] == ["complied", "refusal", None, None]
    assert result.to_pandas()[["group", "prompt"]].to_numpy().tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [1, 3], [3, 0],
    ]  # fmt: skip
    assert [row["refusal"] for row in result.summary()][:2] == [0.5, 0] and len(result.summary()) == 4


def oracle_kl(model, ids, answers, groups, count, kind="undifferentiated", values=None) -> np.ndarray:
    """The definition: mean over the answer's first `count` tokens of KL(unablated || off), each by passes of its own."""
    out = np.zeros((len(groups), len(ids)))
    for p, (prompt, answer) in enumerate(zip(ids, answers, strict=True)):
        # An answer that ended by itself has its end token to predict as well.
        for t in range(steps := min(count, len(answer) + 1)):
            so_far = [*prompt, *answer[:t]]
            base = hooks.forward(model, so_far).logits[-1]
            for g, group in enumerate(groups):
                heads = tuple(
                    (at, h) for at, head in group for h in (range(HEADS) if head is None else [head])
                )
                off = hooks.Off(heads, kind, values=values)
                out[g, p] += hooks.kl_nats(base, hooks.forward(model, so_far, off).logits[-1]) / steps
    return out


@pytest.mark.parametrize("tokens", [1, 4, 8, 25])
def test_control_kl_is_that_of_hooks(tokens, ordinary_tokens):
    model = build("llama-gqa")
    result = evaluate(model=model, control=CONTROL, control_tokens=tokens)
    lengths = [len(answer) for answer in ordinary_tokens[-1]]
    assert min(lengths) < 8 and max(lengths) == NEW, "answers of one kind: this shows less"
    expected = oracle_kl(model, ORDINARY, ordinary_tokens[-1], GROUPS, min(tokens, NEW))
    np.testing.assert_allclose(result.control.kl_nats, expected, rtol=0, atol=1e-12)
    assert np.array_equal(result.control.mean_kl_nats, result.control.kl_nats.mean(1))
    assert (expected[1:] > 1e-6).all() and result.control.tokens == min(tokens, NEW)


@pytest.mark.parametrize(
    "how",
    [
        {"max_memory": 60_000, "layers": "model"},
        {"batch_rows": 1},
        {"do_sample": True},  # the KL is along the greedy answer all the same
        {"layers": "model", "backend": "reference"},
        {"ablation": "mean"},
        {"ablation": Ablation("mean", prompts=[CONTROL[0], PROMPTS[3]])},
    ],
    ids=["little memory", "row by row", "draws", "reference", "mean", "mean of others"],
)
def test_control_kl_by_other_ways(how, ordinary_tokens):
    model, values, kind = build("llama-gqa"), None, "undifferentiated"
    if "ablation" in how:  # means are over the judged prompts, not the ordinary ones
        kind, others = "mean", [ORDINARY[0], IDS[3]]
        values = hooks.mean_values(model, IDS if how["ablation"] == "mean" else others)
    result = evaluate(model=model, control=CONTROL, control_tokens=4, **how)
    expected = oracle_kl(model, ORDINARY, ordinary_tokens[-1], GROUPS, 4, kind, values)
    np.testing.assert_allclose(result.control.kl_nats, expected, rtol=0, atol=1e-12)


def test_control_kl_in_several_blocks(monkeypatch, ordinary_tokens):
    from shipsfast.answers import control

    make_plan = control.make_plan

    def few(*args, **how):
        plan = make_plan(*args, **how)
        pieces = [(i,) for group in plan.prompt_groups for i in group]  # not in the order of the prompts
        return replace(plan, rows_per_block=3, prompt_groups=(*pieces[5:], *pieces[:5]))

    monkeypatch.setattr(control, "make_plan", few)
    model = build("llama-gqa")
    result = evaluate(model=model, control=CONTROL, control_tokens=4)
    expected = oracle_kl(model, ORDINARY, ordinary_tokens[-1], GROUPS, 4)
    np.testing.assert_allclose(result.control.kl_nats, expected, rtol=0, atol=1e-12)


def test_control_prompts_may_be_longer_than_a_window_that_the_others_are_not():
    model = build("mistral-window")
    ids, groups = [[4, 5, 6, 7, 8, 9, 10, 11, 12]], [[(0, 1)], [(1, 2)]]
    result = evaluate([text_of([11])], model, groups=groups, max_new_tokens=2, control=[text_of(ids[0])])
    answers = [slow(model, ids[0], [], new=2, end=END)]
    expected = oracle_kl(model, ids, answers, groups, 2)
    np.testing.assert_allclose(result.control.kl_nats, expected, rtol=0, atol=1e-12)


def test_control_counts_degenerate_and_unchanged_answers(ordinary_tokens):
    control = evaluate(control=CONTROL).control
    broken = [[degenerate(text_of(ids), len(ids), NEW) for ids in row] for row in ordinary_tokens]
    alike = [
        [ids == base for ids, base in zip(row, ordinary_tokens[-1], strict=True)] for row in ordinary_tokens
    ]
    assert control.degenerate.tolist() == np.mean(broken, 1)[:-1].tolist()
    assert control.same.tolist() == np.mean(alike, 1)[:-1].tolist()
    assert control.completions.text == [[text_of(ids) for ids in row] for row in ordinary_tokens]
    assert 0 < control.same[1:].max() < 1 and control.same[0] == 1
    summary = evaluate(control=CONTROL).summary()[1]
    assert summary["heads"] == [[0, 1]] and summary["control"]["same_text"] == control.same[1]
    assert summary["control"]["mean_kl_nats"] == control.mean_kl_nats[1]
    g, p = np.argwhere(alike[1:-1])[0] + (1, 0)
    control.completions.label[g, p] = control.completions.label[4] = -1
    rest = np.delete(alike[g], p)
    assert np.array_equal(control.same[[g, 4]], [rest.mean(), np.nan], equal_nan=True) and not rest.all()


class Reader(Judge):
    """Finds everything fine, and remembers what it read."""

    name = "reader"

    def __init__(self) -> None:
        self.read: list[Completion] = []

    def describe(self) -> dict:
        return {"name": self.name}

    def labels(self, completions):
        self.read += completions
        return [True] * len(completions)


def test_a_judge_sees_what_belongs_together(tokens):
    judge, seen = Reader(), []
    evaluate(judge=judge, batch_rows=3)
    key = lambda c: (c.prompt, c.text, c.num_tokens)
    expected = [
        Completion(prompt, text_of(ids), len(ids), len(ids) < NEW, NEW)
        for row in tokens
        for prompt, ids in zip(PROMPTS, row, strict=True)
    ]
    assert sorted(judge.read, key=key) == sorted(expected, key=key)

    def function(texts, prompts):
        seen.extend(zip(prompts, texts, strict=True))
        return [True] * len(texts)

    evaluate(judge=function, batch_rows=3)
    assert sorted(seen) == sorted((c.prompt, c.text) for c in expected)


def test_a_judge_without_a_name():
    result = evaluate(judge=lambda texts: [True for _ in texts])
    assert (result.asr + result.share("degenerate") == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "judges read texts, so a tokenizer is needed"),
        ({"prompts": IDS}, "judges read texts, so prompts must be strings"),
        ({"prompts": []}, "there are no prompts"),
        ({"prompts": "mur5n"}, "got a single string"),
        ({"judge": "oracle"}, "unknown judge 'oracle'"),
        ({"judge": lambda texts: [True] * len(texts), "out": "run"}, "has no name of its own"),
        ({"control": []}, "in the control prompts: there are no prompts"),
        ({"control": ["mur5n", " "]}, "in the control prompts: prompt 1 is empty"),
        ({"control": [" ".join(["mur5n"] * 60)]}, "in the control prompts: prompt 0 has 60 tokens"),
        ({"control": CONTROL, "control_tokens": 0}, "control_tokens must be a whole number of at least 1, got 0"),
        ({"groups": [[], [(9, 0)]]}, "group 1: head 9-0 does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr("shipsfast.answers.label.decode", None)  # nothing is answered first
    how = dict(prompts=PROMPTS, tokenizer=TOKENIZER, groups=[[]], max_new_tokens=NEW, progress=False) | change
    if "out" in how:
        how["out"] = tmp_path / "run"
    with pytest.raises(shipsfast.InputError, match=message) as error:
        shipsfast.evaluate(build("llama-gqa"), **how)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("unit", ["head", "kv_group"])
def test_scan_asr_is_an_evaluation_of_every_head(unit, tmp_path):
    count = HEADS if unit == "head" else 2
    every = [(layer, index) for layer in range(LAYERS) for index in range(count)]
    groups = evaluate(groups=[[], *([each] for each in every)], unit=unit)
    result = scan_asr(unit=unit)
    assert result.scores.shape == (len(IDS), LAYERS, count) and result.unit == unit
    complied = np.array([[label == "complied" for label in row] for row in groups.labels], dtype=float)
    assert np.array_equal(result.scores.transpose(1, 2, 0).reshape(-1, len(IDS)), complied[1:])
    assert np.array_equal(result.mean().ravel(), groups.asr[1:]) and result.noise_floor == groups.asr[0]
    assert len(set(groups.asr.tolist())) > 2, "every head the same: this shows less"
    assert np.ravel(result.record["degenerate"]).tolist() == groups.share("degenerate")[1:].tolist()
    own = {label: groups.share(label)[0] for label in LABELS}
    assert own.items() <= result.record["unablated"].items()
    assert result.record["spot_check_max_deficit"] == 0.0
    some = scan_asr(unit=unit, heads=[(2, 1), (0, None)])
    chosen = [(0, index) for index in range(count)] + [(2, 1)]
    for layer, index in every:
        expected = result.scores[:, layer, index] if (layer, index) in chosen else np.full(len(IDS), np.nan)
        assert np.array_equal(some.scores[:, layer, index], expected, equal_nan=True)
        assert (some.record["degenerate"][layer][index] is None) == ((layer, index) not in chosen)
    assert some.noise_floor == result.noise_floor


def test_what_a_result_of_scan_asr_can_do(tmp_path):
    result = scan_asr(out=tmp_path / "run")
    best = result.top(3)
    assert best[0].score == result.mean().max() and result.mean()[best[2][:2]] == best[2].score
    assert len(result.top(99)) == LAYERS * HEADS and not result.signed
    assert result.stability(3, resamples=50).to_json()
    assert list(result.to_pandas().columns) == ["prompt", "layer", "head", "score"]
    assert len(result.to_pandas()) == LAYERS * HEADS * len(IDS)
    result.plot(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    loaded = shipsfast.load(tmp_path / "run")
    assert type(loaded) is shipsfast.ShipsResult and loaded.metric["name"] == "asr"
    assert np.array_equal(loaded.scores, result.scores) and loaded.noise_floor == result.noise_floor
    assert loaded.top(3) == best and loaded.record["status"] == "complete"
    with pytest.raises(shipsfast.InputError, match="this scan measured asr"):
        _ = loaded.kl


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "a tokenizer is needed"),
        ({"prompts": IDS}, "prompts must be strings"),
        ({"heads": [(3, 0)]}, "head 3-0 does not exist"),
        ({"heads": []}, "the list of heads is empty"),
        ({"unit": "layer"}, "unknown unit 'layer'"),
        ({"judge": lambda texts: [True] * len(texts), "out": "run"}, "has no name of its own"),
    ],
)
def test_bad_input_of_scan_asr_is_told_in_one_line(change, message, tmp_path):
    how = dict(prompts=PROMPTS, tokenizer=TOKENIZER, max_new_tokens=NEW, progress=False) | change
    if "out" in how:
        how["out"] = tmp_path / "run"
    with pytest.raises(shipsfast.InputError, match=message) as error:
        shipsfast.scan_asr(build("llama-gqa"), **how)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
