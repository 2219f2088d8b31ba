"""--plan: what a scan would take, said without running it and without weights."""

import json
import shutil
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
import shipsfast.scans.forecast as forecast_module
from shipsfast.clock import in_words
from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.engine import fused_layer, work_plan
from shipsfast.engine.flops import model_flops, scan_flops
from shipsfast.engine.measurement import ScanExecution
from shipsfast.models.anatomy import inspect_model
from shipsfast.models.without_weights import hollow
from shipsfast.ops import half_products
from shipsfast.ops.extension import extension_status
from shipsfast.ops.prefix_tree import pack
from shipsfast.scans import rates
from shipsfast.scans.forecast import Elsewhere, forecast
from shipsfast.scans.measurements import ShipsMeasurement
from shipsfast.scans.rates import Rates
from tests.support.command_line import refused, run
from tests.support.models import FAMILIES, build

SHAPES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
}
GIB = 1 << 30


def shape(name: str):
    config = LlamaConfig(
        vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, **SHAPES[name]
    )
    return hollow(config, torch.bfloat16)


def planned(model, prompts, *, max_memory=None, **where):
    measurement, execution = ShipsMeasurement(prompts=prompts), ScanExecution(max_memory=max_memory)
    return forecast(model, None, measurement, execution, Elsewhere(**where))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_weights_the_plan_is_the_scans(family):
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10, 11], [5, 40]]
    model = build(family, torch.float32)
    found = planned(hollow(model.config, torch.float32), prompts, max_memory=150_000, device="cpu")
    result = shipsfast.scan(model, prompts, progress=False, max_memory=150_000)
    assert found.plan.to_json() == result.record["plan"]
    assert found.memory["model"] == sum(p.numel() * 4 for p in model.parameters())
    assert found.memory["rows"] < found.total_bytes - found.memory["model"] <= found.plan.predicted_bytes


@pytest.mark.parametrize("unit", ["head", "kv_group"])
@pytest.mark.parametrize("layers", ["fused", "model"])
def test_flops_and_memory_are_those_of_the_way_through_the_layers(layers, unit):
    """By every part that is known of both: what fused layers hold of the base row, and how their rows fork."""
    model = build("llama-gqa", torch.float32)
    ids, heads = [[5, 6, *range(7 + i, 20 + i)] for i in range(4)], 2 if unit == "kv_group" else 1
    measurement = ShipsMeasurement(prompts=ids, unit=unit)
    found = forecast(model, None, measurement, ScanExecution(layers=layers), Elsewhere(device="cpu"))
    anatomy = inspect_model(model, ids[0], 15)
    fused = layers == "fused"
    costs = model_flops(model, anatomy, fused=fused, unit_heads=heads)
    packs, checks = [pack(ids)], [pack(ids[:1])]
    expected = scan_flops(costs, packs, measurement.units(anatomy)) + forecast_module.CHECK_ROWS * scan_flops(
        costs, checks, []
    )
    assert found.flops == expected
    kept = fused_layer.loaded_bytes(model.model.layers[0], torch.float32, torch.device("cpu")) * fused
    kept += packs[0].num_tokens * fused_layer.base_row_bytes(model.model.layers[0], torch.float32) * fused
    assert found.memory["kept"] == kept
    assert found.total_bytes - found.memory["model"] <= found.plan.predicted_bytes


@pytest.mark.parametrize("gain", [4.0, 0.2], ids=["units", "no-units"])
@pytest.mark.skipif(not extension_status()[0], reason="needs the extension")
def test_half_precision_on_a_cpu(gain, monkeypatch):
    """The plan is the scan's, what a layer holds is in float32, and rates are of the products that run."""
    monkeypatch.setattr(half_products, "_gain", lambda _dtype: gain)
    measured, measure = [], forecast_module.measure_rates
    monkeypatch.setattr(
        forecast_module, "measure_rates", lambda *args: measured.append(args[2]) or measure(*args)
    )
    model, prompts = build("llama-gqa", torch.bfloat16), [[5, 6, 7, 8], [5, 6, 9, 10, 11], [5, 40]]
    products = torch.bfloat16 if gain > 1 else torch.float32
    found = planned(hollow(model.config, torch.bfloat16), prompts, max_memory=200_000, device="cpu")
    result = shipsfast.scan(model, prompts, progress=False, max_memory=200_000)
    assert found.plan.to_json() == result.record["plan"] and measured == [products]
    kept = fused_layer.loaded_bytes(model.model.layers[0], products, torch.device("cpu"))
    head = 4 * model.lm_head.weight.numel()
    kept += head + found.tokens * fused_layer.base_row_bytes(model.model.layers[0], products)
    assert found.memory["kept"] == kept
    anatomy = inspect_model(model, prompts[0], 5)
    at_once = min(max(found.plan.chunk_tokens, found.tokens), (found.plan.rows_per_block + 1) * found.tokens)
    assert found.memory["chunk"] == 4 * at_once * anatomy.work_width
    assert found.total_bytes - found.memory["model"] <= found.plan.predicted_bytes


