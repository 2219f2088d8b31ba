"""What run.json may say. It comes from a disk that anybody may have written to, so that every field which is read is
checked first: its type, its range, and how much memory it asks for. Fields that nobody reads may be anything. A
checksum keeps accidents out; a manifest made by hand may still say anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from ..errors import InputError

MOST_LAYERS = MOST_HEADS = 1 << 14  # far above any model
MOST_STEPS = 1 << 20  # groups of heads, heads of a search, places of a beam
BYTES_OF_A_COMPLETION = 128
ROOMS = ("scores", "grams", "completions", "control", "basis")
PART_FILE = re.compile(rf"({'|'.join(ROOMS)})/part-(\d{{6,9}})\.parquet")
Test = Callable[[object], bool]


def check_manifest(file: Path, manifest: dict) -> None:
    """Raises InputError, naming the field, for a manifest that no run has written."""
    identity, parts = manifest.get("identity"), manifest.get("parts")
    _need(file, "identity", isinstance(identity, dict))
    _need(file, "parts", _list(_object)(parts), "a list of parts")
    for number, entry in enumerate(parts):
        _need(file, f"parts[{number}]", entry.keys() == PART.keys(), f"an object with {', '.join(PART)}")
        _fields(file, f"parts[{number}].", entry, PART)
    _need(file, "parts", len({entry["file"] for entry in parts}) == len(parts), "a list of different files")
    kind = identity.get("kind")
    _need(file, "identity.kind", _text(kind))
    _fields(file, "identity.", identity, IDENTITY)
    _fields(file, "", manifest, RECORD)
    for name, required in (("metric", METRIC), ("model", MODEL)):
        if name in manifest:
            _fields(file, f"{name}.", manifest[name], required, all_of=name == "metric" and METRIC_NEEDED)
    if kind == "evaluate":
        size = _check_evaluation(file, manifest, identity)
    elif kind in ("ships", "subspace", "sahara"):
        size = _check_scan(file, manifest, identity, kind)
    else:
        return
    free = psutil.virtual_memory().available
    if size > free // 2:
        raise InputError(
            f"{file} declares results of {size / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free: read it on a "
            "larger machine, or do not trust it"
        )


def _check_scan(file: Path, manifest: dict, identity: dict, kind: str) -> int:
    """Returns the bytes that its scores take."""
    shape = identity.get("shape")
    _need(file, "identity.shape", _shape(shape), "three whole numbers: prompts, layers, heads")
    prompts, layers, heads = shape
    if "prompts" in identity:
        _need(
            file, "identity.prompts", len(identity["prompts"]) == prompts, "as many as the shape has prompts"
        )
    metric = identity.get("metric")
    answers = isinstance(metric, dict) and metric.get("name") == "asr"
    if "plan" in manifest and not answers:
        _fields(file, "plan.", manifest["plan"], PLAN, all_of=PLAN)
        _need(file, "plan", manifest["plan"].keys() == PLAN.keys(), f"an object with {', '.join(PLAN)}")
    if kind == "ships":
        return 8 * prompts * layers * heads * (1 + len(identity.get("further_metrics", [])))
    _need(file, "identity.prompts", "prompts" in identity, "the prompts' hashes")
    _need(file, "identity.rank", "rank" in identity, "a whole number")
    if kind == "subspace":
        return 8 * layers * heads
    _need(file, "identity.beam", "beam" in identity, "a whole number")
    steps = identity.get("group_size", 1)
    if manifest.get("status") == "complete":
        _need(file, "chosen", "chosen" in manifest and "beams" in manifest, "the heads of a finished search")
        chosen, beams = manifest["chosen"], manifest["beams"]
        steps = len(chosen)
        _need(
            file,
            "chosen",
            steps >= 1 and all(i < layers and j < heads for i, j in chosen),
            "heads of the model",
        )
        path = manifest.get("path") or [0] * steps
        _need(
            file, "path", len(path) == steps and all(at < identity["beam"] for at in path),
            "a place in the beam for each head",
        )  # fmt: skip
        _need(file, "beams", all(map(_beam, beams)), "groups with their angles")
    return 8 * steps * identity["beam"] * layers * heads


def _check_evaluation(file: Path, manifest: dict, identity: dict) -> int:
    for name in ("groups", "prompts", "keep_text", "control"):
        _need(file, f"identity.{name}", name in identity, "what was evaluated")
    prompts, control = len(identity["prompts"]), identity["control"]
    if manifest.get("prompt_texts") is not None:
        _need(file, "prompt_texts", len(manifest["prompt_texts"]) == prompts, "one for each prompt")
    if control is not None:
        _fields(file, "identity.control.", control, CONTROL, all_of=CONTROL)
        prompts += len(control["prompts"])
    if "generation" in identity:
        drawn = identity["generation"].get("do_sample") is True
        _fields(
            file, "identity.generation.", identity["generation"], GENERATION, all_of=DRAWN if drawn else (),
        )  # fmt: skip
    return BYTES_OF_A_COMPLETION * (len(identity["groups"]) + 1) * prompts


def _fields(
    file: Path, where: str, found, tests: dict[str, tuple[Test, str]], all_of: Iterable[str] = ()
) -> None:
    _need(file, where.rstrip("."), isinstance(found, dict), "an object")
    for name in all_of or ():
        _need(file, where + name, name in found, tests[name][1])
    for name, (test, expected) in tests.items():
        if name in found:
            _need(file, where + name, test(found[name]), expected)


def _need(file: Path, name: str, holds: bool, expected: str = "what a run writes there") -> None:
    if not holds:
        raise InputError(f"{file} is damaged: {name} is not {expected}; delete the folder or restore it")


def _text(x) -> bool:
    return isinstance(x, str)


def _number(x) -> bool:
    return isinstance(x, float) or (isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63)


def _count(least: int, most: int) -> Test:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def _flag(x) -> bool:
    return isinstance(x, bool)


def _object(x) -> bool:
    return isinstance(x, dict)


def _list(test: Test) -> Test:
    return lambda x: isinstance(x, list) and all(map(test, x))


def _or_none(test: Test) -> Test:
    return lambda x: x is None or test(x)


_layer, _head = _count(0, MOST_LAYERS - 1), _count(0, MOST_HEADS - 1)


def _pair(x) -> bool:
    """A head, or a whole layer: [layer, null]."""
    return isinstance(x, list) and len(x) == 2 and _layer(x[0]) and (x[1] is None or _head(x[1]))


def _scanned_head(x) -> bool:
    return _pair(x) and x[1] is not None


def _shape(x) -> bool:
    return (
        isinstance(x, list)
        and len(x) == 3
        and _count(1, 1 << 40)(x[0])
        and _count(1, MOST_LAYERS)(x[1])
        and _count(1, MOST_HEADS)(x[2])
    )


def _beam(x) -> bool:
    return isinstance(x, dict) and _list(_scanned_head)(x.get("heads")) and _number(x.get("angle_deg"))


def _marks(x) -> bool:
    first = x.get("first", {}) if isinstance(x, dict) else None
    return first == {} or (
        isinstance(first, dict)
        and _count(0, 1 << 40)(first.get("prompt"))
        and _pair([first.get("layer"), first.get("head")])
        and _text(first.get("why"))
    )


def _noise(x) -> bool:
    return x is None or (_number(x) and 0 <= x < float("inf"))


IDENTITY: dict[str, tuple[Test, str]] = {
    "unit": (lambda x: x in ("head", "kv_group"), "head or kv_group"),
    "dtype": (_text, "a text"),
    "prompts": (_list(_text), "a list of hashes"),
    "rank": (_count(1, 1 << 31), "a whole number"),
    "beam": (_count(1, MOST_STEPS), "a whole number"),
    "group_size": (_count(1, MOST_STEPS), "a whole number"),
    "further_metrics": (_list(_object), "a list of metrics"),
    "groups": (_list(_list(_pair)), "a list of groups of heads"),
    "keep_text": (_flag, "true or false"),
    "control": (_or_none(_object), "null or an object"),
    "generation": (_object, "an object"),
}
PART: dict[str, tuple[Test, str]] = {
    "file": (lambda x: _text(x) and PART_FILE.fullmatch(x) is not None, "the name of a part"),
    "sha256": (_text, "a text"),
    **dict.fromkeys(("bytes", "rows", "commit"), (_count(0, 1 << 62), "a whole number")),
}
# Of a scan: how what is left of it will be cut.
PLAN: dict[str, tuple[Test, str]] = {
    "prompt_groups": (_list(_count(1, 1 << 40)), "a list of numbers of prompts"),
    **dict.fromkeys(
        ("rows_per_block", "chunk_tokens", "head_rows"), (_count(1, 1 << 62), "a whole number of at least 1")
    ),
    **dict.fromkeys(("memory_limit_bytes", "predicted_bytes"), (_count(0, 1 << 62), "a whole number")),
}
RECORD: dict[str, tuple[Test, str]] = {
    **dict.fromkeys(
        ("status", "ablation", "attention_backend", "layers", "judge", "template"), (_text, "a text")
    ),
    **dict.fromkeys(("seconds", "scan_seconds"), (_number, "a number")),
    "noise_floor": (_noise, "a number of at least 0"),
    "metric": (_object, "an object"),
    "model": (_object, "an object"),
    "prompt_texts": (_or_none(_list(_text)), "a list of texts"),
    "chosen": (_list(_scanned_head), "a list of heads"),
    "path": (_list(_count(0, MOST_STEPS)), "a list of places"),
    "beams": (_list(_object), "a list of groups"),
    "nonfinite": (_marks, "what is known of marked scores"),
    "base_singular_values": (_list(_number), "a list of numbers"),
}
METRIC_NEEDED = ("name", "unit", "signed", "label")
METRIC: dict[str, tuple[Test, str]] = {
    **dict.fromkeys(("name", "unit", "label", "title", "floor"), (_text, "a text")),
    "signed": (_flag, "true or false"),
}
MODEL: dict[str, tuple[Test, str]] = dict.fromkeys(("class", "name"), (_text, "a text"))
CONTROL: dict[str, tuple[Test, str]] = {
    "prompts": (_list(_text), "a list of hashes"),
    "tokens": (_count(1, 1 << 31), "a whole number"),
}
DRAWN = ("top_k", "temperature", "seed")
GENERATION: dict[str, tuple[Test, str]] = {
    "max_new_tokens": (_count(0, 1 << 31), "a whole number"),
    "do_sample": (_flag, "true or false"),
    "top_k": (_count(0, 1 << 31), "a whole number"),
    "temperature": (_number, "a number"),
    "seed": (_number, "a number"),
}
