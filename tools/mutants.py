"""Mutation check of the core: python tools/mutants.py [--per-file N] [--seed S] [--only FILE] [--out RESULTS.jsonl]

Changes one expression in one line, runs the tests that are about the file in a copy of the tree, and says whether one
of them failed (killed), all passed (survived) or they took too long (timeout, which counts as killed). The changes are
drawn with a seed from all there are: comparisons, arithmetic, constants, conditions, calls of min and max. Left out are
messages of errors, type hints, docstrings and what only names things. docs/mutants.md has the results.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "scans/metrics.py": [
        "tests/scans/test_metrics.py", "tests/scans/test_scan_metrics.py", "tests/scans/test_several_metrics.py",
    ],
    "ops/divergences.py": ["tests/ops/test_divergences.py", "tests/ops/test_kl_calls.py", "tests/ops/test_kl.py"],
    "ops/jacobi.py": ["tests/ops/test_jacobi.py"],
    "ops/prefix_tree.py": [
        "tests/ops/test_prefix_tree.py", "tests/ops/test_tree_attention_torch.py", "tests/ops/test_block_table.py",
    ],
    "engine/growing_batch.py": [
        "tests/engine/test_fused.py", "tests/engine/test_exactness.py", "tests/models/test_model_untouched.py",
        "tests/answers/test_generation.py::test_every_path_gives_that_text", "tests/models/test_wrapped_models.py",
    ],
    "ops/reference.py": [
        "tests/ops/test_decode_attention.py::test_the_oracle_is_the_formula",
        "tests/ops/test_decode_attention.py::test_the_oracle_is_tree_attention_of_a_chains_last_token",
        "tests/ops/test_tree_attention_torch.py",
    ],
    "models/attention_hook.py": [
        "tests/models/test_model_untouched.py", "tests/models/test_refusals.py", "tests/engine/test_exactness.py",
        "tests/engine/test_ablations.py", "tests/engine/test_long_prompts.py", "tests/models/test_wrapped_models.py",
    ],
}  # fmt: skip
TIMEOUT_S = 900
MOST_BYTES = 6 << 30  # of address space: a loop that no longer ends may make lists meanwhile
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "minimum": "maximum"}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    before: str  # the line
    after: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}  {self.before.strip()}  ->  {self.after.strip()}"


def mutants(file: str) -> list[Mutant]:
    """All of a file of shipsfast/, in its order."""
    source = (ROOT / "shipsfast" / file).read_text("utf-8")
    lines = source.splitlines()
    out = []
    for node, changed in _changes(ast.parse(source), in_code=False):
        if node.lineno != node.end_lineno:
            continue
        line = lines[node.lineno - 1]
        raw = line.encode()
        after = (raw[: node.col_offset] + _text(changed).encode() + raw[node.end_col_offset :]).decode()
        if after != line:
            out.append(Mutant(file, node.lineno, line, after))
    return list(dict.fromkeys(out))


def _changes(node: ast.AST, in_code: bool) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)):
        return
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        in_code = True
    if in_code and isinstance(node, ast.expr):
        for changed in _of(node):
            yield node, ast.fix_missing_locations(changed)
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment") or (
            name == "args" and isinstance(field, ast.arguments)
        ):
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                yield from _changes(child, in_code)


def _of(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield _inside(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))
    elif isinstance(node, ast.BoolOp):
        yield _inside(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield node.operand
    elif (
        isinstance(node, ast.Constant)
        and not isinstance(node.value, (str, bytes, complex))
        and node.value is not ...
    ):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif node.value is not None:
            # Mostly a dimension or an offset: one less, so that it is still one that there is.
            yield ast.Constant(
                node.value - 1 if type(node.value) is int and node.value > 0 else node.value + 1
            )
    elif isinstance(node, ast.IfExp):
        yield _inside(ast.IfExp(node.test, node.orelse, node.body))
    elif isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name) and function.id in SWAPPED:
            yield ast.Call(ast.Name(SWAPPED[function.id]), node.args, node.keywords)
        elif isinstance(function, ast.Attribute) and function.attr in SWAPPED:
            yield ast.Call(ast.Attribute(function.value, SWAPPED[function.attr]), node.args, node.keywords)


def _inside(node: ast.expr) -> ast.expr:
    """In parentheses, whatever stands beside it."""
    return _Parenthesised(node)


class _Parenthesised(ast.expr):
    _fields = ("value",)

    def __init__(self, value: ast.expr) -> None:
        super().__init__()
        self.value = value


def _text(node: ast.AST) -> str:
    return f"({ast.unparse(node.value)})" if isinstance(node, _Parenthesised) else ast.unparse(node)


def chosen(per_file: int, seed: int) -> list[Mutant]:
    out = []
    for file in TESTS:
        found = mutants(file)
        rng = random.Random(f"{seed} {file}")
        out += sorted(rng.sample(found, min(per_file, len(found))), key=lambda m: (m.line, m.after))
    return out


def run(mutant: Mutant, tree: Path) -> tuple[str, float, str]:
    """killed, survived or timeout; seconds; the test that failed."""
    path = tree / "shipsfast" / mutant.file
    original = path.read_text("utf-8")
    lines = original.splitlines(keepends=True)
    lines[mutant.line - 1] = mutant.after + "\n"
    path.write_text("".join(lines), "utf-8")
    log = tree / "log.txt"
    started, status, by = time.monotonic(), "timeout", ""
    try:
        child = os.fork()
        if child == 0:
            _test(tree, TESTS[mutant.file], log)
        while time.monotonic() - started < TIMEOUT_S:
            pid, code = os.waitpid(child, os.WNOHANG)
            if pid:
                failed = [x for x in log.read_text("utf-8").splitlines() if x.startswith(("FAILED", "ERROR"))]
                status, by = (
                    ("survived", "") if code == 0 else ("killed", failed[0] if failed else f"status {code}")
                )
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    finally:
        path.write_text(original, "utf-8")
    return status, time.monotonic() - started, by


def _test(tree: Path, tests: list[str], log: Path) -> None:
    """In a child of a process that has imported what takes long, and nothing of shipsfast."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    out = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import pytest

    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", *tests])
    sys.stdout.flush()
    os._exit(int(code != 0))


def _import_what_takes_long() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py has it
    for name in (
        "torch",
        "numpy",
        "pandas",
        "pytest",
        "transformers",
        "hypothesis",
        "triton",
        "scipy.linalg",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - both are imported when asked for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-file", type=int, default=12)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", choices=[*TESTS], help="one file")
    parser.add_argument("--list", action="store_true", help="show the mutants, run none")
    parser.add_argument("--out", type=Path, help="append a JSON line for each")
    given = parser.parse_args()
    todo = [m for m in chosen(given.per_file, given.seed) if given.only in (None, m.file)]
    if given.list:
        print("\n".join(m.name for m in todo))
        return 0
    done = set()
    if given.out and given.out.exists():
        done = {json.loads(line)["mutant"] for line in given.out.read_text("utf-8").splitlines()}
    survived = 0
    _import_what_takes_long()
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".git", "build", "__pycache__", ".venv", "runs", "docs")
        )
        for mutant in todo:
            if mutant.name in done:
                continue
            status, seconds, by = run(mutant, tree)
            survived += status == "survived"
            print(f"{status:8} {seconds:6.1f} s  {mutant.name}  {by}", flush=True)
            if given.out:
                with open(given.out, "a", encoding="utf-8") as file:
                    entry = {"mutant": mutant.name, "status": status, "seconds": round(seconds, 1), "by": by}
                    file.write(json.dumps(entry) + "\n")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
