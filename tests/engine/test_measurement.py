"""The descriptions that public functions, commands, run folders and other processes share."""

import dataclasses
import inspect
import json
import typing
from fractions import Fraction

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast import Ablation, InputError
from shipsfast.answers.measurements import (
    AsrMeasurement,
    DecodingExecution,
    EvaluationMeasurement,
    GenerationMeasurement,
)
from shipsfast.engine.measurement import ScanExecution, described
from shipsfast.results.head_map import HeadScore
from shipsfast.runs.kinds import Table
from shipsfast.scans import dataset, sahara, ships, top_heads
from shipsfast.scans.measurements import (
    DirectionMeasurement,
    SaharaMeasurement,
    ShipsMeasurement,
    SubspaceMeasurement,
)
from shipsfast.scans.token_measurement import TokensMeasurement
from shipsfast.scans.top_measurement import TopMeasurement
from tests.support.models import build

PROMPTS = ["Mend a kettle.", "Tell a story."]
MESSAGES = [{"role": "user", "content": "Mend a kettle."}]
FUNCTIONS = ("scan", "top_heads", "scan_dataset", "sahara", "top_tokens", "generate", "evaluate", "scan_asr")
WITH_A_TOKENIZER = ("top_tokens", "evaluate", "scan_asr")
DESCRIPTIONS = [
    ShipsMeasurement(prompts=PROMPTS, metric=["kl", shipsfast.logit_diff(3, 5)], nonfinite="mark"),
    ShipsMeasurement(
        prompts=[[1, 2], [3]], ablation=Ablation("resample", prompts=[[4, 5, 6], [6]], align="end")
    ),
    ShipsMeasurement(prompts=[MESSAGES], template="chat", system="", prefix="So", template_args={"a": [1]}),
    SubspaceMeasurement(prompts=PROMPTS, rank=2, unit="kv_group"),
    TopMeasurement(prompts=PROMPTS, k=3, error=0, screen="none", metric=["js"], nonfinite="mark", seed=2),
    SaharaMeasurement(prompts=PROMPTS, group_size=2, beam=3, heads=[(0, None), (1, 2)]),
    TokensMeasurement(prompts=PROMPTS, head=(0, 1), k=3),
    SaharaMeasurement(prompts=PROMPTS, control=["What is a mill?"], penalty=0.5, ablation="mean"),
    GenerationMeasurement(prompts=PROMPTS, groups=[[], [(0, 1)]], eos_token_id=[1, 2], seed=7),
    EvaluationMeasurement(prompts=PROMPTS, control=["What is a mill?"], judge="paper", keep_text=True),
    AsrMeasurement(prompts=PROMPTS, heads=[(0, 1)], ablation=Ablation("scale", 0.5)),
    DirectionMeasurement(prompts=PROMPTS, others=PROMPTS[:1], layer=np.int64(3), position=-2, seed=1),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_is_made_of_its_descriptions(name):
    function = getattr(shipsfast, name)
    parameters = inspect.signature(function).parameters
    keywords = described(function.measurement) | described(function.execution)
    assert list(parameters) == ["model", "prompts", "tokenizer", *keywords]
    assert parameters["scale"].default == 1e-5
    hints = typing.get_type_hints(function)
    assert set(hints) == {*parameters, "return"} - {"tokenizer"}
    needed = parameters["tokenizer"].default is inspect.Parameter.empty
    assert needed == (name in WITH_A_TOKENIZER)
    for each in parameters:
        assert f"\n    {each}: " in function.__doc__
    with pytest.raises(TypeError, match=rf"^{name}\(\) "):
        function()


@pytest.mark.parametrize("given", DESCRIPTIONS, ids=lambda m: f"{m.kind}-{m.ablation.kind}")
def test_a_measurement_as_json_and_back(given):
    body = json.loads(json.dumps(given.to_json()))
    again = type(given).from_json(body)
    assert again.to_json() == body
    metric = (
        {"metric": "kl"} if isinstance(given, ShipsMeasurement) else {}
    )  # an object comes back as its text
    assert dataclasses.replace(again, **metric) == dataclasses.replace(given, **metric)
    hash(again)


def test_every_kind_has_a_name_of_its_own():
    kinds = [m.kind for m in {type(each): each for each in DESCRIPTIONS}.values()]
    assert len(set(kinds)) == len(kinds)


def test_numbers_of_other_libraries_are_plain_ones_afterwards():
    heads = ((0, 1), (1, 2))
    for given in (
        np.array(heads), torch.tensor(heads), map(iter, heads), [np.array(h) for h in heads],
        [(np.int64(i), torch.tensor(j)) for i, j in heads], [HeadScore(i, j, 0.5) for i, j in heads],
    ):  # fmt: skip
        measurement = ShipsMeasurement(prompts=PROMPTS, heads=given)
        assert measurement == ShipsMeasurement(prompts=PROMPTS, heads=heads)
        assert {type(x) for head in measurement.heads for x in head} == {int}
    for scale in (np.float32(0.5), Fraction(1, 2)):
        body = ShipsMeasurement(prompts=PROMPTS, ablation=Ablation("scale", scale)).to_json()
        assert json.loads(json.dumps(body))["ablation"]["scale"] == 0.5
    for end in (np.array([3, 4]), [3, 4], iter([3, 4])):
        assert GenerationMeasurement(prompts=PROMPTS, eos_token_id=end).eos_token_id == (3, 4)
    body = EvaluationMeasurement(prompts=PROMPTS, keep_text=np.bool_(True)).to_json()
    assert json.loads(json.dumps(body))["keep_text"] is True


def test_a_description_does_not_change_with_its_callers_lists():
    control, metric, end = ["a"], ["kl"], [1]
    evaluation = EvaluationMeasurement(prompts=PROMPTS, control=control, eos_token_id=end)
    ships = ShipsMeasurement(prompts=PROMPTS, metric=metric)
    for each in (control, metric, end):
        each.append("js")
    assert (evaluation.control, evaluation.eos_token_id, ships.metric) == (("a",), (1,), ("kl",))


def test_another_scale_is_another_ablation():
    measurement = ShipsMeasurement(prompts=PROMPTS, ablation=Ablation("scale", 0.3))
    other = dataclasses.replace(measurement, ablation=Ablation("scale", 1e-5))
    assert other.ablation.scale == 1e-5
    with pytest.raises(TypeError):
        dataclasses.replace(measurement, scale=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        None, [], {}, {"kind": "subspace"}, {"kind": "ships"}, {"kind": "ships", "prompts": ["a"]},
        {"kind": "ships", "prompts": ["a"], "ablation": "zero"},
        {"kind": "ships", "prompts": ["a"], "ablation": {"sort": "zero"}},
        {"kind": "ships", "ablation": {"kind": "zero"}},
        {"kind": "ships", "prompts": ["a"], "ablation": {"kind": "zero"}, "colour": 1},
        AsrMeasurement(prompts=PROMPTS).to_json(),
    ],
)  # fmt: skip
def test_what_describes_no_measurement(body):
    with pytest.raises(InputError, match="does not describe a measurement of kind 'ships'"):
        ShipsMeasurement.from_json(body)


