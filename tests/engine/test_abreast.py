"""Prompts of one length side by side, where a model looks at neighbours outside attention: the same scores as one by one, and as
the oracle's."""

import dataclasses

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.engine.measurement import ScanExecution
from shipsfast.engine.memory_plan import LEAST_ABREAST, Held, make_plan
from shipsfast.models.anatomy import inspect_model
from shipsfast.models.layer_call import LayerCall
from shipsfast.ops.masks import LayerMask
from shipsfast.ops.prefix_tree import pack, side_by_side
from tests.support import family_oracle
from tests.support.numerics import assert_close_abs
from tests.support.read_cases import CASES, how
from tests.support.tiny_configs import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Two lengths, in no order; one prompt twice, and one beginning.
PROMPTS = [
    [5, 9, 17, 7, 40],
    [5, 9, 17, 23, 33, 8, 11],
    [30, 31, 4, 2, 6],
    [5, 9, 17, 7, 40],
    [8, 9, 3, 3, 44, 51, 6],
]
FAMILIES = ["lfm2", "falcon_h1", "qwen3_next", "recurrent_gemma"]
CUTS = [{}, dict(prompts_per_group=2, rows_per_block=3, chunk_tokens=64), dict(prompts_per_group=1)]


def groups(result) -> list[int]:
    return result.record["plan"]["prompt_groups"]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores(family):
    model = tiny_model(family)
    expected = family_oracle.ships(model, PROMPTS)
    assert expected.amax((1, 2)).min() > 1e-4, "a prompt on which no head shows"
    found = [shipsfast.scan(model, PROMPTS, progress=False, **cut) for cut in CUTS]
    for got, cut in zip(found, CUTS, strict=True):
        assert_close_abs(got.kl, expected, 1e-12, str(cut))
        assert "side by side" in got.record["packs"]
    assert [groups(got) for got in found] == [[3, 2], [1, 2, 2], [1] * 5]


@pytest.mark.parametrize(("kind", "eps"), CASES)
def test_every_ablation(kind, eps):
    """`resample` puts in outputs that are each prompt's own: those go one by one."""
    model, ablation = tiny_model("lfm2"), how(kind, eps, at="all")
    if kind == "resample":
        ablation = dataclasses.replace(ablation, prompts=[[*ids[::-1]] for ids in PROMPTS])
    got = shipsfast.scan(model, PROMPTS, ablation=ablation, progress=False)
    assert groups(got) == ([1] * 5 if kind == "resample" else [3, 2])
    assert ("one prompt each" in got.record["packs"]) == (kind == "resample")
    if kind == "mean":
        ablation = dataclasses.replace(ablation, prompts=PROMPTS)  # of all, also where one is scanned
    for i, ids in enumerate(PROMPTS):
        own = ablation if kind != "resample" else dataclasses.replace(ablation, prompts=[ablation.prompts[i]])
        alone = shipsfast.scan(model, [ids], ablation=own, progress=False)
        assert_close_abs(got.kl[i], alone.kl[0], 1e-12, str(i))
    assert np.abs(got.kl).max() > 1e-4


@pytest.mark.parametrize("at", ["all", "end"])
def test_along_answers(at):
    """With heads off at the end only, every token of an answer ends a sequence, and those of one length go together."""
    model, answers = tiny_model("lfm2"), [[3, 14], [33], [8, 12], [7, 7], [9]]
    got = shipsfast.scan(model, PROMPTS, answers=answers, at=at, progress=False)
    reads = [p + a[:n] for p, a in zip(PROMPTS, answers, strict=True) for n in range(len(a))]
    assert_close_abs(np.concatenate(got.by_token), family_oracle.ships(model, reads, end=at == "end"), 1e-12)
    assert max(groups(got)) == 3


def test_hidden_states_and_angles():
    model = tiny_model("lfm2")
    one = shipsfast.scan_dataset(model, PROMPTS, rank=2, ablation="zero", prompts_per_group=1, progress=False)
    got = shipsfast.scan_dataset(model, PROMPTS, rank=2, ablation="zero", progress=False)
    assert_close_abs(got.angle_deg, one.angle_deg, 1e-9)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)).numpy()
    found = [
        shipsfast.scan(model, PROMPTS, metric=shipsfast.projection(vector, layer=1), progress=False, **cut)
        for cut in CUTS
    ]
    for each in found:
        assert_close_abs(each.scores, found[-1].scores, 1e-12)
    assert np.abs(found[0].scores).max() > 1e-3


