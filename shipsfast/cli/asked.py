"""What a command line asks for: checked, cheapest first, and then loaded."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, note, parse_bytes
from ..text import counted

PICTURES = (".png", ".svg", ".pdf")
running: dict[str, Path | None] = {"out": None}  # where the command at work writes, for its last words


class Asked:
    """The arguments and options that commands share, as they were given.

    values: what describes the measurement and its execution, by the names of their fields. An option of such a name is
    taken as it was given, where nothing below makes something else of it. choose: takes what --limit and --sample say of a list.
    Raises InputError for what can be seen to be wrong before a model is loaded.
    """

    def __init__(self, given: dict) -> None:
        self.given = given
        out, plot = given.get("out"), given.get("plot")
        running["out"] = out
        self.before = as_it_lies(out)
        self.values = given | {"progress": not given["quiet"]}
        self._check_prompts()
        check_picture(plot)
        check_place(out)
        if given.get("resume"):
            check_resume(out)
        self._check_model()
        self._check_how()

    def _check_prompts(self) -> None:
        from ..prompts.datasets import sample_prompts

        given = self.given
        which = {name: given[name] for name in ("limit", "sample", "seed")}
        self.choose = some = functools.partial(sample_prompts, **which)
        columns = {"group_by": given.get("group_by"), "answers": given.get("answer_column")}
        prompts, self.prompts_from, answers = taken(
            given["prompts"], given["column"], given["quiet"], choose=some, **columns
        )
        self.values |= {"prompts": prompts, "prompts_from": self.prompts_from, "answers": answers}
        if given["sample"] is not None:
            self.prompts_from["sample"] = {"prompts": given["sample"], "seed": given["seed"]}
        elif given["limit"] is not None:
            self.prompts_from["limit"] = given["limit"]
        self.others = None
        if given["source"] is not None:
            pairs = "resample" in _listed(given["ablation"])  # one prompt stands in for all
            choose = (lambda found: some(found) if len(found) > 1 else found) if pairs else list
            self.others = self.more_prompts("source", given["source"], choose)

    def more_prompts(self, option: str, path: str | Path, choose: Callable[[list], list] = list) -> list:
        """The prompts of the file that an option names, recorded beside those of the argument."""
        given = self.given
        try:
            found = taken(path, given["column"], given["quiet"], f"--{option}", choose)
        except InputError as error:
            also = "" if given["column"] is None else "; --column is of every prompt file"
            raise InputError(f"--{option}: {error}{also}") from error
        self.prompts_from[option] = found.origin
        return found.prompts

    def _check_model(self) -> None:
        """Before transformers is imported, which takes long."""
        from ..models.checkpoint import check_streamable, find

        found = find(self.given["model"], self.given["gguf_file"])
        if self.given.get("stream"):
            check_streamable(found)

    def _check_how(self) -> None:
        from ..engine.heads import parse_heads
        from ..engine.measurement import Execution
        from ..prompts.wrapping import TemplateArgs, as_date

        given, others = self.given, self.others
        if "resample" in _listed(given["ablation"]) and others is None:
            raise InputError("--ablation resample needs --source, a file of prompts to take outputs from")
        others = None if others is None else tuple(others)
        off, self.values["at"] = _places(given.get("at") or [])
        how = _ablations(given, others, off)
        Execution(layers=given["layers"])  # raises for a name that is none
        as_date(given["template_date"])  # the same
        self.values["template_args"] = TemplateArgs.parse(given["template_args"])
        memory = {name: given.get(name) for name in ("max_memory", "device_memory")}
        memory = {name: None if text is None else parse_bytes(text) for name, text in memory.items()}
        if memory["device_memory"] is not None and not given["plan"]:
            raise InputError(
                "--device-memory is for --plan: a scan is told what it may use with --max-memory"
            )
        self.device_memory = memory["device_memory"]
        del self.values["scale"]  # it is in the ablation
        self.values |= {
            "ablation": how, "unit": given["unit"].replace("-", "_"), "max_memory": memory["max_memory"],
        }  # fmt: skip
        if given.get("heads") is not None:
            self.values["heads"] = parse_heads(given["heads"])
        if "eos_token_id" in given:
            self.values["eos_token_id"] = _end_tokens(given["eos_token_id"])
        quiet_transformers()  # before anything imports it

    def run(self, function: Callable, **own):
        """Load the model, and give it to a public function with what was asked, and with the command's own options."""
        tokenizer = self._tokenizer()
        return function.run(self.model, tokenizer, *self._described(function, own))

    @functools.cached_property
    def model(self):
        from ..models.loading import load_model

        given = self.given
        return load_model(
            given["model"], dtype=given["dtype"], device=given["device"], stream=given.get("stream", False),
            trust_remote_code=given["trust_remote_code"], gguf_file=given["gguf_file"],
        )  # fmt: skip

    def forecast(self, function: Callable, **own):
        """What `run` would take, of a model without weights."""
        from ..models.without_weights import hollow_model
        from ..scans.forecast import Elsewhere, forecast

        given, tokenizer = self.given, self._tokenizer()
        model = hollow_model(
            given["model"], given["dtype"], trust_remote_code=given["trust_remote_code"], gguf_file=given["gguf_file"],
        )  # fmt: skip
        where = Elsewhere(given["device"], self.device_memory, given["stream"])
        return forecast(model, tokenizer, *self._described(function, own), where)

    def source_ids(self) -> list[list[int]]:
        """Token ids of the prompts that `mean` averages over."""
        from ..prompts.tokens import tokenize
        from ..prompts.wrapping import Wrapping

        tokenizer, values = self._tokenizer(), self.values
        prompts = values["prompts"] if self.others is None else self.others
        names = ("template", "system", "prefix", "template_args", "template_date")
        return tokenize(tokenizer, prompts, Wrapping(*(values[name] for name in names)))

    def judge(self, name: str, template: str | None, tokens: int | None):
        """The judge of that name. Model judges go where the model goes."""
        from ..answers.judges.choose import as_judge

        return as_judge(name, template=template, max_new_tokens=tokens, device=self.given["device"])

    def _tokenizer(self):
        from ..models.loading import load_tokenizer

        given = self.given
        tokenizer = load_tokenizer(
            given["model"], trust_remote_code=given["trust_remote_code"], gguf_file=given["gguf_file"]
        )
        self.values["template"] = template_for(self.given["template"], tokenizer)
        return tokenizer

    def _described(self, function: Callable, own: dict):
        from ..engine.measurement import made

        for cls in (function.measurement, function.execution):
            yield made(cls, self.values | own)


