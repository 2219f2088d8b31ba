"""Run folders: edits to real ones. A result that can be shown comes out, or InputError; nothing else, ever.

Input: a byte for the folder to start from, then edits of run.json, of the tables or of bytes (see `_edit`). Whatever
loads is shown as table, JSON, HTML and Markdown too, and none of them may carry what was put into it as it was.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

import shipsfast
from shipsfast.errors import InputError
from shipsfast.results.certificate import Certificate
from shipsfast.results.completions import Completions
from shipsfast.results.evaluation import EvalResult
from shipsfast.results.gram_bootstrap import Grams
from shipsfast.results.sahara import SaharaResult
from shipsfast.results.ships import ShipsResult
from shipsfast.results.subspace import SubspaceResult
from shipsfast.results.tables import as_json, show
from shipsfast.results.top_heads import TopHeads
from shipsfast.runs.manifest import as_text
from shipsfast.text import visible

from .engine import Reader

VALUES = (
    None, True, 0, -1, 1, 2, 3, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../../x", "/etc/hostname",
    "<script>alert(1)</script>", "[red]x[/red]", "[/x]", "\x1b[2J\x07", "\u202e\ud800", "ships", "subspace", "sahara",
    "evaluate", "complete", "kl", "asr", [], [[]], [1, 2, 3], [10**9] * 3, [2, 2, 2], [-1, 2, 2], ["a"], {}, {"a": 1},
    {"name": "kl"}, {"name": "m", "unit": "[b]", "signed": True, "label": "<b>"},
)  # fmt: skip
STEERS = ("\x1b[2J", "\x07", "\u202e", "\ud800")
MARKUP = ("<script>alert",)
IDENTITY = {"shape": [2, 2, 3], "prompts": ["aa", "bb"], "model": "0", "unit": "head", "dtype": "float32"}
_folder: Path
_starts: list[dict[str, bytes]] = []


def _results() -> Iterator[tuple[str, object]]:
    """Small results of every kind, as if they had been measured."""
    rng = np.random.default_rng(0)
    record = {"attention_backend": "cpp", "layers": "fused", "seconds": 1.0, "scan_seconds": 0.5}
    record |= {"model": {"class": "Llama", "name": "a/b"}, "ablation": "zero", "status": "complete"}
    scores = rng.random((2, 2, 3))
    more = IDENTITY | {"kind": "ships", "metric": "js"}
    js = record | {"metric": {"name": "js", "unit": "nats", "signed": False, "label": "JS"}}
    also = {"js": ShipsResult(scores, 1e-9, js, more)}
    one = IDENTITY | {"kind": "ships", "further_metrics": [{"name": "js"}]}
    yield "ships", ShipsResult(scores, 1e-9, record, one, also)
    prompts = [f"p{i}" for i in range(4)]
    wide = IDENTITY | {"shape": [4, 2, 3], "prompts": prompts, "rank": 1}
    states = rng.random((2, 3, 4, 5))
    grams = Grams(np.eye(4), states @ states.swapaxes(-1, -2))
    yield "subspace", SubspaceResult(rng.random((2, 3)), 1e-9, record, wide | {"kind": "subspace"}, grams)
    angles = rng.random((1, 2, 3))
    search = wide | {"kind": "sahara", "beam": 1}
    grams = Grams(np.eye(4), grams.heads[None])
    yield "sahara", SaharaResult([(0, 1)], angles, [([(0, 1)], 0.5)], 1e-9, record, search, grams)
    search |= {"control": {"prompts": ["cc", "dd"]}, "penalty": 2.0}
    found = [([(0, 1)], 0.5)], 1e-9, record, search, grams, rng.random((1, 2, 2, 3)), [0.25]
    yield "controlled", SaharaResult([(0, 1)], angles, *found)
    metric = {"metric": {"name": "kl", "unit": "nats", "signed": False, "label": "KL"}}
    top = IDENTITY | {
        "kind": "top",
        "heads": "all",
        "metric": {"name": "kl"},
        "k": 1,
        "error": 0.01,
        "screen": "auto",
        "seed": 0,
    }
    exact = np.where(np.arange(3) < 2, scores, np.nan)
    upper = np.where(np.isnan(exact[0]), 0.1, np.nan)
    sure = Certificate(
        1, 6, 2, "kl", "head", 0.01, "float32", 4, 0, "bfloat16", "[b]", 0.01, 1e-4, True, 4, 2, 0.0, 0.1, 0.2, False, (1,),
        work={"screen": 1.0, "exact": 0.5},
    )  # fmt: skip
    record = record | metric | {"screen": {"dtype": "bfloat16", "why": "[b]"}}
    stored = {"scores": exact, "screen": scores}
    yield "top", TopHeads.of(stored, np.zeros(scores.shape, bool), upper, sure, record, top)


def _evaluation(path: Path) -> None:
    identity = {
        "kind": "evaluate", "groups": [[], [[0, 1]]], "keep_text": True, "control": None, "prompts": ["aa", "bb"],
        "unit": "head", "generation": {"max_new_tokens": 4, "do_sample": False}, "incoherent": {"margin_nats": 1.5, "turn_nats": 6.0},
    }  # fmt: skip
    record = {"judge": "keywords", "prompt_texts": ["one", "<i>two"], "seconds": 1.0, "status": "complete"}
    folder = shipsfast.runs.folder.RunFolder(path, identity)
    folder.write_manifest(record)
    done = Completions(2, 2)
    done.label[:], done.num_tokens[:], done.sha256[:] = 0, 3, "ab"
    done.nll_nats[:] = [[0.5, 1.0], [0.7, 9.0]]
    done.text = [["yes", "no <b>"], ["\x1b[31mx", "`y`"]]
    folder.write_part(done.frame(text=True), "completions")


@contextlib.contextmanager
def setup() -> Iterator[None]:
    global _folder
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        _folder = Path(name) / "run"
        _starts.clear()
        for kind, result in _results():
            result.save(Path(name) / kind)
        _evaluation(Path(name) / "evaluate")
        for kind in ("ships", "subspace", "sahara", "evaluate", "controlled", "top"):
            start = Path(name) / kind
            _starts.append(
                {str(f.relative_to(start)): f.read_bytes() for f in sorted(start.rglob("*")) if f.is_file()}
            )
        yield


def one(data: bytes) -> None:
    reader = Reader(data)
    files = dict(reader.pick(_starts))
    manifest = json.loads(files["run.json"])
    shown = reader.byte() & 1
    while reader:
        manifest = _edit(reader, manifest, files)
    if manifest is not None:
        files["run.json"] = _sealed(manifest, files)
    _write(files)
    try:
        result = shipsfast.load(_folder)
    except InputError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000, f"not one line: {message[:300]!r}"
        assert visible(message) == message, f"steers the terminal: {message[:300]!r}"
        return
    if shown:
        _use(result)


def _write(files: dict[str, bytes]) -> None:
    if _folder.exists():
        for path in sorted(_folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    for name, content in files.items():
        path = _folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _sealed(manifest, files: dict[str, bytes]) -> bytes:
    """With checksums as somebody would make them who wants the folder to be read."""
    if not isinstance(manifest, dict):
        return json.dumps(manifest).encode()
    for entry in manifest["parts"] if isinstance(manifest.get("parts"), list) else []:
        name = entry.get("file") if isinstance(entry, dict) else None
        content = files.get(name) if isinstance(name, str) else None
        if content is not None:
            entry |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return as_text(manifest).encode()


def _use(result) -> None:
    out = io.StringIO()
    try:
        json.dumps(as_json(result, 3))
        show(result, 3, console=Console(file=out, width=100, highlight=False, force_terminal=False))
        repr(result), result.to_pandas()
    except InputError:
        return
    assert not any(attack in out.getvalue() for attack in STEERS), (
        f"carried through: {out.getvalue()[:500]!r}"
    )
    if isinstance(result, EvalResult):
        for name in ("view.html", "view.md"):
            result.view(_folder / name)
            text = (_folder / name).read_text("utf-8")
            assert not any(attack in text for attack in STEERS + MARKUP), f"carried through: {text[:500]!r}"


def _edit(reader: Reader, manifest, files: dict[str, bytes]):
    """One change; returns the manifest, or None once its bytes are given."""
    kind = reader.below(8)
    if kind < 4 and isinstance(manifest, (dict, list)):
        holder, key = _somewhere(reader, manifest)
        if holder is None:
            return _value(reader)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, _value(reader))
        else:
            holder[key] = _value(reader)
    elif kind in (4, 5):
        _edit_table(reader, files)
    elif kind == 6:
        name = reader.pick(sorted(files))
        content = bytearray(files[name])
        if content:
            content[reader.below(len(content))] = reader.byte()
        files[name] = bytes(content[: len(content) - reader.byte() % 3])
    elif reader.byte() == 255:
        files["run.json"] = reader.rest()
        return None
    return manifest


def _value(reader: Reader):
    return copy.deepcopy(reader.pick(VALUES))


def _somewhere(reader: Reader, tree):
    """A container in the tree, and one of its keys."""
    holder, key = None, None
    while isinstance(tree, (dict, list)) and tree:
        keys = sorted(tree) if isinstance(tree, dict) else range(len(tree))
        holder, key = tree, reader.pick(keys)
        tree = holder[key]
        if reader.below(4) == 0:
            break
    return holder, key


def _edit_table(reader: Reader, files: dict[str, bytes]) -> None:
    """Another value in a cell, another name or type of a column, or a column less."""
    name = reader.pick([n for n in sorted(files) if n.endswith(".parquet")] or [""])
    try:
        table = pq.read_table(io.BytesIO(files[name]))
        at, what = reader.below(table.num_columns), reader.below(5)
        column = table.column_names[at]
        values = table.column(at).to_pylist()
        if what == 0:
            table = table.remove_column(at)
        elif what == 1:
            table = table.rename_columns(
                [reader.pick(("x", "layer", "")) if i == at else c for i, c in enumerate(table.column_names)]
            )
        elif what == 2:
            kind = reader.pick((pa.float64(), pa.string(), pa.int8(), pa.uint64(), pa.bool_(), pa.binary()))
            table = table.set_column(at, column, table.column(at).cast(kind, safe=False))
        else:
            values[reader.below(len(values))] = _value(reader)
            table = table.set_column(at, column, pa.array(values))
        out = io.BytesIO()
        pq.write_table(table, out, compression="none")
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, ZeroDivisionError):
        return  # no such table
    files[name] = out.getvalue()


def seeds() -> Iterator[bytes]:
    for start in range(4):
        yield bytes([start, 1])
        yield bytes([start, 1, 2, 0, 0, 7])
        yield bytes([start, 1, 4, 0, 2, 4, 0, 12])
        yield bytes([start, 1, 6, 0, 0, 3, 1])