@pytest.mark.parametrize("case", ["cpu-large-templates", "smoke"])
def test_flops_are_those_of_the_benchmarks_floor(case):
    from benchmarks.cases import CPU_CASES, SMOKE_CASES
    from benchmarks.floor import floor_flops

    chosen = next((c for c in CPU_CASES + SMOKE_CASES if case in c.name), CPU_CASES[0])
    model = hollow(
        LlamaConfig(
            vocab_size=chosen.vocabulary, hidden_size=chosen.hidden, intermediate_size=chosen.intermediate,
            num_hidden_layers=chosen.layers, num_attention_heads=chosen.heads, num_key_value_heads=chosen.heads,
        ),
        torch.float32,
    )  # fmt: skip
    ids = chosen.token_ids()
    anatomy = inspect_model(model, ids[0], max(map(len, ids)))
    units = [(layer, head) for layer in range(chosen.layers) for head in range(chosen.heads)]
    assert scan_flops(model_flops(model, anatomy, fused=True), [pack(ids)], units) == pytest.approx(
        floor_flops(chosen), rel=1e-12
    )


def test_a_70b_shape_on_one_gpu():
    """Streamed it is scanned on 80 and on 24 GB; in memory it is refused with the remedy."""
    model, prompts = shape("70b"), [[1, 2, 3, *range(10 + i, 30 + i)] for i in range(0, 2000, 20)]
    with pytest.raises(shipsfast.InputError, match="take 131.4 GiB.*--stream"):
        planned(model, prompts, device="cuda", device_memory=80 * GIB)
    for memory in (80 * GIB, 24 * GIB):
        found = planned(model, prompts, device="cuda", device_memory=memory, stream=True)
        assert found.total_bytes <= 0.9 * memory
        assert found.memory["model"] < 8 * GIB
    assert found.limits[0].startswith("memory:") and found.seconds is None


@pytest.mark.parametrize("tokens", [4096, 131072])
def test_long_prompts_plan(tokens):
    start = time.process_time()
    found = planned(shape("8b"), [[t % 128256 for t in range(tokens)]], device="cuda", device_memory=80 * GIB)
    assert time.process_time() - start < 20
    assert found.tokens == tokens and found.plan.rows_per_block >= 1


