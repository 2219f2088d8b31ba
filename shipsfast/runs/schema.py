"""What run.json may say: the form that all kinds share. What a kind adds is in kinds.py. A checksum keeps accidents out; a
manifest made by hand may still say anything."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from ..errors import InputError
from .fields import (
    MOST_STEPS,
    Fields,
    an_object,
    check_fields,
    count,
    error_of_scores,
    flag,
    list_of,
    marks,
    need,
    noise,
    number,
    or_none,
    origin,
    pair,
    refusals,
    scanned_head,
    text,
)  # fmt: skip
from .kinds import KINDS, ROOMS

PART_FILE = re.compile(rf"({'|'.join(ROOMS)})/part-(\d{{6,9}})\.parquet")


def check_manifest(file: Path, manifest: dict) -> None:
    """Raises InputError, naming the field, for a manifest that no run has written."""
    identity, parts = manifest.get("identity"), manifest.get("parts")
    need(file, "identity", isinstance(identity, dict))
    need(file, "parts", list_of(an_object)(parts), "a list of parts")
    for at, entry in enumerate(parts):
        need(file, f"parts[{at}]", entry.keys() == PART.keys(), f"an object with {', '.join(PART)}")
        check_fields(file, f"parts[{at}].", entry, PART)
    need(file, "parts", len({entry["file"] for entry in parts}) == len(parts), "a list of different files")
    kind = identity.get("kind")
    need(file, "identity.kind", text(kind))
    check_fields(file, "identity.", identity, IDENTITY)
    check_fields(file, "", manifest, RECORD)
    if "metric" in manifest:
        check_fields(file, "metric.", manifest["metric"], METRIC, all_of=METRIC_NEEDED)
    if "model" in manifest:
        check_fields(file, "model.", manifest["model"], MODEL)
    if kind not in KINDS:
        return
    size = KINDS[kind].check(file, manifest, identity)
    free = psutil.virtual_memory().available
    if size > free // 2:
        raise InputError(
            f"{file} declares results of {size / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free: read it on a "
            "larger machine, or do not trust it"
        )


IDENTITY: Fields = {
    "answer_tokens": (list_of(count(1, 1 << 31)), "a list of numbers of tokens"),
    "read_at": (list_of(list_of(count(0, 1 << 31))), "a list of lists of positions"),
    "unit": (lambda x: x in ("head", "kv_group"), "head or kv_group"),
    "dtype": (text, "a text"),
    "prompts": (list_of(text), "a list of hashes"),
    "rank": (count(1, 1 << 31), "a whole number"),
    "beam": (count(1, MOST_STEPS), "a whole number"),
    "group_size": (count(1, MOST_STEPS), "a whole number"),
    "further_metrics": (list_of(an_object), "a list of metrics"),
    "further_ablations": (list_of(an_object), "a list of ablations"),
    "groups": (list_of(list_of(pair)), "a list of groups of heads"),
    "keep_text": (flag, "true or false"),
    "control": (or_none(an_object), "null or an object"),
    "penalty": (noise, "a number of at least 0"),
    "generation": (an_object, "an object"),
    "incoherent": (or_none(an_object), "null or an object"),
}
PART: Fields = {
    "file": (lambda x: text(x) and PART_FILE.fullmatch(x) is not None, "the name of a part"),
    "sha256": (text, "a text"),
    **dict.fromkeys(("bytes", "rows", "commit"), (count(0, 1 << 62), "a whole number")),
}
RECORD: Fields = {
    **dict.fromkeys(
        ("status", "ablation", "attention_backend", "layers", "judge", "template"), (text, "a text")
    ),
    **dict.fromkeys(("seconds", "scan_seconds"), (number, "a number")),
    "noise_floor": (noise, "a number of at least 0"),
    "metric": (an_object, "an object"),
    "prompting": (an_object, "an object"),
    "prompts_from": (origin, "where the prompts came from"),
    "model": (an_object, "an object"),
    "sink_mass": (an_object, "an object"),
    "prompt_texts": (or_none(list_of(text)), "a list of texts"),
    "chosen": (list_of(scanned_head), "a list of heads"),
    "path": (list_of(count(0, MOST_STEPS)), "a list of places"),
    "beams": (list_of(an_object), "a list of groups"),
    **dict.fromkeys(("packing_noise", "control_noise_floor"), (noise, "a number of at least 0")),
    "error": (error_of_scores, "what is known of the error of scores"),
    "nonfinite": (marks, "what is known of marked scores"),
    "warnings": (list_of(text), "a list of texts"),
    "refusals": (refusals, "what the unablated model said"),
    **dict.fromkeys(
        ("degenerate", "incoherent", "cut", "perplexity"),
        (list_of(list_of(or_none(number))), "a number or null by layer and head"),
    ),
    "unablated_scores": (list_of(count(0, 1)), "a list of 0 and 1"),
    "base_singular_values": (list_of(number), "a list of numbers"),
}
METRIC_NEEDED = ("name", "unit", "signed", "label")
METRIC: Fields = {
    **dict.fromkeys(("name", "unit", "label", "title", "floor"), (text, "a text")),
    "signed": (flag, "true or false"),
}
MODEL: Fields = dict.fromkeys(("class", "name"), (text, "a text"))
