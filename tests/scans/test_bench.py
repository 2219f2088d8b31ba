"""`shipsfast bench`: what it measures, and the one thing it suggests."""

import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import shipsfast
from shipsfast import cli
from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.engine.flops import model_flops, scan_flops
from shipsfast.engine.measurement import ScanExecution
from shipsfast.ops import half_products
from shipsfast.ops.extension import extension_status
from shipsfast.ops.prefix_tree import pack
from shipsfast.scans import bench as bench_module
from shipsfast.scans.bench import bench, random_prompts, sample_heads, suggest
from shipsfast.scans.measurements import ShipsMeasurement
from shipsfast.scans.prepare import prepare
from tests.support.models import HEADS, LAYERS, build

IDS = [[3, 4, 5, 6], [3, 4, 9]]
needs_extension = pytest.mark.skipif(not extension_status()[0], reason="needs the extension")


def prepared(dtype=torch.float32, **options):
    model = build("llama-gqa", dtype)
    return prepare(model, None, ShipsMeasurement(prompts=IDS), ScanExecution(**options))


def test_figures_belong_together():
    model = build("llama-gqa", torch.float32)
    result = bench(model, IDS, seconds=60, progress=False)
    assert (
        result.heads == result.all_heads == LAYERS * HEADS
        and result.prompts == 2
        and result.packed_tokens == 5
    )
    assert result.ablations_per_s == pytest.approx(LAYERS * HEADS * 2 / result.seconds)
    assert result.tokens_per_s == pytest.approx(LAYERS * HEADS * 7 / result.seconds)
    assert result.all_heads_s == pytest.approx(result.seconds)
    assert result.share_of_floor == pytest.approx(result.floor_s / result.all_heads_s)
    assert result.attention_backend and result.kl_backend and result.layers and result.plan
    assert result.peak_mib is None or result.peak_mib >= 0
    json.dumps(result.to_json())


@needs_extension
@pytest.mark.parametrize("gain", [4.0, 0.2], ids=["units", "no-units"])
def test_the_floor_is_of_the_products_that_run(gain, monkeypatch):
    """Of a half-precision model on a processor that is no faster at it, those in float32."""
    monkeypatch.setattr(half_products, "_gain", lambda _dtype: gain)
    seen = []
    monkeypatch.setattr(
        bench_module, "gemm_flops_per_s", lambda *args, dtype, **kwargs: seen.append(dtype) or 1e9
    )
    monkeypatch.setattr(bench_module, "faster_dtype", lambda *args: seen.append(args[2]))
    bench(build("llama-gqa", torch.bfloat16), IDS, seconds=1e-6, progress=False)
    assert set(seen) == {torch.bfloat16 if gain > 1 else torch.float32}


def test_a_sample_stands_for_all_heads(monkeypatch):
    monkeypatch.setattr(bench_module, "gemm_flops_per_s", lambda *args, **kwargs: 1e9)
    model = build("llama-gqa", torch.float32)
    result = bench(model, IDS, seconds=1e-6, progress=False)
    assert result.heads == LAYERS and result.layers == "fused"
    costs = model_flops(model, prepared().anatomy, fused=True)
    units = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    ratio = scan_flops(costs, [pack(IDS)], units) / scan_flops(
        costs, [pack(IDS)], [(i, 0) for i in range(LAYERS)]
    )
    assert result.all_heads_s == pytest.approx(result.seconds * ratio)
    assert result.floor_s == pytest.approx(scan_flops(costs, [pack(IDS)], units) / 1e9)


def test_samples_are_as_many_as_fit():
    ready = prepared()
    assert sample_heads(ready, len, 3 * LAYERS) == [(layer, h) for layer in range(LAYERS) for h in (0, 1, 2)]
    assert len(sample_heads(ready, len, 0)) == LAYERS and len(sample_heads(ready, len, 1e9)) == LAYERS * HEADS


def test_random_prompts_fit_the_model():
    model = build("llama-gqa")
    prompts = random_prompts(model)
    assert prompts == random_prompts(model) and len(prompts) == 16
    assert {tuple(ids[:5]) for ids in prompts} == {tuple(prompts[0][:5])}
    model.config.max_position_embeddings = 8
    assert {len(ids) for ids in random_prompts(model)} == {8}