@pytest.mark.serial
def test_predicted_time_and_memory_of_a_real_scan():
    """On a quiet machine both are within a factor of 1.5 (docs/planning.md); shared ones are given more here."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=6,
            num_attention_heads=8,
        )
    ).eval()
    prompts = np.random.default_rng(0).integers(0, 4096, (4, 96)).tolist()
    shipsfast.scan(model, prompts[:1], heads=[(0, 0)], progress=False)
    for _attempt in range(3):  # another process can only make a scan slower, or a forecast before it
        before, peak, stop = psutil.Process().memory_info().rss, [0], threading.Event()

        def watch(peak=peak, stop=stop):
            while not stop.wait(0.002):
                peak[0] = max(peak[0], psutil.Process().memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        result = shipsfast.scan(model, prompts, progress=False, rescored=0)  # whose copy is planned apart
        taken = time.perf_counter() - start
        stop.set()
        watcher.join()
        found = planned(model, prompts, device="cpu")
        if 1 / 4 < taken / found.seconds < 4:
            break
    assert found.plan.rows_per_block == result.record["plan"]["rows_per_block"]
    assert 1 / 4 < taken / found.seconds < 4, (taken, found.seconds)
    beyond = found.total_bytes - found.memory["model"]
    assert peak[0] - before < 2 * beyond, ((peak[0] - before) / 2**20, beyond / 2**20)


def test_the_time_is_a_range_and_says_how_it_was_measured(monkeypatch):
    """From the best rate, which others have not disturbed, to the median; a busy machine is told."""
    model, prompts = build("llama-gqa", torch.float32), [[3, 4, 5]]
    for others in (0.0, 0.9):
        monkeypatch.setattr(
            forecast_module, "measure_rates", lambda *_, others=others: Rates(4e9, 1e9, 9, others)
        )
        found = planned(model, prompts, device="cpu")
        assert found.seconds == pytest.approx(found.flops / 1e9) and found.best_seconds == found.seconds / 4
        assert found.flops_per_s == 1e9 and json.loads(json.dumps(found.to_json()))["rates"]["best"] == 4e9
        text = found.render()
        first, second = in_words(found.best_seconds), in_words(found.seconds)
        assert (
            f"{first} to {second} at 4 GFLOP/s, the best of 9 short measurements now, to 1, their median"
            in text
        )
        assert ("\nbusy    others keep" in text) == (others > 0)


def test_rates_are_of_several_measurements(monkeypatch):
    given = iter([5.0, 1.0, 3.0] * 3)
    monkeypatch.setattr(rates, "gemm_flops_per_s", lambda products, *_, **__: next(given))
    monkeypatch.setattr(rates, "busy_share", lambda: 0.5)
    found = rates.measure_rates([(8, 8)], 4, torch.float32, torch.device("cpu"))
    assert found == Rates(best=5.0, median=3.0, count=9, others=0.5)
    assert found.warning and Rates(5.0, 3.0, 9, others=0.1).warning is None


def test_parts_are_told_as_what_limits_a_block(monkeypatch):
    monkeypatch.setattr(work_plan, "PART_SECONDS", 1e-9)
    monkeypatch.setattr(work_plan, "MOST_MORE", 1.0)
    model, prompts = build("llama-gqa", torch.float32), [[3, 4, 5], [3, 6]]
    found = planned(model, prompts, device="cpu")
    assert found.blocks > 1 and f"x {found.blocks} blocks of at most" in found.render()
    assert (
        found.limits[0].startswith(f"parts: {found.blocks} blocks")
        and found.passes == found.blocks + found.checks
    )
    result = shipsfast.scan(model, prompts, progress=False)
    assert {**found.plan.to_json(), "memory_limit_bytes": 0} == {
        **result.record["plan"],
        "memory_limit_bytes": 0,
    }


@pytest.mark.parametrize("command", ["scan", "scan-dataset", "sahara"])
def test_the_command_runs_nothing(capsys, tmp_path, monkeypatch, command):
    """A folder with config.json and tokenizer is enough; nothing is written."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL / name).read_bytes())
    args = (
        command,
        folder,
        PROMPTS / "taboo.csv",
        "--limit",
        6,
        "--plan",
        "--quiet",
    )
    before = sorted(tmp_path.rglob("*"))
    status, text, err = run(capsys, *args)
    assert status == 0, err
    assert "nothing was run" in text and "memory" in text and "GFLOP/s" in text
    status, text, err = run(capsys, *args, "--json")
    found = json.loads(text)
    assert status == 0 and found["units"] == 16 and found["kind"] == command and found["seconds"] > 0
    status, text, err = run(capsys, *args, "--stream")
    assert status == 0 and "not predicted here" in text and "streamed" in text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("scan", "--out", "run"), "--out would do nothing"),
        (("scan", "--resume"), "--resume would do nothing"),
        (("scan", "--plot", "heads.png"), "--plot would do nothing"),
        (("scan", "--nonfinite", "raise"), "--nonfinite would do nothing"),
        (("scan", "--judge", "paper", "--keep-text"), "--judge, --keep-text would do nothing"),
        (("scan-dataset", "--out", "run"), "--out would do nothing"),
        (("scan", "--metric", "logit_diff:zzz,yyy"), "'zzz' is 3 tokens"),
        (("scan", "--metric", "kl", "--metric", "kl"), "two metrics are called kl"),
        (("scan", "--backend", "nonsense"), "unknown backend 'nonsense'"),
        (("scan", "--backend", "triton", "--device", "cpu"), "backend 'triton' cannot run"),
        (("scan", "--device", "nonsense"), "unknown device 'nonsense'"),
        (("scan", "--device", "mps"), "unknown device 'mps'"),
        (("scan-dataset", "--rank", "50"), "rank 50 needs at least 50 prompts"),
        (("sahara", "--rank", "50"), "rank 50 needs at least 50 prompts"),
        (("sahara", "--group-size", "50", "--heads", "0-0,0-1"), "group_size 50 is above the 2 heads"),
    ],
)  # fmt: skip
def test_what_the_scan_would_refuse_and_what_would_do_nothing(capsys, args, message):
    command, *options = args
    assert message in refused(capsys, command, MODEL, PROMPTS / "taboo.csv", "--limit", 3, "--plan", *options)


def test_weights_cut_short_are_one_line(capsys, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    found = refused(capsys, "scan", folder, PROMPTS / "taboo.csv", "--limit", 3, "--plan", "--stream")
    assert "cannot read the weights in" in found


def test_bad_questions_are_refused(capsys):
    args = ("scan", MODEL, PROMPTS / "taboo.csv")
    assert "leave --rank-by asr away" in refused(capsys, *args, "--plan", "--rank-by", "asr")
    assert "--device-memory is for --plan" in refused(capsys, *args, "--device-memory", "24GiB")
    if not torch.cuda.is_available():
        assert "--device-memory 80GiB" in refused(capsys, *args, "--plan", "--device", "cuda")


def test_several_ablations():
    prompts, model = [[5, 6, 7, 8], [5, 6, 9, 10, 11], [5, 40]], build("llama-gqa", torch.float32)
    one = planned(model, prompts, device="cpu")
    about = ShipsMeasurement(
        prompts=prompts, ablation=["zero", "mean", shipsfast.Ablation("zero", at="end"), "uniform"]
    )
    found = forecast(model, None, about, ScanExecution(), Elsewhere(device="cpu"))
    result = shipsfast.scan(model, prompts, ablation=about.ablations, progress=False)
    assert found.plan.to_json() | {"memory_limit_bytes": 0} == result.record["plan"] | {
        "memory_limit_bytes": 0
    }
    assert found.plan.rows_per_block == 3 * one.units and found.passes - found.checks == 2
    assert 2 * one.flops < found.flops < 4 * one.flops
    assert "12 heads of 3 layers x 4 ablations" in found.render() and "at most 36 rows" in found.render()
