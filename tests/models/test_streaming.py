"""Streamed models: the same bits as in memory, two layers at a time, one reading per pass, nothing left behind."""

import copy
import os
import shutil
import signal
import textwrap
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import shipsfast
from shipsfast.models import streaming
from shipsfast.models.fingerprint import fingerprint
from shipsfast.models.loading import load_model
from tests.support import warm
from tests.support.checkpoints import in_memory, save, watched
from tests.support.models import _GQA, FAMILIES, LAYERS, build
from tests.support.streamed import MORE, built

PROMPTS = [[5, 6, 7, 8], [5, 6, 9, 10, 11], [5, 40], [12, 13, 14]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save(build("llama-gqa", torch.float32), tmp_path_factory.mktemp("llama")))


def both(folder, **how):
    return load_model(str(folder), **how), load_model(str(folder), stream=True, **how)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_scores_are_bit_equal(family, tmp_path):
    model, streamed = both(save(built(family), tmp_path))
    assert fingerprint(streamed) == fingerprint(model)
    expected, found = (
        shipsfast.scan(m, PROMPTS, progress=False, rows_per_block=5) for m in (model, streamed)
    )
    assert np.isfinite(expected.kl).all() and np.array_equal(found.kl, expected.kl)
    assert found.record["packing_noise"] == expected.record["packing_noise"]
    assert found.record["weights"] == "streamed" and expected.record["weights"] == "memory"
    assert found.record["layers"] == expected.record["layers"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama-gqa", "mixtral-merged-experts", "gpt2"])
def test_other_dtypes_than_the_checkpoints(family, dtype, tmp_path):
    if family.startswith("mixtral") and dtype == "float64":
        pytest.skip("transformers' experts do not compute in float64")
    model, streamed = both(save(built(family), tmp_path), dtype=dtype)
    assert fingerprint(streamed) == fingerprint(model)
    expected, found = (shipsfast.scan(m, PROMPTS[:2], progress=False) for m in (model, streamed))
    assert np.array_equal(found.kl, expected.kl)


@pytest.mark.parametrize("layers", ["model", "fused"])
def test_both_ways_through_a_layer(folder, layers):
    expected, found = (
        shipsfast.scan(m, PROMPTS, progress=False, layers=layers, chunk_tokens=20) for m in both(folder)
    )
    assert found.record["layers"] == layers and np.array_equal(found.kl, expected.kl)


@pytest.mark.parametrize("kind", ["head_mean_q", "mean", "resample"])
def test_ablations_that_run_the_model_first(folder, kind):
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10]]
    how = shipsfast.Ablation(kind, prompts=prompts[::-1] if kind == "resample" else None)
    expected, found = (shipsfast.scan(m, prompts, ablation=how, progress=False) for m in both(folder))
    assert np.array_equal(found.kl, expected.kl)


def test_dataset_scan_and_search(folder):
    model, streamed = both(folder)
    expected, found = (shipsfast.scan_dataset(m, PROMPTS, progress=False) for m in (model, streamed))
    assert np.array_equal(found.angle_deg, expected.angle_deg)
    expected, found = (shipsfast.sahara(m, PROMPTS, group_size=2, progress=False) for m in (model, streamed))
    assert found.heads == expected.heads
    assert np.array_equal(found.angle_deg, expected.angle_deg, equal_nan=True)


def test_two_layers_at_most_and_one_reading_per_pass(folder, monkeypatch):
    """However many chunks and head chunks there are. A scan of two blocks takes four passes: two for the blocks, and
    two for the checks against the model's own forward."""
    streamed = load_model(folder, stream=True)
    shipsfast.scan(streamed, PROMPTS, progress=False)
    with watched(monkeypatch) as seen:
        streamed._shipsfast_stream._bring = streamed._shipsfast_stream._read_in
        streamed._shipsfast_stream._drop = streamed._shipsfast_stream._take_out
        shipsfast.scan(
            streamed, PROMPTS, progress=False, chunk_tokens=1, rows_per_block=6, prompts_per_group=4
        )
    brought = [index for event, index in seen["events"] if event == "bring"]
    assert seen["most"] == 2
    passes = 4 + (brought.count(0) == 5)  # what finds the layers may need one
    assert brought == [*range(LAYERS)] * passes, brought
    assert sorted(seen["events"]) == sorted([(e, i) for i in brought for e in ("bring", "drop")])
    assert not in_memory(streamed)