RECORD = {"attention_backend": "cpp", "kl_backend": "cpp", "layers": "fused", "layers_why": None}


def told(ready, share=0.5, tokens=10_000, faster=None, **record) -> str | None:
    return suggest(ready, RECORD | record, tokens, share, faster)


@pytest.mark.parametrize(
    ("dtype", "rates", "words"),
    [
        (torch.bfloat16, {"float32": 90, "bfloat16": 30}, "3.0 times as fast in float32 .* --dtype float32, if it fits"),
        (torch.float32, {"float32": 90, "bfloat16": 180}, "2.0 times .* --dtype bfloat16, where its rounding"),
        (torch.float64, {"float32": 90, "bfloat16": 30, "float64": 45}, "2.0 times as fast in float32 as in float64"),
        (torch.bfloat16, {"float32": 90, "bfloat16": 80}, None),
        (torch.float32, {"float32": 90, "bfloat16": 9}, None),
    ],
)  # fmt: skip
def test_another_dtype_is_suggested_by_what_is_measured(monkeypatch, dtype, rates, words):
    """The best of each in turns: one measurement that others disturb changes nothing."""
    calls = []

    def rate(_products, _tokens, *, dtype, device, repeats):
        calls.append(dtype)
        return rates[str(dtype).removeprefix("torch.")] * (0.1 if len(calls) <= len(rates) else 1)

    monkeypatch.setattr(bench_module, "gemm_flops_per_s", rate)
    found = bench_module.faster_dtype([(8, 8)], 4, dtype, torch.device("cpu"))
    assert found is None if words is None else re.search(words, found)


@needs_extension
def test_nothing_to_suggest(monkeypatch):
    monkeypatch.setattr(bench_module, "busy_share", lambda: 0.0)
    assert told(prepared()) is None


@needs_extension
def test_what_is_suggested(monkeypatch):
    monkeypatch.setattr(bench_module, "busy_share", lambda: 0.0)
    ready = prepared()
    assert "give more prompts" in told(ready, tokens=5)
    assert "leave the backend on auto" in told(ready, attention_backend="torch")
    assert "own code (asked for)" in told(ready, layers="model", layers_why="asked for")
    assert told(ready, share=0.9, layers="model", layers_why="asked for") is None
    assert told(ready, faster="another dtype is faster") == "another dtype is faster"
    assert told(prepared(torch.bfloat16)) is None, "no advice without a measurement"
    short = replace(ready, plan=replace(ready.plan, chunk_tokens=64))
    assert "memory is short: chunks of 64 tokens" in told(short)
    blocks = replace(ready, plan=replace(ready.plan, rows_per_block=2))
    assert "6 blocks of heads" in told(blocks)
    monkeypatch.setattr(bench_module, "busy_share", lambda: 0.9)
    assert "others keep 90% of this machine's cores busy" in told(ready)
    half = replace(prepared(torch.bfloat16), device=torch.device("cuda"))
    assert "install triton" in told(half, attention_backend="torch")
    assert "built without CUDA" in told(half, attention_backend="triton", kl_backend="reference")
    monkeypatch.setattr(
        bench_module, "extension_status", lambda: (False, "the extension is not built: build it")
    )
    assert told(ready) == "the extension is not built: build it"


def test_on_the_command_line():
    arguments = [
        "bench",
        str(MODEL),
        str(PROMPTS / "taboo.csv"),
        "--limit",
        "4",
        "--seconds",
        "0.01",
        "-q",
        "--json",
    ]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["prompts"] == 4 and found["all_heads"] == 16 and found["ablations_per_s"] > 0
    text = CliRunner().invoke(cli.app, ["bench", str(MODEL), "--seconds", "0.01", "-q"]).stdout
    assert "16 prompts" in text and "of the floor" in text and "planned" in text


def test_bad_time_is_refused():
    with pytest.raises(shipsfast.InputError, match="seconds must be positive"):
        bench(build(), IDS, seconds=0)
