"""Heads that are off only at the token that is read: every kind against plain passes in which the head's output is the ablated
one at that token, and earlier keys and values are those of the unablated model (tests/support/reads_oracle.py)."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
from shipsfast import Ablation
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.ops.extension import extension_status
from tests.support.family_oracle import Off, forward, oracle_attention
from tests.support.hooks import principal_angles_deg
from tests.support.models import HEADS, LAYERS, build
from tests.support.numerics import assert_close_abs
from tests.support.read_cases import (
    CASES,
    CUT,
    FUSED,
    MODELS,
    PROMPTS,
    TOLERANCE,
    expected,
    how,
    model_of,
)  # fmt: skip
from tests.support.reads_oracle import Reads, mean_values

EXTENSION = extension_status()[0]
BACKENDS = ["torch", "reference", *["cpp"] * EXTENSION]
by_case = pytest.mark.parametrize(("kind", "eps"), CASES, ids=[kind for kind, _ in CASES])
needs_extension = pytest.mark.skipif(not EXTENSION, reason=f"needs the extension: {extension_status()[1]}")


def scan(name: str, ablation, prompts=PROMPTS, **options):
    return shipsfast.scan(model_of(name), prompts, ablation=ablation, progress=False, **options)


@by_case
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_equals_plain_passes(name, kind, eps):
    wanted = expected(name, kind, eps).means()
    assert (wanted.max((0, 2)) > 1e-6).all(), "the ablations of this model do not show in every layer"
    got = scan(name, how(kind, eps))
    assert_close_abs(got.kl, wanted, TOLERANCE)
    assert abs(got.kl - expected(name, kind, eps, "all").means()).max() > 1e-4  # it is another question


@pytest.mark.parametrize("align", ["end", "template"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2-softcap-window"])
def test_resample_from_prompts_of_other_lengths(name, align):
    wanted = expected(name, "resample", align=align).means()
    for options in ({}, dict(layers="model") | CUT):
        got = scan(name, how("resample", align=align), **options)
        assert_close_abs(got.kl, wanted, TOLERANCE, str(options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-softcap-window", "gpt_oss"])
def test_cut_into_chunks_blocks_and_groups(name, backend, monkeypatch):
    monkeypatch.setattr("shipsfast.ops.end_attention.LOGIT_BYTES", 1)  # a row at a time
    for kind in ("undifferentiated", "head_mean_k", "mean", "resample"):
        got = scan(name, how(kind), backend=backend, layers="model", **CUT)
        assert got.record["attention_backend"] == backend
        assert got.record["end_attention"] == ("cpp" if backend == "cpp" else "torch")
        assert_close_abs(got.kl, expected(name, kind).means(), TOLERANCE, kind)


@needs_extension
@by_case
@pytest.mark.parametrize("name", FUSED)
def test_layers_named(name, kind, eps):
    """Each way through a layer that a caller can ask for."""
    for options in (dict(layers="model"), dict(layers="fused") | CUT):
        got = scan(name, how(kind, eps), **options)
        assert_close_abs(got.kl, expected(name, kind, eps).means(), TOLERANCE, str(options))


@pytest.mark.parametrize("kind", ["undifferentiated", "head_mean_k", "mean", "zero"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-softcap-window"])
def test_whole_key_value_groups(name, kind):
    wanted = expected(name, kind, unit="kv_group").means()
    assert wanted.shape == (len(PROMPTS), LAYERS, 2)
    for options in ({}, CUT):
        got = scan(name, how(kind), unit="kv_group", **options)
        assert_close_abs(got.kl, wanted, TOLERANCE, str(options))


def test_some_heads_only():
    got = scan("llama-gqa", how("mean"), heads=[(2, 0), (0, 3), (1, None)]).kl
    scanned = np.zeros((LAYERS, HEADS), bool)
    scanned[2, 0] = scanned[0, 3] = scanned[1] = True
    assert np.array_equal(~np.isnan(got), np.broadcast_to(scanned, got.shape))
    assert_close_abs(got[:, scanned], expected("llama-gqa", "mean").means()[:, scanned], TOLERANCE)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_mean_over_another_set(name):
    """Over all tokens of the set, though heads are off at one token."""
    model, others = model_of(name), [[44, 45, 46, 47, 48, 49], [44, 45], [50]]
    values = [mean_values(model, others)] * len(PROMPTS)
    wanted = Reads(
        model, PROMPTS, [[len(ids) - 1] for ids in PROMPTS], "mean", at="end", values=values
    ).means()
    assert_close_abs(scan(name, Ablation("mean", prompts=others, at="end")).kl, wanted, TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_in_the_last_layer_nothing_looks_back(name):
    """No later attention reads what a head left at earlier tokens, so there both are the same."""
    if name == "lfm2":
        pytest.skip("a convolution that looks back follows its only layer of attention")
    for kind in ("undifferentiated", "scale", "head_mean_q"):
        end, every = (scan(name, how(kind, 1e-5, at)).kl[:, -1] for at in ("end", "all"))
        assert_close_abs(end, every, TOLERANCE, kind)


def test_prompts_of_one_token():
    """Nothing lies before the end."""
    prompts = [[6], [9], [6]]
    end, every = (scan("llama-gqa", how("zero", at=at), prompts).kl for at in ("end", "all"))
    assert every.max() > 1e-3
    assert_close_abs(end, every, TOLERANCE)


def test_rows_are_as_wide_as_their_ends(monkeypatch):
    """What passes a layer for an ablation is its ends, not its prompts: else it would cost what at="all" costs."""
    model, prompts = build("llama-gqa"), [[5, 6, 7, *range(10, 40)], [5, 6, 7, *range(12, 42)]]
    mlp, run = type(model.model.layers[0].mlp), GrowingBatch.run
    forward, tokens, inside = mlp.forward, [], []

    def counted(self, x):
        tokens.extend([x.shape[:-1].numel()] * len(inside))
        return forward(self, x)

    def batch(*args, **kwargs):
        inside.append(1)
        run(*args, **kwargs)
        inside.clear()

    monkeypatch.setattr(mlp, "forward", counted)
    monkeypatch.setattr(GrowingBatch, "run", batch)

    def passed(at: str, heads: int) -> int:
        tokens.clear()
        off = dict(ablation=Ablation("zero", at=at), heads=[(0, head) for head in range(heads)])
        shipsfast.scan(model, prompts, **off, layers="model", rescored=0, progress=False)
        return sum(tokens)

    wider = {at: passed(at, 4) - passed(at, 2) for at in ("end", "all")}
    assert wider == {"end": 2 * LAYERS * 2, "all": 2 * ((LAYERS - 1) * (3 + 2 * 30) + 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2-softcap-window"])
def test_narrower_dtypes_are_off_as_much_as_everywhere(name, dtype):
    """Errors of a scan at the end are no larger than twice those of heads that are off everywhere."""
    narrow = build(name, dtype)
    wide, error = build(name, dtype).double(), {}
    reads = [[len(ids) - 1] for ids in PROMPTS]
    for at in ("end", "all"):
        got = shipsfast.scan(narrow, PROMPTS, ablation=Ablation("scale", 0.3, at=at), progress=False)
        error[at] = abs(got.kl - Reads(wide, PROMPTS, reads, "scale", 0.3, at).means()).max()
    assert error["end"] <= 2 * error["all"] and error["all"] < {torch.float32: 1e-5}.get(dtype, 0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_large_products_of_queries_and_keys(dtype):
    """Of large biases, as some models have: too large for float16 before they are scaled, and too coarse in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    narrow = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for attention in (layer.self_attn for layer in narrow.model.layers):
            for part in (attention.k_proj, attention.q_proj):
                part.bias.normal_(std=100)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                part.weight.normal_(std=0.15)
    narrow = narrow.to(dtype)
    wide, reads = copy.deepcopy(narrow).double(), [[len(ids) - 1] for ids in PROMPTS]
    error, how = {}, dict(backend="torch", layers="model", rescored=0, progress=False)
    for at in ("end", "all"):
        got = shipsfast.scan(narrow, PROMPTS, ablation=Ablation("zero", at=at), **how)
        error[at] = abs(got.kl - Reads(wide, PROMPTS, reads, "zero", at=at).means()).max()
    assert error["end"] <= 5 * error["all"]