def test_what_cannot_be_sent_elsewhere():
    for metric in (lambda base, ablated, index: index, shipsfast.logit_diff("a,b", "c")):
        with pytest.raises(InputError, match="can be sent elsewhere|cannot be written as text"):
            ShipsMeasurement(prompts=PROMPTS, metric=metric).to_json()


@pytest.mark.parametrize(
    ("module", "name"),
    [(ships, "scan"), (dataset, "scan_dataset"), (sahara, "sahara"), (top_heads, "top_heads")],
)
def test_the_model_is_identified_before_the_work(module, name, monkeypatch):
    """So that a checkpoint that goes away meanwhile costs no finished scan, and the weights named are those measured."""
    order = []
    from shipsfast.engine import growing_batch, subject

    fingerprint, run = subject.fingerprint, growing_batch.GrowingBatch.run
    monkeypatch.setattr(
        subject, "fingerprint", lambda model: order.append("fingerprint") or fingerprint(model)
    )
    monkeypatch.setattr(
        growing_batch.GrowingBatch, "run", lambda *args, **how: order.append("run") or run(*args, **how)
    )
    more = {"sahara": {"group_size": 1}, "top_heads": {"screen": "float32"}}.get(name, {})
    getattr(module, name)(build(), [[5, 9, 17], [5, 9, 4]], progress=False, **more)
    assert order[0] == "fingerprint"
    assert order.count("fingerprint") == 1


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8GiB"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(ScanExecution, name) for name in ("chunk_tokens", "rows_per_block", "prompts_per_group", "max_memory")]
    + [(DecodingExecution, "batch_rows"), (DecodingExecution, "max_memory")],
)
def test_parts_of_the_plan_are_whole_numbers(kind, name, value):
    with pytest.raises(InputError, match=f"^{name} must be a whole number of at least 1, got {value!r}$"):
        kind(**{name: value})


def test_what_no_run_folder_holds_is_refused():
    with pytest.raises(InputError, match="^max_memory must be at most 4,611,686,018,427,387,904, got"):
        ScanExecution(max_memory=2**62 + 1)


def test_a_number_of_an_array_is_kept_as_pythons():
    found = ScanExecution(chunk_tokens=np.int64(30))
    assert type(found.chunk_tokens) is int


def test_a_table_has_columns_of_known_types():
    with pytest.raises(AssertionError, match="no type for"):
        Table({"prompt": 2}, "norm")
