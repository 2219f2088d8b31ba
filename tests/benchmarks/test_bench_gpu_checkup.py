"""What must be right before anything is measured on a GPU: modules, tests, the built extension, where rows come from."""

import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import provenance
from benchmarks.gpu import checkup, run


def test_missing_modules_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(checkup, "MODULES", ("torch", "no_such_module"))
    assert run.main(["--smoke"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "no_such_module" in told[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    if checkup.missing_modules(on_gpu=True) is None:
        assert run.main(["--quick"]) == 2
        assert "sees no CUDA GPU" in capsys.readouterr().err


def test_results_of_the_gpu_tests_are_read():
    assert checkup.read_tests("123 passed, 4 skipped in 60.1s", 0) == {
        "passed": 123,
        "failed_tests": 0,
        "skipped": 4,
    }
    found = checkup.read_tests(
        "FAILED tests/test_x.py::test_y - assert 1 == 2\n== 1 failed, 3 passed in 2s ==", 1
    )
    assert (found["passed"], found["failed_tests"]) == (3, 1)
    assert "exited with 1; 1 failed, 3 passed: FAILED tests/test_x.py::test_y" in found["failed"]
    assert "exited with 5" in checkup.read_tests("no tests ran in 0.1s", 5)["failed"]
    assert "exited with 0; 3 skipped" in checkup.read_tests("3 skipped in 1s", 0)["failed"]


@pytest.mark.parametrize("workers", [True, False])
def test_tests_that_did_not_finish_leave_their_counts(workers):
    begin = "2 workers [8 items]" if workers else "collected 76 items / 68 deselected / 8 selected"
    line = "[gw0] [ 12%] {} tests/gpu/x.py::test[a]" if workers else "tests/gpu/x.py::test[a] {} [ 12%]"
    ends = ["PASSED", "PASSED", "SKIPPED", "FAILED"]
    output = "\n".join([begin, *(line.format(x) for x in ends), "tests/gpu/x.py::test[b] "])
    found = checkup.read_tests(output, None, 80)
    assert (found["passed"], found["failed_tests"], found["skipped"]) == (2, 1, 1)
    assert found["failed"] == "not finished after 80 s; so far of 8: 2 passed, 1 failed, 1 skipped"
    found = checkup.read_tests(output.replace("FAILED", "PASSED"), None, 80)
    assert found["passed"] == 3 and found["not_measured"].startswith(
        "not finished after 80 s; so far of 8: 3 passed"
    )
    assert "so far: none" in checkup.read_tests("", None, 80)["not_measured"]


def test_the_outcome_of_tests_is_a_row_and_a_log(tmp_path, monkeypatch):
    """Also where they are ended: a real pytest, of a test that waits."""
    (tmp_path / "test_two.py").write_text(
        "import pytest, time\npytestmark = pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    real = checkup.importlib.util.find_spec
    monkeypatch.setattr(
        checkup.importlib.util, "find_spec", lambda name: None if name == "xdist" else real(name)
    )
    log = tmp_path / "out" / "tests.log"
    found = checkup.gpu_tests([str(tmp_path)], "test_a or test_b", 6.0, log)
    assert "of 2: 1 passed" in found["not_measured"] and found["passed"] == 1
    assert checkup.gpu_tests([str(tmp_path)], "test_a", 20.0, log)["passed"] == 1
    assert log.read_text().count("test_a") >= 2


def test_the_quick_filter_chooses_a_known_few():
    """Collected as on a machine with a GPU."""
    (files, chosen), *others = run.QUICK_TESTS.values()
    code = (
        "import sys, pytest, torch, shipsfast.engine.fused_layer\n"  # what looks at a GPU when it is imported is, before
        "torch.cuda.is_available = lambda: True\n"
        "raise SystemExit(pytest.main(['--collect-only', '-q', '-m', 'gpu', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    environment = os.environ | {"SHIPSFAST_TEST_GPU": "1", "PYTHONPATH": str(checkup.ROOT)}
    environment.pop("TEST_PART", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *files, "-k", chosen], cwd=checkup.ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert not others and done.returncode == 0, done.stdout + done.stderr
    found = {line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line}
    assert found == {
        f"{test}[{where}{family}-bf16]"
        for test, places in (("test_a_scan", [""]), ("test_a_scan_by_rank", [""]), ("test_generation", [""]), ("test_a_float32_residual_stream", ["several-", "one-"]))
        for where in places
        for family in ("llama", "gemma2")
    }  # fmt: skip


def test_a_program_that_takes_too_long_is_ended_with_its_children():
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(60)'])"
    code, output = checkup.bounded([sys.executable, "-c", script], dict(os.environ), 4.0)
    assert code is None and output.strip() in ("1", "")
    assert checkup.bounded([sys.executable, "-c", "print(3)"], dict(os.environ), 20.0) == (0, "3\n")


def test_a_program_ends_with_the_one_that_waits_for_it(tmp_path):
    """Also in its session of its own, or it would go on using the GPU."""
    child = f"import os, time, pathlib; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "import os, signal, sys; from benchmarks.gpu import checkup\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"checkup.bounded([sys.executable, '-c', {child!r}], dict(os.environ), 60.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=checkup.ROOT)
    until = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_extension_of_other_sources_is_built_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(checkup, "ROOT", tmp_path)
    monkeypatch.setattr(checkup, "STAMP", tmp_path / "build" / ".extension")
    for name in ("csrc", "shipsfast"):
        (tmp_path / name).mkdir()
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "csrc" / "a.cpp").write_text("1")

    def build(command, environment, timeout_s):
        calls.append(environment.get("TORCH_CUDA_ARCH_LIST"))
        (tmp_path / "shipsfast" / "_C.abi3.so").write_text("")
        return 0, ""

    monkeypatch.setattr(checkup, "bounded", build)
    assert checkup.build_extension("9.0")["built"] and not checkup.build_extension("9.0")["built"]
    (tmp_path / "csrc" / "a.cpp").write_text("2")
    assert checkup.build_extension("9.0")["built"] and calls == ["9.0", "9.0"]
    monkeypatch.setattr(checkup, "bounded", lambda *_: (1, "x.cu: error: bad"))
    with pytest.raises(RuntimeError, match=r"failed: x.cu: error: bad"):
        checkup.build_extension("8.0")
    monkeypatch.setattr(checkup, "bounded", lambda *_: (None, ""))
    with pytest.raises(RuntimeError, match="took more than 90 s"):
        checkup.build_extension("8.0", 90)


def test_a_copy_without_history_takes_its_commit_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_output", lambda *_: None)
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123")
    found = provenance.provenance("cpu")
    assert found["commit"] == "abc123" and found["dirty"] is None and len(found["sources"]) == 12


def test_a_copy_inside_another_repository_is_not_of_its_commit(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "other"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.setattr(provenance, "ROOT", copy)
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123")
    found = provenance.provenance("cpu")
    assert found["commit"] == "abc123" and found["dirty"] is None


def test_a_missing_program_is_no_error():
    assert provenance._output("no-such-program-here") is None
