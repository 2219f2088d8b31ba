"""`resample` from prompts of other lengths, by brute force: each prompt's vectors are looked up in plain passes, position by
position, as the definitions say."""

import json

import numpy as np
import pytest

import shipsfast
from shipsfast.engine.ablation import Ablation
from shipsfast.engine.alignment import counterparts
from shipsfast.models.loading import load_model, load_tokenizer
from tests.support import hooks
from tests.support.alignments import aligned, by_definition
from tests.support.command_line import run
from tests.support.models import build

HEAD, TAIL = [5, 9, 17, 23], [40, 41]
# One template around all; the own middles have 3, 1, 4 and 1 tokens. The first and the fourth begin alike and their
# other prompts too, for a while.
PROMPTS = [[*HEAD, 7, 8, 11, *TAIL], [*HEAD, 7, *TAIL], [*HEAD, 30, 31, 32, 33, *TAIL], [*HEAD, 7, *TAIL]]
OTHERS = [[*HEAD, 50, *TAIL], [*HEAD, 51, 52, 53, 54, *TAIL], [*HEAD, 51, 52, *TAIL], [44, *TAIL]]
TOLERANCE_NATS = 1e-10
CUT = dict(chunk_tokens=20, rows_per_block=5, prompts_per_group=2)


@pytest.mark.parametrize("align", ["end", "template"])
def test_counterparts(align):
    rng = np.random.default_rng(0)
    for _ in range(500):
        own, other = ([*rng.integers(0, 3, rng.integers(1, 9))] for _ in range(2))
        wanted = [-1 if at is None else at for at in by_definition(own, other, align)]
        assert counterparts(own, other, align).tolist() == wanted


def test_examples():
    assert counterparts(PROMPTS[0], OTHERS[0], "template").tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 6]
    assert counterparts(PROMPTS[1], OTHERS[1], "template").tolist() == [0, 1, 2, 3, 6, 8, 9]
    assert counterparts(PROMPTS[0], OTHERS[0], "end").tolist() == [-1, -1, 0, 1, 2, 3, 4, 5, 6]
    assert counterparts([1, 2, 3], [1, 2], "template").tolist() == [0, 1, -1]


def expected(model, prompts, others, align):
    """KL of every head, [P, L, H], with hooks that put in the vectors."""
    scores = []
    for own, other in zip(prompts, others, strict=True):
        mine, theirs = hooks.resample_values(model, own), hooks.resample_values(model, other)
        values = aligned(mine, theirs, by_definition(own, other, align))
        base = hooks.forward(model, own).logits[-1]
        layers, heads = len(values), values[0].shape[1]
        scores.append(
            [
                [
                    hooks.kl_nats(
                        base,
                        hooks.forward(model, own, hooks.Off(((l, h),), "resample", values=values)).logits[-1],
                    )
                    for h in range(heads)
                ]
                for l in range(layers)
            ]
        )
    return np.array(scores)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "mistral-window"])
@pytest.mark.parametrize("align", ["end", "template"])
def test_scores(family, align):
    model = build(family)
    wanted = expected(model, PROMPTS, OTHERS, align)
    assert wanted.max() > 1e-4
    for options in ({}, dict(layers="model") | CUT):
        how = Ablation("resample", prompts=OTHERS, align=align)
        got = shipsfast.scan(model, PROMPTS, ablation=how, progress=False, **options)
        np.testing.assert_allclose(got.kl, wanted, rtol=0, atol=TOLERANCE_NATS)


@pytest.mark.parametrize("align", ["end", "template"])
def test_equal_lengths_are_matched_one_to_one_at_the_end(align):
    """And by template, as what differs has as many tokens on both sides."""
    model, others = build("llama-gqa"), [[3, *ids[1:4], 60, *ids[5:]] for ids in PROMPTS]
    exact = shipsfast.scan(model, PROMPTS, ablation=Ablation("resample", prompts=others), progress=False)
    how = Ablation("resample", prompts=others, align=align)
    got = shipsfast.scan(model, PROMPTS, ablation=how, progress=False)
    np.testing.assert_allclose(got.kl, exact.kl, rtol=0, atol=TOLERANCE_NATS)
    assert got.identity != exact.identity
    assert {"end": "at the end", "template": "by template"}[align] in got.record["ablation"]


def test_dataset_level_scan():
    model, how = build("llama-gqa"), Ablation("resample", prompts=OTHERS, align="end")
    got = shipsfast.scan_dataset(model, PROMPTS, ablation=how, progress=False).angle_deg
    values = []
    for own, other in zip(PROMPTS, OTHERS, strict=True):
        mine, theirs = hooks.resample_values(model, own), hooks.resample_values(model, other)
        values.append(aligned(mine, theirs, by_definition(own, other, "end")))
    oracle = hooks.Oracle(model, PROMPTS, "zero")
    oracle.kind, oracle.values = "resample", values
    np.testing.assert_allclose(got, oracle.angles_deg(1), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Ablation("resample", prompts=OTHERS, align="start"),
            "unknown align 'start'.*exact, end, template",
        ),
        (lambda: Ablation("zero", align="end"), "ablation zero aligns no prompts"),
    ],
)
def test_refused(make, message):
    with pytest.raises(shipsfast.InputError, match=message):
        make()


def test_ablate_matches_one_to_one():
    how = Ablation("resample", prompts=OTHERS[:1], align="end")
    off = shipsfast.ablate(build("llama-gqa"), [(0, 0)], ablation=how)
    with (
        pytest.raises(shipsfast.InputError, match="inside ablate, resample matches positions one to one"),
        off,
    ):
        pass


@pytest.mark.parametrize("align", ["end", "template"])
def test_on_the_command_line(capsys, tmp_path, model_folder, align):
    (tmp_path / "p.txt").write_text("How do I mend a kettle?\nTell me a story about a kite.\n")
    (tmp_path / "q.txt").write_text("How do I mend a very old kettle?\nTell me more.\n")
    status, out, _ = run(
        capsys, "scan", model_folder, tmp_path / "p.txt", "--ablation", "resample", "--source", tmp_path / "q.txt",
        "--align", align, "--heads", "0", "--json", "-q", "--out", tmp_path / "run",
    )  # fmt: skip
    assert status == 0 and align in json.loads(out)["record"]["ablation"]
    how = Ablation("resample", prompts=tuple((tmp_path / "q.txt").read_text().splitlines()), align=align)
    wanted = shipsfast.scan(
        load_model(str(model_folder)), (tmp_path / "p.txt").read_text().splitlines(),
        load_tokenizer(str(model_folder)), ablation=how, heads=[(0, None)], progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(shipsfast.load(tmp_path / "run").kl, wanted.kl)