def test_nothing_is_held_after_an_exception(folder, monkeypatch):
    streamed = load_model(folder, stream=True)
    expected = shipsfast.scan(streamed, PROMPTS, progress=False)

    def fail(*_args, **_kwargs):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        for name in ("segment_attention", "cpp_attention"):
            patch.setattr(f"shipsfast.ops.tree_attention.{name}", fail)
        patch.setattr("shipsfast.engine.growing_batch.tree_attention", fail)
        with pytest.raises(RuntimeError, match="broken"):
            shipsfast.scan(streamed, PROMPTS, progress=False)
    assert not in_memory(streamed)
    again = shipsfast.scan(streamed, PROMPTS, progress=False)
    assert np.array_equal(again.kl, expected.kl)


def test_a_layer_that_cannot_be_read(folder, monkeypatch):
    streamed = load_model(folder, stream=True)
    layers = streamed._shipsfast_stream
    read, calls = layers._read_in, []

    def fail(index):
        calls.append(index)
        if len(calls) == 2 * LAYERS + 2:
            raise OSError(5, "Input/output error", "model-00002.safetensors")
        read(index)

    monkeypatch.setattr(layers, "_bring", fail)
    with pytest.raises(OSError, match="Input/output"):
        shipsfast.scan(streamed, PROMPTS, progress=False, rows_per_block=4)
    assert not in_memory(streamed)
    monkeypatch.undo()
    assert np.isfinite(shipsfast.scan(streamed, PROMPTS, progress=False).kl).all()


def test_a_run_continues_between_memory_and_stream(folder, tmp_path, monkeypatch):
    model, streamed = both(folder)
    expected = shipsfast.scan(model, PROMPTS, progress=False, rows_per_block=4)
    from shipsfast.scans.score_store import Measure

    keep, kept = Measure.keep, []

    def stop(self, *args):
        keep(self, *args)
        kept.append(args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Measure, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            shipsfast.scan(model, PROMPTS, out=tmp_path / "run", progress=False, rows_per_block=4)
    found = shipsfast.scan(streamed, PROMPTS, out=tmp_path / "run", progress=False, rows_per_block=4)
    assert len(kept) == 1 and np.array_equal(found.kl, expected.kl)


def test_no_thread_outlives_a_scan(folder):
    """It is missing in forked children, who would wait for it, and cannot be copied with the model."""
    streamed = load_model(folder, stream=True)
    expected = shipsfast.scan(streamed, PROMPTS, progress=False).kl
    assert not [t for t in threading.enumerate() if t.name.startswith("shipsfast-weights")]
    other = copy.deepcopy(streamed)
    assert other._shipsfast_stream.model is other
    del streamed._shipsfast_stream  # nothing of the copy's leads to it
    assert np.array_equal(shipsfast.scan(other, PROMPTS, progress=False).kl, expected)
    assert not in_memory(other) and not any(not p.is_meta for p in streamed.model.layers.parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_scans(folder):
    streamed = load_model(folder, stream=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's do not survive a fork either
    try:
        expected = shipsfast.scan(streamed, PROMPTS, progress=False).kl
        child = os.fork()
        if not child:
            signal.alarm(60)
            try:
                same = np.array_equal(shipsfast.scan(streamed, PROMPTS, progress=False).kl, expected)
            finally:
                os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)


def test_other_threads_load_as_ever(folder, tmp_path, monkeypatch):
    plain = str(save(build("gpt2", torch.float32), tmp_path))
    check, found = streaming._check, []

    def meanwhile(*args):
        if not found:
            thread = threading.Thread(
                target=lambda: found.append(AutoModelForCausalLM.from_pretrained(plain))
            )
            thread.start()
            thread.join()
        check(*args)

    monkeypatch.setattr(streaming, "_check", meanwhile)
    before = PreTrainedModel.__dict__["_load_pretrained_model"]
    streamed = load_model(folder, stream=True)
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is before
    assert not any(p.is_meta for p in found[0].parameters()) and not in_memory(streamed)
    assert streamed._shipsfast_stream.model is streamed


def test_ablate_works_and_generate_is_refused(folder):
    model, streamed = both(folder)
    ids = torch.tensor([PROMPTS[0]])
    with shipsfast.ablate(model, [(1, 2)]), shipsfast.ablate(streamed, [(1, 2)]), torch.no_grad():
        assert torch.equal(model(ids).logits, streamed(ids).logits)
    with pytest.raises(shipsfast.UnsupportedModelError, match="are streamed.*onto one device to generate"):
        shipsfast.generate(streamed, PROMPTS, None, groups=[[]], max_new_tokens=2, progress=False)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda config, tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "lacks weights .* model.layers.1.mlp.up_proj",
        ),
        (lambda config, tensors: tensors.pop("lm_head.weight"), "lacks weights .* lm_head"),
        (
            lambda config, tensors: tensors.update({"model.layers.2.input_layernorm.weight": torch.ones(31)}),
            r"model.layers.2.input_layernorm.weight has the shape \(31,\)",
        ),
        (
            lambda config, tensors: setattr(
                config, "quantization_config", {"quant_method": "fp8", "weight_block_size": [8, 8]}
            ),
            "quantised",
        ),
    ],
    ids=["layer-missing", "head-missing", "wrong-shape", "quantised"],
)
def test_refused_by_name(spoil, reason, tmp_path):
    from safetensors.torch import save_file

    model = build("llama-gqa", torch.float32)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    spoil(model.config, tensors)
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(shipsfast.InputError, match=reason):
        shipsfast.scan(load_model(str(tmp_path), stream=True), PROMPTS, progress=False)