def test_a_killed_scan_goes_on_in_the_same_groups(tmp_path, monkeypatch):
    from shipsfast.engine.growing_batch import GrowingBatch

    model, real, calls = tiny_model("lfm2"), GrowingBatch.run, []
    whole = shipsfast.scan(model, PROMPTS, progress=False)

    def run(self, *args, **kwargs):
        calls.append(self.packed.abreast)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GrowingBatch, "run", run)
    with pytest.raises(KeyboardInterrupt):
        shipsfast.scan(model, PROMPTS, out=tmp_path / "run", progress=False)
    got = shipsfast.scan(model, PROMPTS, out=tmp_path / "run", progress=False)
    assert np.array_equal(got.kl, whole.kl) and calls == [3, 2, 2]


# --- the parts ---------------------------------------------------------------------------------------------------


def test_sequences_are_those_of_packs_of_their_own():
    packed = side_by_side([p for p in PROMPTS if len(p) == 5], [(1, 4), (0,), (4,)])
    alone = [pack([p]) for p in PROMPTS if len(p) == 5]
    assert (packed.abreast, packed.length, packed.num_tokens) == (3, 5, 15)
    assert packed.token_ids.tolist() == [t for each in alone for t in each.token_ids]
    assert packed.position.tolist() == [p for each in alone for p in each.position]
    assert packed.subtree_end.tolist() == [5] * 5 + [10] * 5 + [15] * 5
    assert packed.last_index.tolist() == [4, 9, 14] and packed.read_index.tolist() == [1, 4, 5, 14]
    assert packed.path_nodes(1).tolist() == [5, 6, 7, 8, 9]
    first = packed.first_sequence()
    assert first.token_ids.tolist() == PROMPTS[0] and first.read_index.tolist() == [1, 4]
    with pytest.raises(ValueError, match=r"\[5, 7\] tokens cannot go side by side"):
        side_by_side(PROMPTS)


def test_what_belongs_to_each_sequence_goes_with_its_rows():
    """Rows of a batch are those of a row of ours, one after the other."""
    given = []

    def forward(hidden, own, shared, tables):
        given.extend([own, shared, tables])
        return hidden

    own, shared, tables = torch.randn(3, 5, 2), torch.randn(1, 5, 4), torch.randn(5, 3)
    call = LayerCall.of(forward, (torch.randn(3, 5, 8), own, shared, tables), {}, abreast=3)
    call(torch.randn(6, 5, 8))
    assert torch.equal(given[0], torch.cat([own, own])) and given[1] is shared and given[2] is tables
    mask = LayerMask.untouched(2, 4, torch.float32, "cpu").abreast(3)
    assert mask.logit_scale.shape == (6, 4)


def test_groups_fill_a_chunk_and_no_more():
    anatomy = inspect_model(tiny_model("lfm2"), PROMPTS[0], 40)
    prompts = [[i % 50 + 3] * n for n in (4, 6, 40) for i in range(30)]
    held = Held(torch.device("cpu"), torch.float32, abreast=True)
    plan = make_plan(anatomy, prompts, 4, ScanExecution(chunk_tokens=10 * LEAST_ABREAST), held)
    sizes = [(len(group), {len(prompts[i]) for i in group}) for group in plan.prompt_groups]
    # Short ones count as LEAST_ABREAST tokens each, and groups of one length are as equal as can be.
    assert sizes == [(10, {4})] * 3 + [(10, {6})] * 3 + [(7, {40}), (8, {40})] * 2
    assert sorted(i for group in plan.prompt_groups for i in group) == list(range(90))


def test_memory_for_all_rows_comes_before_wide_groups():
    """A block of all rows of a few prompts: side by side, prompts share nothing."""
    anatomy = inspect_model(tiny_model("lfm2"), PROMPTS[0], 10)
    prompts, held = [[3] * 10] * 20, Held(torch.device("cpu"), torch.float32, abreast=True)
    wide = make_plan(anatomy, prompts, 400, ScanExecution(), held)
    assert len(wide.prompt_groups) == 1 and wide.rows_per_block == 400
    less = make_plan(anatomy, prompts, 400, ScanExecution(max_memory=wide.predicted_bytes // 2), held)
    assert 1 < len(less.prompt_groups) < 20 and less.rows_per_block == 400
    assert less.predicted_bytes <= less.memory_limit_bytes