# --- scans of a whole data set ----------------------------------------------------------------------------------


def hidden(model, heads, kind: str = "zero") -> np.ndarray:
    """Hidden states after the final norm at each prompt's last token, [P, hidden], with heads off there only."""
    out = []
    with oracle_attention(model):
        for ids in PROMPTS:
            where = torch.zeros(1, len(ids), dtype=torch.bool)
            where[0, -1] = True
            found = forward(
                model, ids, Off(tuple(heads), kind, where=where), use_cache=False, output_hidden_states=True
            )
            out.append(found.hidden_states[-1][0, -1])
    return torch.stack(out).numpy()


def angle_deg(base: np.ndarray, other: np.ndarray, rank: int = 1) -> float:
    spans = (np.linalg.svd(x, full_matrices=False)[0][:, :rank] for x in (base, other))
    return float(principal_angles_deg(*spans).sum())


@pytest.mark.parametrize("name", ["llama-gqa", "gpt_oss"])
@pytest.mark.parametrize("kind", ["undifferentiated", "head_mean_k", "zero"])
def test_dataset_level_scan(name, kind):
    model = model_of(name)
    base, layers = hidden(model, ()), model.config.num_hidden_layers
    wanted = [[angle_deg(base, hidden(model, [(i, h)], kind)) for h in range(HEADS)] for i in range(layers)]
    for options in ({}, CUT):
        got = shipsfast.scan_dataset(model, PROMPTS, ablation=kind, at="end", progress=False, **options)
        assert_close_abs(got.angle_deg, np.array(wanted), 1e-9, str(options))


