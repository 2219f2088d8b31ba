"""benchmarks/first_light.sh and second_light.sh: at small shapes on the CPU, and with programs in the place of Python that
crash or hang. There is one try on a GPU; what can go wrong without one is to go wrong here."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.gpu import light_table, run
from benchmarks.gpu.checkup import ROOT
from benchmarks.gpu.rows import read, timed

FIRST, SECOND = ROOT / "benchmarks" / "first_light.sh", ROOT / "benchmarks" / "second_light.sh"
START_S = 15  # of a process of the benchmark: its imports, and an end before its limit
ROW = {
    "bench": "gpu", "case": "llama2-7b-short", "path": "shipsfast", "median_s": 16.0, "share_of_floor": 0.9, "device": "H100",
    "commit": "abc", "times_slower_than_shipsfast": 1.0, "check": "passed",
}  # fmt: skip


def tree() -> dict:
    """Size and time of every file that a benchmark could have written."""
    places = [ROOT / name for name in ("benchmarks", "kernels", "docs", "shipsfast", "csrc", "tools")]
    files = [file for place in places for file in place.rglob("*") if "__pycache__" not in file.parts]
    files += [file for file in ROOT.iterdir() if not file.name.startswith(".")]  # of tools, as .pytest_cache
    return {file: file.is_dir() or (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def start(script, *arguments, **environment) -> subprocess.Popen:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [script, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT.parent,
    )  # fmt: skip


@pytest.fixture(scope="module")
def lights(tmp_path_factory):
    """By name: folder and output of a whole run of each, beside each other; and what both left in the tree."""
    before = tree()
    home = tmp_path_factory.mktemp("home")
    found = {}
    for name, script in (("first", FIRST), ("second", SECOND)):
        folder = tmp_path_factory.mktemp(name) / "out"
        found[name] = folder, start(script, "--smoke", folder, SHIPSFAST_COMMIT="abc123", HOME=str(home))
    outputs = {
        name: (folder, process.communicate()[0], process.returncode)
        for name, (folder, process) in found.items()
    }
    after = tree()
    return outputs, {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_light_measures_everything_and_prints_a_table_last(lights, name):
    folder, output, code = lights[0][name]
    assert code == 0, output
    rows = read(folder / "smoke-cpu.jsonl")
    expected = {
        "first": {"build", "tests", "ceilings", "llama2-7b-short", "profile-llama2-7b", "kl-v32000", "small-rope"},
        "second": {
            "llama2-7b-template", "llama31-8b", "tree-llama31", "decode-llama2", "precision-llama2-7b", "llama2-7b-generation",
            "chunk-tokens", "head-chunk",
        },
    }  # fmt: skip
    assert {row["case"] for row in rows} >= expected[name]
    assert [row for row in rows if "failed" in row or row.get("check", "").startswith("failed")] == []
    assert all(row["commit"] for row in rows)
    table = light_table.table(rows)
    lines = output.rstrip().splitlines()
    assert lines[-1 - len(table) : -1] == table and max(map(len, table)) < 200
    assert sum(len(line) + 1 for line in lines[-1 - len(table) :]) < 12000, "what is seen where output is cut"
    assert re.match(r"\d+ measured, 0 failed or wrong, \d+ not measured; ", lines[-1])
    stages = (folder / "stages.txt").read_text().splitlines()
    assert len(stages) == {"first": 3, "second": 1}[name]
    assert all(line.endswith("exit code 0") for line in stages), stages


@pytest.mark.parametrize("name", ["first", "second"])
def test_all_that_a_light_writes_is_in_its_folder(lights, name):
    folder, output, _ = lights[0][name]
    files = {file.name for file in folder.iterdir()}
    common = {"environment.txt", "smoke-cpu.jsonl", "stages.txt", f"{name}.log"}
    assert files == common | ({"tune.txt", "smoke-cpu-profile.txt"} if name == "first" else set())
    assert len(files) < 8, "and tests.log on a GPU"
    assert (folder / f"{name}.log").read_text() == output
    environment = (folder / "environment.txt").read_text()
    assert "commit abc123" in environment and "\ntorch " in environment and "\ntransformers " in environment
    assert lights[1] == set(), "written into the tree"


def cases_of(function: str) -> list[str]:
    body = FIRST.read_text().partition(f"\n{function}() {{")[2].partition("\n}")[0]
    return [name for line in body.split("stage ")[-1:] for name in re.findall(r"--case (\S+)", line)]


def test_budgets_fit_what_cases_need():
    """A case that needs more than is left is not begun."""
    number = lambda text: int(re.search(text, FIRST.read_text())[1])
    first, second = cases_of("first"), cases_of("second")
    assert set(first) | set(second) <= set(run.NAMES) and len(first) == 5 and len(second) == 7
    needed = lambda cases: sum(run.NEEDS_S[name] for name in cases)
    measure, table = number(r"MEASURE_S=(\d+)"), number(r"TABLE_S=(\d+)")
    assert needed(first) + START_S <= measure
    before = number(r'first \]; then : "\$\{budget:=(\d+)') - measure - table
    assert before >= needed(["build", "tests"]) + START_S + 50, "and the sweep of launch parameters"
    assert run.QUICK_BUILD_S + run.QUICK_TESTS_S <= number(r'"build and tests" (\d+)') - 8
    assert needed(second) + START_S <= number(r'else : "\$\{budget:=(\d+)') - table


@pytest.fixture
def fake(tmp_path):
    """Starts a light with a program that does as told at each stage, and makes the table as Python does."""

    def begin(*arguments, build="exit 0", tune="exit 0", measure="exit 0"):
        program = tmp_path / "python"
        program.write_text(
            f"#!/bin/bash\n"
            f'case "$*" in *gpu-table*) exec {sys.executable} "$@";; *"--case build"*) {build};; *benchmarks.tune*) {tune};;\n'
            f'  *"benchmarks gpu"*) while [ "$1" != --results ]; do shift; done; {measure};; esac\n'
        )
        sampled = tmp_path / "nvidia-smi"
        sampled.write_text(
            '#!/bin/bash\n[[ "$*" == *-l* ]] || { echo "driver 580"; exit; }\n'
            f"echo $$ >{tmp_path}/sampler; echo 1980 MHz; exec sleep 300\n"
        )
        for file in (program, sampled):
            file.chmod(0o755)
        process = start(
            FIRST, *arguments, tmp_path / "out", PYTHON=str(program), PATH=f"{tmp_path}:{os.environ['PATH']}"
        )
        output = process.communicate()[0]
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "sampler").read_text()), 0)
        environment = (tmp_path / "out" / "environment.txt").read_text()
        assert "driver 580" in environment and "1980 MHz" in environment
        return process.returncode, output, (tmp_path / "out" / "stages.txt").read_text()

    return begin


def append(row) -> str:
    return f"echo '{json.dumps(row)}' >>\"$2/nvidia-h100.jsonl\""


def test_a_stage_that_fails_does_not_stop_the_next(fake):
    code, output, stages = fake(
        build="exit 7", tune="echo so far; kill -9 $$", measure=f"{append(ROW)}; exit 1"
    )
    assert code == 0
    assert re.fullmatch(
        r"build and tests: \d+ s, exit code 7\ntune: .*\nmeasure: \d+ s, exit code 1\n", stages
    )
    assert "so far" in output and output.rstrip().endswith(
        "1 measured, 0 failed or wrong, 0 not measured; H100, commit abc"
    )


def test_a_stage_that_hangs_is_ended_and_keeps_what_it_wrote(fake):
    code, output, stages = fake("--budget-s", 15, measure=f"{append(ROW | {'check': 'pending'})}; sleep 60")
    assert code == 0 and re.search("measure: ended after 1[0-6] s", stages)
    assert "build and tests: not run, 15 s of 15 s were left" in stages and "tune: not run" in stages
    assert (
        "never checked" in output.splitlines()[-2]
        and "1 measured, 1 failed or wrong" in output.splitlines()[-1]
    )


def test_nothing_measured_is_an_exit_code(fake):
    row = {name: ROW[name] for name in ("bench", "case", "path", "device", "commit")} | {
        "failed": "no kernel image"
    }
    code, output, _ = fake(measure=f"{append(row)}; exit 1")
    assert code == 3 and "failed: no kernel image" in output and "0 measured, 1 failed" in output
    code, output, _ = fake("--budget-s", "9")
    assert code == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "a folder"), (["--budget-s", "x", "a"], "whole seconds"), (["--fast", "a"], "unknown option --fast"),
        (["a", "b"], "one folder"), (["/dev/null/x"], "cannot write into /dev/null/x"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, told):
    process = start(FIRST, *arguments)
    assert told in process.communicate()[0] and process.returncode == 2


def test_no_python(tmp_path):
    process = start(FIRST, tmp_path / "out", PYTHON="no-such-python")
    assert "there is no no-such-python" in process.communicate()[0] and process.returncode == 2


def test_the_table_marks_what_does_not_count(tmp_path, capsys):
    rows = [
        ROW | {"check": "failed: scores differ from float32 by 0.2 nats"},
        ROW | {"path": "HF hooks", "times_slower_than_shipsfast": 3.5, "check": "passed"},
        ROW | {"case": "kl-v32000", "median_s": None, "median_ms": 0.5, "timed_by": "graph"},
        {name: ROW[name] for name in ("bench", "case", "device", "commit")} | {"path": "loop", "not_measured": "3 s left"},
    ]  # fmt: skip
    (tmp_path / "nvidia-h100.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"bench": "g'
    )
    assert light_table.main([str(tmp_path)]) == 0
    _, ours, peer, loop, kernel, last = capsys.readouterr().out.splitlines()
    assert "WRONG" in ours and "16.00 s" in ours and "scores differ from float32 by 0.2" in ours
    assert "3.50" not in peer and peer.endswith(" ok"), "a ratio to a wrong result"
    assert "not measured: 3 s left" in loop and "0.500 ms" in kernel and "graph" in kernel
    assert last.startswith("3 measured, 1 failed or wrong, 1 not measured; H100, commit abc")
    assert all(timed(row) for row in rows[:3])
    assert light_table.main([str(tmp_path / "none")]) == 2


def test_the_table_needs_nothing_but_the_standard_library(tmp_path):
    code = (
        "import runpy, sys; sys.argv[1:] = ['gpu-table', sys.argv[1]]\n"
        "try: runpy.run_module('benchmarks', run_name='__main__')\n"
        "finally: assert not {'torch', 'numpy', 'typer'} & set(sys.modules), 'too much is imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3 and "0 measured" in done.stdout, done.stderr