def test_layers_tied_to_each_other_are_refused(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    ties = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", ties)
    folder = str(save(built("llama-tied"), tmp_path))
    with pytest.raises(shipsfast.UnsupportedModelError, match="ties model.layers.1.mlp.up_proj.weight"):
        load_model(folder, stream=True)


KILLED = """
    import atexit, os, signal, sys
    from shipsfast import cli
    from shipsfast.models.streaming import CheckpointLayers

    read, left = CheckpointLayers._read_in, [int(sys.argv.pop(1))]

    def counted(self, index):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        read(self, index)

    CheckpointLayers._read_in = counted
    atexit.register(lambda: print(-left[0], file=sys.stderr))
    cli.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_stream_leaves_whole_scores_and_nothing_else(tmp_path):
    """Killed while it reads its first layer, between two blocks, and in the last check."""
    from shipsfast.demo.run import MODEL

    torch.manual_seed(0)
    config = LlamaConfig(**(_GQA | dict(vocab_size=768)))
    folder = save(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tmp_path / "model", "100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    before = sorted(os.listdir(folder))
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(KILLED))
    scratch, home = tmp_path / "scratch", tmp_path / "home"
    home.mkdir()
    scratch.mkdir()
    env = os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": os.getcwd(), "HOME": str(home)}

    def run(kill_at: int, out):
        arguments = [kill_at, "scan", folder, prompts, "--stream", "--out", out, "--quiet", "--max-memory", "120KiB",
                     "--template", "none"]  # fmt: skip
        return warm.run(script, arguments, env=env, cwd=home)

    whole = run(0, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    expected = shipsfast.ShipsResult.load(tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "scores").iterdir())) >= 2
    last = int(whole.stderr.split()[-1])
    for kill_at in (1, last - LAYERS - 1, last - 1):
        out = tmp_path / f"killed-{kill_at}"
        assert run(kill_at, out).returncode == -signal.SIGKILL
        left = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) if out.exists() else []
        own = (".lock", "run.json", "run.backup.json")
        assert all(name in own or name.startswith("scores/part-") for name in left), left
        if kill_at > 1:
            assert any(name.startswith("scores/") for name in left)
            scores = shipsfast.ShipsResult.load(out).kl
            done = ~np.isnan(scores)
            assert done.any() and np.array_equal(scores[done], expected.kl[done])
        resumed = run(0, out)
        assert resumed.returncode == 0, resumed.stderr
        assert np.array_equal(shipsfast.ShipsResult.load(out).kl, expected.kl)
    assert sorted(os.listdir(folder)) == before
    assert not list(scratch.iterdir())
