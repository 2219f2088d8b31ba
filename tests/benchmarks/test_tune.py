"""benchmarks/tune.py without a GPU: candidates are compiled ahead of time, and files keep their form."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from shipsfast.kernels.launch_config import LaunchConfig
from shipsfast.kernels.tree_kind import KINDS, kind_of_tree

from benchmarks import aot, config_files, tune
from benchmarks.tune import Task

TREE = Task("tree_attention", "template", "bfloat16", 128)


@pytest.mark.parametrize("name", list(aot.TARGETS))
def test_committed_files_are_written_back_as_they_are(name):
    text = (aot.RESOURCES.parent / f"{name}.json").read_text()
    assert config_files.render(json.loads(text)) == text


def test_candidates_begin_with_those_in_use():
    for task in tune.tasks():
        found = tune.candidates(task)
        for sm in tune.CHIPS:
            assert tune.in_use(task, sm) in found[:2]
        assert len(found) == len(set(found)) > 10
        assert all(c.input_precision == "ieee" for c in found)
    assert tune.tasks("tree_attention", "template", "bfloat16", 128) == [TREE]
    assert {task.kind for task in tune.tasks(kind="leaves")} == {"leaves"}
    assert {(task.kernel, task.kind) for task in tune.tasks()} == {
        ("tree_attention", "leaves"), ("tree_attention", "template"), ("decode_attention", "any"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_of_the_kind_that_is_tuned(kind):
    tree = tune.packed(kind)
    assert kind_of_tree(tree.position, tree.subtree_end) == kind
    config = LaunchConfig(64, 64, 4, 2)
    assert (
        tune.wasted(Task("tree_attention", kind, "bfloat16", 64), config)
        == {"leaves": 12.61, "template": 2.12}[kind]
    )
    assert tune.wasted(Task("decode_attention", "any", "bfloat16", 64), config) is None


def test_a_dry_run_drops_what_does_not_fit():
    """In a process of its own: the interpreter that the other tests need compiles nothing."""
    script = (
        "from benchmarks import tune; from shipsfast.kernels.launch_config import LaunchConfig as C; import json\n"
        "task = tune.Task('tree_attention', 'template', 'bfloat16', 128)\n"
        "small, large = C(64, 32, 4, 2), C(128, 128, 4, 4)\n"
        "print(json.dumps([tune.compiled(task, small, 90), tune.compiled(task, large, 80)]))\n"
        "sweep = ['--kernel', 'decode_attention', '--dtype', 'bfloat16', '--head-dim', '64', '--limit', '1']\n"
        "raise SystemExit(tune.main(['--dry-run', '--jobs', '1', '--json', *sweep]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=aot.ROOT, env=environment | {"PYTHONPATH": str(aot.ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *rest = map(json.loads, done.stdout.splitlines())
    small, large = first
    assert small["problem"] is None and small["registers"] > 0 and small["shared_bytes"] > 0
    assert "spills" in large["problem"] or "shared memory" in large["problem"]
    assert [each["sm"] for each in rest] == [80, 90] and all(each["problem"] is None for each in rest)


def record(config, problem=None):
    return {"task": TREE, "sm": 90, "config": config, "problem": problem}


def test_only_what_is_clearly_faster_replaces_what_is_in_use(capsys):
    used = tune.in_use(TREE, 90)
    other, broken = LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 128, 8, 2)

    def measure(times):
        def run(_task, config, _device):
            if config == broken:
                raise RuntimeError("out of resources")
            return times[config]

        return run

    records = [record(used), record(other), record(broken), record(LaunchConfig(64, 32, 4, 4), "spills")]
    (best,) = tune.tune(records, "cpu", measure({used: 1.0, other: 0.99}))
    assert best["config"] == used and best["before_ms"] == 1.0
    (best,) = tune.tune(records, "cpu", measure({used: 1.0, other: 0.9}))
    assert best["config"] == other and best["ms"] == 0.9
    assert "out of resources" in capsys.readouterr().out
    (best,) = tune.tune(records, "cpu", measure({used: 1.0, other: 0.5}), budget_s=0.0)
    assert best["config"] == used, "what is in use is timed first"


def test_the_best_are_written_beside_the_others(tmp_path):
    text = (aot.RESOURCES.parent / "sm_90.json").read_text()
    (tmp_path / "sm_90.json").write_text(text)
    config = LaunchConfig(128, 32, 8, 3)
    path = tune.write([record(config)], tmp_path)
    table, before = json.loads(path.read_text()), json.loads(text)
    of_kind = lambda table: table["tree_attention"]["template"]["bfloat16"]
    assert of_kind(table).pop("128") == tune.shown(config)
    of_kind(before).pop("128")
    assert table == before
    assert LaunchConfig(**tune.shown(config)) == config


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")
@pytest.mark.parametrize(
    "kernel, kind",
    [("tree_attention", "leaves"), ("tree_attention", "template"), ("decode_attention", "any")],
)
def test_what_is_timed_is_right(kernel, kind):
    task = Task(kernel, kind, "float32", 64)
    config = tune.in_use(task, 90)
    sizes = (
        dict(prompts=2, rows=2, heads=2)
        if kernel == "tree_attention"
        else dict(rows=3, heads=4, kv_heads=2, capacity=12)
    )
    make = tune._tree if kernel == "tree_attention" else tune._decode
    run, check = make(task, config, "cpu", **sizes)
    out = run()
    check(out)
    with pytest.raises(ValueError, match="differs from float32"):
        check(out + 1)
    assert torch.isfinite(out).all()


def test_a_gpu_is_asked_for(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "--dry-run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--kernel", "decode_attention", "--tree", "leaves"])
    assert "no kinds of trees" in capsys.readouterr().err
