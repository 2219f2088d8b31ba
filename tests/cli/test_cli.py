"""The command line as users meet it: results on stdout, one clear line and status 2 for bad input."""

import json
import os
import pkgutil
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import LlamaModel

import shipsfast
from shipsfast import cli
from shipsfast.cli import entry
from shipsfast.demo.run import MODEL, PROMPTS
from tests.support.command_line import refused, run
from tests.support.places import ROOT


def test_scan_of_the_embedded_model(capsys, tmp_path):
    out, plot = tmp_path / "run", tmp_path / "heads.png"
    status, text, err = run(
        capsys, "scan", MODEL, PROMPTS / "taboo.csv", "--limit", 6, "--out", out, "--plot", plot
    )
    assert status == 0, err
    assert "layer-head" in text and "16 heads x 6 prompts" in text
    assert "scan" in err and "100%" in err  # the progress bar
    assert plot.read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["status"] == "complete" and manifest["template"] == "chat"


def test_several_metrics(capsys, tmp_path):
    plot = tmp_path / "heads.png"
    args = ("scan", MODEL, PROMPTS / "taboo.csv", "--limit", 3, "--metric", "kl", "--metric", "js", "--quiet")
    status, text, err = run(capsys, *args, "--plot", plot)
    assert status == 0, err
    assert text.count("layer-head") == 2 and "Jensen-Shannon" in text
    assert plot.exists() and (tmp_path / "heads-2.png").exists()
    status, text, err = run(capsys, *args, "--json")
    assert status == 0 and json.loads(text)["also"]["js"]["metric"]["name"] == "js", err


def test_json_is_all_that_stdout_holds(capsys):
    status, text, _ = run(
        capsys, "scan", MODEL, PROMPTS / "taboo.csv", "--limit", 3, "--json", "-q", "--heads", "0-2,3"
    )
    found = json.loads(text)
    assert status == 0
    assert {(s["layer"], s["head"]) for s in found["top"]} == {(0, 2), (3, 0), (3, 1), (3, 2), (3, 3)}
    assert found["top"][0]["mean_kl_nats"] > found["top"][1]["mean_kl_nats"]


def test_the_tokens_that_a_head_moves(capsys):
    args = ("top-tokens", MODEL, PROMPTS / "taboo.csv", "--limit", 6, "-q", "--top", 2)
    status, text, err = run(capsys, *args, "--heads", "0-2,0-1")
    assert status == 0 and "head 0-2 off" in text and "'To'" in text and "'I'" in text, err
    found = json.loads(run(capsys, *args, "--heads", "0-2", "--json")[1])
    (head,) = found["heads"]
    assert (head["raised"][0]["text"], head["lowered"][0]["text"]) == ("To", "I") and len(head["raised"]) == 2
    assert found["record"]["prompts_from"]["limit"] == 6
    assert "top-tokens needs --heads" in refused(capsys, *args[:3])
    at_end = json.loads(run(capsys, *args, "--heads", "0-2", "--json", "--at", "end", "--at", "-2")[1])
    assert "at the end only" in at_end["record"]["ablation"]
    assert at_end["heads"][0]["raised"][0]["before"] != head["raised"][0]["before"]
    assert "positions from" in refused(capsys, *args[:-3], "--heads", "0-2", "--at", "999")


def test_concentration_says_of_which_heads_it_is(capsys):
    args = ("scan", MODEL, PROMPTS / "taboo.csv", "--limit", 2, "-q", "--heads", "0-2,3")
    assert "concentration among 5 of 16 heads: top 1 " in run(capsys, *args)[1]
    assert "concentration: top 1 " in run(capsys, *args[:-2])[1]


@pytest.mark.parametrize(("asked", "said"), [((), "chat"), (("--template", "none"), "none")])
def test_the_template_that_auto_chose_is_said(capsys, asked, said):
    args = ("scan", MODEL, PROMPTS / "taboo.csv", "--limit", 2, "-q", "--heads", "0-2")
    assert f"float32, template {said}, " in run(capsys, *args, *asked)[1]


def test_a_second_run_continues_the_first(capsys, tmp_path):
    args = ("scan", MODEL, PROMPTS / "taboo.csv", "--limit", 3, "--out", tmp_path / "run", "--json", "-q")
    first, second = run(capsys, *args), run(capsys, *args)
    assert first[0] == second[0] == 0
    assert json.loads(first[1])["top"] == json.loads(second[1])["top"]


