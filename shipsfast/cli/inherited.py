"""What `evaluate --run RUN` takes over from the run: all that made its numbers, so that heads are judged as they were found.

Options that were given on the command line win, and what then differs is said. A folder holds no prompts, only hashes of
their tokens: where an ablation needs the run's own, they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError, note

OF_CHATS = ("system", "template_args", "template_date")  # what only a chat template reads
OPTIONS = {"template_args": "template-arg"}  # where an option has another name
DRAWN = ("max_new_tokens", "do_sample", "top_k", "temperature", "seed")
SCALES = {"undifferentiated": "logit_scale", "scale": "output_scale"}


def inherit(run: Path, given: dict, explicit: set[str]) -> dict:
    """The options in `given` with those of the run in the place of defaults. explicit: names of what was given.

    Raises InputError for what is no run, and for an ablation of it that cannot be evaluated.
    """
    from ..runs.manifest import read_manifest

    manifest = read_manifest(run)
    own = _options(manifest)
    _check(run, own, explicit)
    # A scale of another ablation's says nothing.
    idle = {"scale"} if "ablation" in explicit and given["ablation"] != own.get("ablation") else set()
    if "template" in explicit and given["template"] != own.get("template"):
        idle |= set(OF_CHATS)
    taken = {name: value for name, value in own.items() if name not in explicit | idle and name in given}
    said = [f"{name} {_shown(value)}" for name, value in taken.items() if _same(value) != _same(given[name])]
    if said:
        note(f"as in {run}: {', '.join(said)}")
    other = [
        f"--{OPTIONS.get(name, name.replace('_', '-'))} {_shown(given[name])} (there {_shown(own[name])})"
        for name in own
        if name in explicit and _same(given[name]) != _same(own[name])
    ]
    if other:
        note(f"not as in {run}: {', '.join(other)}")
    return given | taken


def _options(manifest: dict) -> dict:
    """What made the run, as options say it."""
    identity, own = manifest["identity"], {}
    ablation = identity.get("ablation")
    if isinstance(ablation, dict) and isinstance(ablation.get("kind"), str):
        own["ablation"] = ablation["kind"]
        if ablation.get("at", "all") != "all":
            note(
                "the run's heads were off at the end of each prompt only; in answers they are off at every token"
            )
        scale = ablation.get(SCALES.get(ablation["kind"], ""))
        if isinstance(scale, (int, float)):
            own["scale"] = repr(float(scale))
    for name, value in (
        ("unit", identity.get("unit")), ("dtype", identity.get("dtype")), ("template", manifest.get("template")),
    ):  # fmt: skip
        if isinstance(value, str):
            own[name] = value
    around = manifest.get("prompting")
    if isinstance(around, dict):
        # What was not given counts too: an option of today's may differ from it. An empty system message is one.
        own |= {name: around[name] for name in ("system", "prefix") if name in around}
        if isinstance(around.get("template_date"), str):
            own["template_date"] = around["template_date"]
        if isinstance(around.get("template_args"), dict):
            args = [f"{name}={json.dumps(x)}" for name, x in around["template_args"].items()]
            own["template_args"] = args or None
    return own | _of_answers(identity.get("metric"), manifest.get("judge"))


def _of_answers(metric, judge) -> dict:
    """How answers were made and judged, where the run is a scan by whole answers."""
    if not isinstance(metric, dict) or not isinstance(metric.get("generation"), dict):
        return {}
    how, described = metric["generation"], metric.get("judge") or {}
    own = {name: how[name] for name in DRAWN if name in how}
    if isinstance(how.get("end_tokens"), list):
        own["eos_token_id"] = [str(token) for token in how["end_tokens"]] or ["none"]
    if isinstance(judge, str) and (
        judge in ("keywords", "paper") or judge.startswith(("classifier:", "chat:"))
    ):
        own["judge"] = judge
        if ":" in judge:
            found = {
                "judge_template": described.get("template"),
                "judge_tokens": described.get("max_new_tokens"),
            }
            own |= {name: value for name, value in found.items() if value is not None}
    return own


def check_same_weights(run: Path, model) -> None:
    """Says it where the heads were found in other weights."""
    from ..models.fingerprint import fingerprint
    from ..runs.manifest import read_manifest

    identity = read_manifest(run)["identity"]
    if identity.get("residual"):
        note(
            f"not as in {run}: residual streams were {identity['residual']} there, texts are what the model itself says"
        )
    # A fingerprint is of a dtype, and another one was said before.
    if identity.get("dtype") == str(model.dtype).removeprefix("torch.") and identity[
        "fingerprint"
    ] != fingerprint(model):
        note(f"not as in {run}: its heads were found in a model with other weights")


def _check(run: Path, own: dict, explicit: set[str]) -> None:
    if own.get("ablation") == "resample" and "ablation" not in explicit:
        raise InputError(
            f"{run} was made with ablation resample, which matches positions one to one, and new text has no counterpart: "
            "give --ablation with another"
        )


def _shown(value) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return "none" if value is None else str(value) or "''"


def _same(value) -> object:
    if isinstance(value, list):  # in any order
        from ..prompts.wrapping import TemplateArgs

        of_template = all("=" in each for each in value)  # --template-arg, else --eos-token-id
        return TemplateArgs.parse(value) if of_template else sorted(value)
    text = str(value).replace("-", "_") if not isinstance(value, Path) else value
    try:
        return float(value)
    except (TypeError, ValueError):
        return text


def check_source(run: Path, kind: str, token_ids: Callable[[], list[list[int]]], given: bool) -> None:
    """Means are those of the run's prompts, whose hashes the folder has. token_ids: gives the prompts that the mean would be of;
    given: by --source. Raises InputError where they are others and nobody asked for them."""
    from ..runs.identity import prompt_hashes
    from ..runs.manifest import read_manifest

    ablation = read_manifest(run)["identity"].get("ablation")
    if kind != "mean" or not isinstance(ablation, dict) or ablation.get("kind") != "mean":
        return
    if sorted(ablation.get("prompts") or []) == sorted(prompt_hashes(token_ids())):
        return
    if given:
        return note(f"not as in {run}: the mean there is of other prompts than --source has")
    raise InputError(
        f"{run} was made with ablation mean over prompts that the folder does not hold, only their hashes, and PROMPTS are "
        "others: give the run's with --source"
    )