class Taken(NamedTuple):
    """What is taken of a prompt file. answers: None where there are none."""

    prompts: list
    origin: dict
    answers: list[str] | None


def taken(
    path: str | Path,
    column: str | None,
    quiet: bool,
    what: str = "prompts",
    choose: Callable[[Sequence], list] = list,
    group_by: str | None = None,
    answers: str | None = None,
) -> Taken:
    """The prompts of a file, and where they came from, which is said. what: begins the line; choose: takes some of them;
    group_by: a column with the group of each, which is recorded; answers: a column with an answer to each."""
    from ..prompts.datasets import read_prompts

    found = read_prompts(path, column, [name for name in (group_by, answers) if name is not None])
    rows = choose(range(len(found.prompts)))  # what stands beside a prompt goes with it
    origin = dict(found.origin)
    if group_by is not None:
        from ..results.groups import as_labels

        labels = as_labels([found.beside[group_by][row] for row in rows], len(rows), f"column {group_by!r}")
        origin["group_by"] = {"column": group_by, "labels": labels}
    if not quiet:
        few = f"; {len(rows):,} of them taken" if len(rows) < len(found.prompts) else ""
        groups = "" if group_by is None else f"; {counted(len(set(labels)), 'group')} by {group_by}"
        note(f"{what}: {found}{few}{groups}")
    texts = None
    if answers is not None:
        texts, origin["answers"] = [found.beside[answers][row] for row in rows], answers
    return Taken([found.prompts[row] for row in rows], origin, texts)


