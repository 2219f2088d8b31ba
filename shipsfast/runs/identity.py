"""What differs between the run that a folder holds and the one at hand, in words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def prompt_hashes(prompts: Sequence[Sequence[int]]) -> list[str]:
    """One hash per prompt, of its token ids."""
    return [hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16] for ids in prompts]


def beside(identity: dict, what: str, number: int) -> dict:
    """What the run of a further metric or ablation, counted from 1, is to be, of the same scan as a run of this identity. what:
    "further_metrics" or "further_ablations"."""
    entry = {"further_metrics": "metric", "further_ablations": "ablation"}[what]
    apart = ("control", "further_ablations", *(("further_metrics",) if entry == "metric" else ()))
    own = {name: value for name, value in identity.items() if name not in apart}
    return own | {entry: identity[what][number - 1]}


def control_of(identity: dict) -> dict:
    """What the scan of the control prompts of a run of this identity has in its own, among others."""
    return {"prompts": identity["control"]["prompts"], "fingerprint": identity.get("fingerprint")}


def in_words(names: list[str], before: dict, now: dict, manifest: dict, record: dict) -> str:
    """names: the entries of the identities `before` and `now` that differ; manifest: of the folder; record: what runs
    now, for what the identity knows only as a hash."""
    return "; ".join(_one(name, before.get(name), now.get(name), manifest, record) for name in names)


def _one(name: str, before, now, manifest: dict, record: dict) -> str:
    if name == "fingerprint":
        models = [(x.get("model") or {}).get("name") for x in (manifest, record)]
        where = f" (there {models[0]}, here {models[1]})" if models[0] != models[1] and all(models) else ""
        return f"the weights, their type or the config are not those of the model scanned there{where}"
    if name == "prompts":
        return _prompts(before or [], now or [], manifest, record)
    if name == "ablation":
        there, here = _ablation(before), _ablation(now)
        if there == here:
            return f"the ablation is {here} on both sides, and these prompts are others"
        return f"the ablation there is {there}, here {here}"
    if name == "further_ablations":
        there, here = (", ".join(map(_ablation, x or [])) or "none" for x in (before, now))
        return f"the further ablations there are {there}, here {here}"
    if name == "incoherent" and before is None:
        return "there no answer can be incoherent: it was made before likelihoods of answers were kept, or with judge paper"
    if name == "heads" and isinstance(before, list) and isinstance(now, list):
        return f"{len(before):,} heads there, {len(now):,} here{_first_apart(before, now)}"
    if name in ("answer_tokens", "read_at"):
        return "the answers, or the positions of prompts that are read, are others"
    if name == "control" and "tokens" in (before or now or {}):
        return "the control prompts, or the tokens their KL is taken along, are others"
    if name == "control":
        return _control(before, now)
    return f"{name} there is {_short(before)}, here {_short(now)}"


def _control(before: dict | None, now: dict | None) -> str:
    if before is None or now is None:
        return f"there is a control {'here' if before is None else 'there'} only"
    return "the control prompts are others"


def _prompts(before: list, now: list, manifest: dict, record: dict) -> str:
    template = _wrapping(manifest, record)
    if len(before) != len(now):
        return f"there are {len(before)} prompts there, {len(now)} here{template}"
    changed = [i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b]
    order = "the same prompts in another order" if sorted(before) == sorted(now) else None
    return (
        order or f"{len(changed)} of {len(now)} prompts are other tokens, the first is prompt {changed[0]}"
    ) + template


def _first_apart(before: list, now: list) -> str:
    """The first head that only one of them has."""
    for here, others, where in ((now, before, "here"), (before, now, "there")):
        for head in here:
            if head not in others:
                return (
                    f", {_short('-'.join(map(str, head)) if isinstance(head, list) else head)} only {where}"
                )
    return ""


def _wrapping(manifest: dict, record: dict) -> str:
    return "".join(f", and {words}" for words in wrapping_apart(manifest, record))


def wrapping_apart(manifest: dict, record: dict) -> list[str]:
    """What is put around the prompts, where it differs; none where one of them does not say."""
    there, here = ({"template": x.get("template")} | (x.get("prompting") or {}) for x in (manifest, record))
    return [
        f"the {name.replace('_', ' ')} there is {_short(repr(there.get(name)))}, here {_short(repr(here.get(name)))}"
        for name in ("template", "system", "prefix", "template_args", "template_date")
        if here["template"] is not None and (there.get(name) or None) != (here.get(name) or None)
    ]


def _ablation(value) -> str:
    if not isinstance(value, dict):
        return _short(value)
    scales = [
        f"{name} {value[key]:g}"
        for name, key in (("logits x", "logit_scale"), ("output x", "output_scale"))
        if isinstance(value.get(key), (int, float)) and value[key] != 1
    ]
    own = ["prompts of its own"] * ("prompts" in value) + ["heads off at the end only"] * (
        value.get("at") == "end"
    )
    return " with ".join([str(value.get("kind")), *([", ".join(scales + own)] if scales + own else [])])


def _short(value) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