def test_scan_with_another_metric_ablation_and_unit(capsys, tmp_path):
    (tmp_path / "others.csv").write_text("prompt\nHow could we mend the kettle?\nWho sells the blue lamp?\n")
    status, text, err = run(
        capsys, "scan", MODEL, PROMPTS / "taboo.csv", "--limit", 4, "--metric", "refusal_logit:I", "--ablation", "mean",
        "--source", tmp_path / "others.csv", "--unit", "kv-group", "--layers", "model", "--top", 3, "--json", "-q",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(text)
    assert found["metric"]["name"].startswith("refusal_logit") and found["metric"]["signed"]
    assert len(found["top"]) == 3 and found["stability"]["k"] == 3
    assert found["record"]["ablation"] == "mean" and found["record"]["layers_why"] == "asked for"
    sizes = [abs(s["mean_score"]) for s in found["top"]]
    assert sizes == sorted(sizes, reverse=True)


def test_scan_dataset(capsys, tmp_path):
    out, plot = tmp_path / "run", tmp_path / "heads.png"
    args = ("scan-dataset", MODEL, PROMPTS / "taboo.csv", "--limit", 5, "--rank", 2, "--out", out)
    status, text, err = run(capsys, *args, "--plot", plot)
    assert status == 0, err
    assert (
        "rank 2" in text
        and "degrees" in text
        and "95% interval" in text
        and "in top 10" in text
        and "100%" in err
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    loaded = shipsfast.SubspaceResult.load(out)
    found = json.loads(run(capsys, *args, "--json", "-q")[1])  # from the folder
    assert [(s["layer"], s["head"], s["angle_deg"]) for s in found["top"]] == loaded.top(10)


def test_top(capsys, tmp_path):
    out, plot = tmp_path / "run", tmp_path / "heads.png"
    args = (
        "top",
        MODEL,
        PROMPTS / "taboo.csv",
        "--limit",
        5,
        "-k",
        3,
        "--screen",
        "bfloat16",
        "--error",
        "0.02",
        "--out",
        out,
    )
    status, text, err = run(capsys, *args, "--plot", plot)
    assert status == 0, err
    for said in (
        "Top 3 of 16 heads",
        "95% interval",
        "exact minus screened, of square roots of scores",
        "as shares of a complete scan's",
    ):
        assert said in text
    assert "screen: 100%" in err and plot.read_bytes().startswith(b"\x89PNG")
    assert run(capsys, "verify", out)[0] == 0
    loaded = shipsfast.TopHeads.load(out)
    found = json.loads(run(capsys, *args, "--resume", "--json", "-q")[1])
    assert [(s["layer"], s["head"], s["mean_kl_nats"]) for s in found["top"]] == loaded.heads
    assert (
        found["certificate"]["error"] == 0.02 and found["certificate"]["text"] == loaded.certificate.lines()
    )
    scanned = json.loads(
        run(capsys, "scan", MODEL, PROMPTS / "taboo.csv", "--limit", 5, "--top", 3, "--json", "-q")[1]
    )
    assert [(s["layer"], s["head"]) for s in scanned["top"]] == [s[:2] for s in loaded.heads]


def test_the_plan_of_a_search_for_top_heads(capsys):
    how = (MODEL, PROMPTS / "taboo.csv", "--limit", 5, "-q", "--plan")
    status, text, err = run(capsys, "top", *how, "-k", 3)
    assert status == 0, err
    assert "top of" in text and "the most that exact scores can take" in text
    plans = [json.loads(run(capsys, name, *how, "--json")[1])["plan"] for name in ("top", "scan")]
    free = [plan.pop("memory_limit_bytes") for plan in plans]
    assert all(free) and plans[0] == plans[1]


def test_sahara(capsys, tmp_path):
    out, plot = tmp_path / "run", tmp_path / "steps.png"
    args = (
        "sahara",
        MODEL,
        PROMPTS / "taboo.csv",
        "--limit",
        5,
        "--group-size",
        2,
        "--beam",
        2,
        "--out",
        out,
    )
    status, text, err = run(capsys, *args, "--plot", plot)
    assert status == 0, err
    assert (
        "degrees" in text
        and "chosen again" in text
        and "concentration of step 2" in text
        and "also kept" in text
        and "head 2 of 2" in err
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    loaded = shipsfast.SaharaResult.load(out)
    found = json.loads(run(capsys, *args, "--json", "-q")[1])
    assert [tuple(h) for h in found["chosen"]] == loaded.heads and found["angle_deg"] == loaded.scores


def test_sahara_with_a_control(capsys, tmp_path):
    out, plot = tmp_path / "run", tmp_path / "steps.png"
    args = (
        "sahara", MODEL, PROMPTS / "taboo.csv", "--limit", 4, "--group-size", 2, "--beam", 2, "--control", PROMPTS / "ordinary.csv",
        "--penalty", 2.5, "--out", out,
    )  # fmt: skip
    status, text, err = run(capsys, *args, "--plot", plot)
    assert status == 0, err
    words = (
        "objective: degrees - 2.5 x control KL, of the next token, mean of 48 control prompts",
        "control KL, nats",
    )
    assert all(each in text for each in (*words, "and of the control prompts", "also kept")), text
    assert "--control: 48 prompts of ordinary.csv" in err and plot.read_bytes().startswith(b"\x89PNG")
    loaded = shipsfast.load(out)
    assert loaded.penalty == 2.5 and loaded.control_by_prompt.shape[:2] == (2, 48)
    found = json.loads(run(capsys, *args, "--json", "-q")[1])
    assert found["objective_deg"] == loaded.chosen(loaded.objective)
    assert found["record"]["prompts_from"]["control"]["columns"] == ["prompt"]
    assert found["beams"][1]["control_kl_nats"] == loaded.beam_control_kl_nats[1]


def test_info(capsys):
    status, text, _ = run(capsys, "info", "--json")
    facts = json.loads(text)
    assert status == 0 and facts["packages"]["torch"] and "cpu" in facts["devices"]
    assert run(capsys, "info")[1].startswith("shipsfast ")


def test_the_command_in_a_process_of_its_own(tmp_path):
    """As it is installed: the other tests call its function, or start it where torch is imported already."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        script = tomllib.load(file)["project"]["scripts"]["shipsfast"]
    assert pkgutil.resolve_name(script) is cli.main

    def ended(*arguments):
        command = [sys.executable, "-m", "shipsfast", "scan", MODEL, *arguments]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    done = ended(PROMPTS / "taboo.csv", "--limit", "2", "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["record"]["model"]["layers"] == 4
    done = ended("absent.csv", "-q")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("shipsfast: no prompt file at absent.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.serial
def test_help_is_quick_and_needs_no_torch():
    code = (
        "import sys; sys.argv=['shipsfast','--help']\n"
        "from shipsfast.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "scan" in done.stdout and "demo" in done.stdout
    assert time.perf_counter() - start < 5  # loosely: the machine may be busy; 0.3 s when it is not


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("./absent", "P"), "no model folder at ./absent"),
        (("M", "absent.csv"), "no prompt file at absent.csv"),
        (("M", "P", "--column", "text"), "has no column 'text': it has prompt"),
        (("M", "empty.csv"), "is empty"),
        (("M", "blank.csv"), "the prompt in row 2 is empty"),
        (("M", "long.txt"), "the model's context is"),
        (("M", "P", "--heads", "9-1"), "head 9-1 does not exist: the model has layers 0 to 2 with heads 0 to 3"),
        (("M", "P", "--heads", "7"), "layer 7 does not exist"),
        (("M", "P", "--heads", "a-b"), "cannot read head 'a-b'"),
        (("M", "P", "--scale", "tiny"), "--scale must be a number, got 'tiny'"),
        (("M", "P", "--scale", "nan"), "scale must be a finite number"),
        (("M", "P", "--ablation", "remove"), "unknown ablation 'remove'"),
        (("M", "P", "--backend", "triton"), "backend 'triton' cannot run"),
        (("M", "P", "--backend", "fast"), "unknown backend 'fast'"),
        (("M", "P", "--layers", "fast"), "unknown layers 'fast'"),
        (("M", "P", "--layers", "fused_fp32_residual"), "layers 'fused_fp32_residual' (--layers) cannot run: the model is in float32"),
        (("M", "P", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("M", "P", "--device", "nowhere"), "unknown device 'nowhere'"),
        (("M", "P", "--template", "chatty"), "unknown template 'chatty'"),
        (("M", "P", "--max-memory", "lots"), "cannot read 'lots' as an amount of memory"),
        (("M", "P", "--max-memory", "1"), "raise --max-memory"),
        (("M", "P", "--plot", "heads.txt"), "expected a name ending in .png"),
        (("M", "P", "--out", "other-run"), "holds another run (different"),
        (("M", "P", "--out", "."), "is not a shipsfast run"),
        (("no-config", "P"), "it has no config.json"),
        (("bin-only", "P"), "weights as pickle only"),
        (("mamba", "P"), "Mamba"),
        (("headless", "P"), "lacks weights of a causal language model, such as lm_head.weight"),
        (("truncated", "P"), "cannot load a causal language model from truncated"),
        (("M", "P", "--scale", "1e300"), "is not a number"),
        (("M", "P", "--device", "cuda:99"), "torch sees"),
        (("M", "P", "--plot", "absent/heads.png"), "there is no folder absent"),
        (("M", "P", "--out", "p.csv/run"), "is not a folder"),
        (("M", "P", "--ablation", "resample"), "needs --source"),
        (("M", "P", "--ablation", "zero", "--source", "p.csv"), "takes no prompts"),
        (("M", "P", "--ablation", "mean", "--source", "empty.csv"), "empty.csv is empty"),
        (("M", "P", "--ablation", "mean", "--source", "long.txt"), "in the prompts of ablation mean: prompt 0 has"),
        (("M", "P", "--ablation", "resample", "--source", "short.csv"), "both need the same number"),
        (("M", "P", "--unit", "layer"), "unknown unit 'layer'"),
        (("M", "P", "--unit", "kv_group", "--heads", "0-3"), "kv_group 0-3 does not exist"),
        (("M", "P", "--judge", "keywords", "--keep-text"), "only --rank-by asr keeps answers"),
        (("M", "P", "--judge", "keywords", "--stream"), "leave --stream away"),
        (("M", "P", "--judge", "keywords", "--plan"), "so that --judge would do nothing"),
        (("M", "P", "--do-sample"), "add --judge or --rank-by asr"),
        (("M", "P", "--rank-by", "score", "--keep-text", "--do-sample"), "use for --do-sample, --keep-text"),
        (("M", "P", "--max-new-tokens", "128"), "use for --max-new-tokens"),
        (("M", "P", "--metric", "accuracy"), "unknown metric 'accuracy'"),
        (("M", "P", "--metric", "logit_diff:1,99999"), "99999"),
        (("M", "P", "--metric", "refusal_logit:I am sorry"), "expected one"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(capsys, tmp_path, monkeypatch, model_folder, args, message):
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("prompt\nHow could we hide the kettle?\n")
    Path("empty.csv").write_text("")
    Path("blank.csv").write_text('prompt\nx\n""\n')
    Path("long.txt").write_text("kettle " * 500)
    Path("short.csv").write_text("prompt\nkettle\n")
    Path("no-config").mkdir()
    if args[0] in ("bin-only", "mamba", "headless", "truncated"):
        shutil.copytree(model_folder, args[0])
    if args[0] == "bin-only":
        Path("bin-only/model.safetensors").unlink()
        torch.save({}, "bin-only/pytorch_model.bin")
    if args[0] == "headless":
        LlamaModel.from_pretrained(args[0]).save_pretrained(args[0])
    if args[0] == "truncated":
        weights = Path("truncated/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1000])
    if args[0] == "mamba":
        from transformers import MambaConfig, MambaForCausalLM

        Path("mamba/model.safetensors").unlink()
        MambaForCausalLM(MambaConfig(vocab_size=768, hidden_size=32, num_hidden_layers=2)).save_pretrained(
            "mamba"
        )
    if "other-run" in args:
        run(capsys, "scan", MODEL, PROMPTS / "taboo.csv", "--limit", 2, "--out", "other-run", "-q")
    words = [{"M": str(MODEL if "other-run" in args else model_folder), "P": "p.csv"}.get(a, a) for a in args]
    if "--template" not in words:
        words += ["--template", "none"]
    if "--device" not in words:
        words += ["--device", "cpu"]
    assert message in refused(capsys, "scan", *words)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("scan-dataset", "--rank", "4"), "rank 4 needs at least 4 prompts, and there are 3"),
        (("sahara", "--rank", "4"), "rank 4 needs at least 4 prompts"),
        (("sahara", "--group-size", "17"), "group_size 17 is above the 16 heads to choose from"),
        (("sahara", "--group-size", "3", "--heads", "0-1,0-2"), "above the 2 heads"),
        (("scan-dataset", "--ablation", "resample"), "needs --source"),
        (("top", "-k", "17"), "k=17 is above the 16 heads to choose from"),
        (("top", "--error", "1"), "error must be a chance from 0 to 0.5"),
        (("top", "--screen", "fp8"), "unknown screen 'fp8' (--screen)"),
        (("top", "--screen", "float32"), "screen 'float32' (--screen) cannot run: the model is in float32"),
        (("top", "--ablation", "zero", "--ablation", "mean"), "2 ablations were given"),
        (("top", "--plan", "--screen", "none"), "--plan runs nothing, so that --screen would do nothing"),
        (("top", "--at", "-2"), "only scans of the next token read other positions"),
        (("sahara", "--out", "."), "is not a shipsfast run"),
        (("sahara", "--penalty", "1"), "penalty (--penalty) is for control prompts, and there are none"),
        (("sahara", "--control", PROMPTS / "ordinary.csv", "--penalty", "-1"), "penalty must be a finite number of at least 0"),
        (("sahara", "--control", "a-file"), "a-file"),
        (("sahara", "--control", PROMPTS / "ordinary.csv", "--plan"), "--plan does not count control prompts"),
    ],
)  # fmt: skip
def test_bad_input_of_searches_gets_one_line(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    command, *options = args
    assert message in refused(capsys, command, MODEL, PROMPTS / "taboo.csv", "--limit", 3, *options)


def test_a_full_disk_is_one_line(capsys, tmp_path, monkeypatch):
    import errno
    import os

    def full(_fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shipsfast.runs.folder.os.fsync", full)
    err = refused(capsys, "scan", MODEL, PROMPTS / "taboo.csv", "--limit", 2, "--out", tmp_path / "run")
    assert "No space left on device" in err


def test_ctrl_c_is_status_130(capsys, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("shipsfast.prompts.datasets.read_prompts", stop)
    status, _, err = run(capsys, "scan", MODEL, PROMPTS / "taboo.csv")
    assert status == 130 and "interrupted" in err


def test_unknown_option_is_status_2(capsys):
    assert run(capsys, "scan", "M", "P", "--epsilon", "3")[0] == 2


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"shipsfast {shipsfast.__version__}\n", "")


def test_each_command_says_in_one_line_what_it_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run(capsys, "--help")[1]
    for command in cli.app.registered_commands:
        first = (command.callback.__doc__ or "").splitlines()[0]
        assert first.endswith(".") and len(first) < 116 and first in text, first


@pytest.mark.parametrize("command", [("verify",), ("evaluate", MODEL, PROMPTS / "taboo.csv", "--run")])
def test_a_run_folder_that_does_not_exist(capsys, tmp_path, command):
    status, _, err = run(capsys, *command, tmp_path / "nowhere")
    assert status == 2 and "nowhere is not a shipsfast run: it does not exist" in err
    status, _, err = run(capsys, *command, tmp_path)
    assert status == 2 and "is not a shipsfast run: it has no run.json" in err


def test_a_name_that_is_no_folder_is_looked_up_on_the_hub_and_says_so(capsys, monkeypatch):
    import transformers

    from shipsfast import hub

    def unknown(*_args, **_kwargs):
        raise OSError("my-modle is not a valid model identifier")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unknown)
    monkeypatch.setattr(hub, "_ask", lambda: None)  # it answers
    monkeypatch.setattr(hub, "download", lambda *_, **__: None)  # and has none of the name
    monkeypatch.setattr(hub, "_last", [None, None])
    err = refused(capsys, "scan", "my-modle", PROMPTS / "taboo.csv")
    assert "the hub's my-modle (there is no folder of that name): my-modle is not a valid" in err


def test_numbers_of_thousands_of_digits_are_refused(capsys):
    """Python reads no more than 4,300 of them."""
    many, args = "9" * 5000, ("scan", MODEL, PROMPTS / "taboo.csv")
    for more in (
        ("--metric", f"logit_diff:{many},2"),
        ("--metric", f"refusal_logit:{many}"),
        ("--heads", f"0-{many}"),
    ):
        assert "999... has 5000 digits: expected at most 18" in refused(capsys, *args, *more)
    for amount in (many, "9" * 400 + "T", "0.5"):
        assert f"cannot read '{amount[:3]}" in refused(capsys, *args, "--max-memory", amount)
    assert "max_memory must be at most" in refused(capsys, *args, "--max-memory", "9999999T")


def test_messages_about_generation_name_the_options(capsys):
    args = ("generate", MODEL, PROMPTS / "taboo.csv", "--limit", 1)
    assert "--max-new-tokens" in refused(capsys, *args, "--max-new-tokens", 5000)
    assert "--max-memory" in refused(capsys, *args, "--max-memory", "64KiB")


@pytest.mark.parametrize(
    ("before", "loaded", "after"),
    [
        ({}, False, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, False, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "100"}, False, {"GOMP_SPINCOUNT": "100"}),
        ({}, True, {}),  # a process that uses torch already is somebody else's
    ],
)
def test_waiting_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch, before, loaded, after):
    monkeypatch.setattr(os, "environ", dict(before))
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
    entry._let_threads_sleep()
    assert os.environ == after