def template_for(name: str, tokenizer) -> str:
    """ "auto" is the tokenizer's own, if it has one."""
    if name != "auto":
        return name
    return "chat" if getattr(tokenizer, "chat_template", None) else "none"


def _places(given: list[str]) -> tuple[str, int | str | None]:
    """What --at says: where the ablation is, and the position that is read, None for the last."""
    from ..engine.ablation import AT

    off = [each for each in given if each in AT]
    read = [each for each in given if each not in AT]
    if len(off) > 1 or len(read) > 1:
        raise InputError(
            f"--at {', '.join(given)}: expected at most one of {' and '.join(AT)}, and one position or text of the prompts"
        )
    place = read[0] if read else None
    if place is not None and place.removeprefix("-").isdecimal():
        place = int(place)
    return off[0] if off else "all", place


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} must be a number, got {text!r}") from None


def _listed(given) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _ablations(given: dict, others: tuple | None, off: str):
    """One, or a tuple of several. others: prompts of those that take some; off: where heads are."""
    from ..engine.ablation import SOURCED, Ablation, as_ablations

    kinds, scales = _listed(given["ablation"]), [_number(text, "--scale") for text in _listed(given["scale"])]
    if len(kinds) == len(scales) == 1:
        return Ablation(kinds[0], scales[0], others, given["align"], off)
    if others is not None and not set(kinds) & set(SOURCED):
        raise InputError(f"--source is for {' and '.join(SOURCED)}, and none of the ablations is one of them")
    if given["align"] != "exact" and "resample" not in kinds:
        raise InputError("--align is for resample, and none of the ablations is that")
    each = [
        Ablation(
            kind, *scales[:1] * (len(scales) == 1),
            prompts=others if kind in SOURCED else None,
            align=given["align"] if kind == "resample" else "exact",
            at=off,
        )
        for kind in kinds
    ]  # fmt: skip
    return as_ablations(each, scales if len(scales) > 1 else scales[0])


def _end_tokens(given: list[str] | None) -> list[int] | None:
    """As `generate` takes them: None for those of the model, [] for none."""
    if not given or given == ["none"]:
        return None if not given else []
    try:
        return [int(each) for each in given]
    except ValueError:
        raise InputError(
            f"--eos-token-id must be whole numbers, or none alone, got {', '.join(given)}"
        ) from None


def as_it_lies(out: Path | None) -> tuple[int, int] | None:
    """What tells whether a run has written its manifest since: whoever does any work does."""
    from ..runs.manifest import MANIFEST

    if out is None or not (out / MANIFEST).is_file():
        return None
    found = (out / MANIFEST).stat()
    return found.st_ino, found.st_mtime_ns


def check_resume(out: Path | None) -> None:
    """Raises InputError unless there is a run to go on with."""
    from ..runs.manifest import BACKUP, MANIFEST, without_run

    if out is None:
        raise InputError("--resume goes on with the run in --out: give --out")
    if not any((out / name).is_file() for name in (MANIFEST, BACKUP)):
        raise InputError(
            f"--resume {out}: there is no run to go on with, {without_run(out)}; leave --resume away to begin one"
        )


def check_picture(path: Path | None) -> None:
    """Raises InputError for a plot that cannot be drawn or written there."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise InputError(
            f"--plot {path}: expected a name ending in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}"
        )
    check_place(path)


def check_place(path: Path | None) -> None:
    """A result that cannot be written is refused before it is computed."""
    if path is None:
        return
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write {path}: {parent} is not a folder that can be written to")
    if path.suffix.lower() in PICTURES and not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")


def quiet_transformers() -> None:
    """Bad input is told once, by us; progress bars of loading are noise beside ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