def test_sahara():
    """The second head of a group is the one that turns most with the first one off, both at the end only."""
    model = model_of("llama-gqa")
    got = shipsfast.sahara(model, PROMPTS, ablation="zero", at="end", group_size=2, progress=False)
    base, units = hidden(model, ()), [(i, h) for i in range(LAYERS) for h in range(HEADS)]
    group: list = []
    for step in range(2):
        angles = {u: angle_deg(base, hidden(model, [*group, u])) for u in units if u not in group}
        for unit, angle in angles.items():
            assert_close_abs(got.angle_deg[step][unit], angle, 1e-9, str(unit))
        group.append(max(angles, key=angles.get))
    assert got.heads == group


# --- where it is kept, and on the command line -------------------------------------------------------------------


def test_a_killed_scan_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    options = dict(rows_per_block=2, prompts_per_group=2)
    whole = scan("llama-gqa", how("resample"), out=tmp_path / "whole", **options)
    real, calls = GrowingBatch.run, []

    def run(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GrowingBatch, "run", run)
    with pytest.raises(KeyboardInterrupt):
        scan("llama-gqa", how("resample"), out=tmp_path / "run", **options)
    partial = shipsfast.load(tmp_path / "run")
    assert partial.record["status"] == "running" and 0 < np.isfinite(partial.kl).sum() < partial.kl.size
    scan("llama-gqa", how("resample"), out=tmp_path / "run", **options)
    resumed = shipsfast.load(tmp_path / "run")
    assert np.array_equal(resumed.kl, whole.kl) and resumed.record["status"] == "complete"
    assert resumed.record["ablation"] == "resample (at the end only)"


def test_a_run_of_heads_off_everywhere_is_another(tmp_path):
    scan("llama-gqa", how("zero", at="all"), out=tmp_path / "run")
    with pytest.raises(shipsfast.InputError, match="another run.*ablation"):
        scan("llama-gqa", how("zero"), out=tmp_path / "run")


def test_the_keyword_goes_into_the_ablation():
    got = scan("llama-gqa", "zero", at="end")
    assert np.array_equal(got.kl, scan("llama-gqa", how("zero")).kl)
    assert np.array_equal(scan("llama-gqa", "zero", at="all").kl, scan("llama-gqa", "zero").kl)
