"""The command line. Results go to stdout, progress and errors to stderr; bad input exits with status 2.

Nothing heavy is imported here: each command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import json as json_module
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .._version import __version__
from ..errors import InputError, Stopped, WriteError
from .bench import bench
from .options import (
    ANSWER_OPTIONS,
    PLAN_OPTIONS,
    SCAN_OPTIONS,
    Groups,
    Json,
    JudgeName,
    JudgeTemplate,
    KeepText,
    MetricNames,
    NonFinite,
    Quiet,
    Rank,
    Top,
    as_it_lies,
    check_place,
    command,
    quiet_transformers,
    running,
)

app = typer.Typer(
    name="shipsfast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"shipsfast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Say which version this is."),
    ] = False,
) -> None:
    """Find the attention heads that carry a language model's behaviour: switch each one off, measure what changes."""


@app.command("scan")
@command(ANSWER_OPTIONS, SCAN_OPTIONS, PLAN_OPTIONS)
def scan(
    load: Callable[[], dict],
    shared: dict,
    metric: MetricNames = ("kl",),
    nonfinite: NonFinite = "raise",
    top: Top = 10,
    rank_by: Annotated[
        str,
        typer.Option(
            help="score: the metric, of the next token. asr: attack success rate of whole answers, judged."
        ),
    ] = "score",
    judge: JudgeName = "keywords",
    judge_template: JudgeTemplate = None,
    keep_text: KeepText = False,
):
    """Score every attention head of MODEL on PROMPTS (Ships: KL of the next token, in nats).

    With --rank-by asr: let the model answer with every head off, and judge the answers.
    The options from --judge to --eos-token-id are for this.
    """
    from ..scans.metrics import parse_metric

    if nonfinite not in ("raise", "mark"):
        raise InputError(f"--nonfinite {nonfinite}: expected raise or mark")
    chosen = [parse_metric(each) for each in metric]
    if rank_by not in ("score", "asr"):
        raise InputError(f"--rank-by {rank_by}: expected score or asr")
    if shared["plan"]:
        if rank_by == "asr":
            raise InputError("--plan is for scans of the next token: leave --rank-by asr away")
        return _plan("scan", load, shared, metric=chosen)
    if rank_by == "score":
        from ..scans.ships import scan as run

        result = run(**load(), metric=chosen, nonfinite=nonfinite)
    else:
        if tuple(metric) != ("kl",):
            raise InputError(
                "--metric measures the next token, and --rank-by asr whole answers: give one of them"
            )
        if nonfinite == "mark":
            raise InputError(
                "--nonfinite mark is about scores of the next token: leave it out with --rank-by asr"
            )
        from ..answers.asr import scan_asr

        judge = _judge(judge, judge_template, shared)
        result = scan_asr(judge=judge, keep_text=keep_text, **shared["answers"], **load())
    _show(result, top, shared)


@app.command("scan-dataset")
@command(SCAN_OPTIONS, PLAN_OPTIONS)
def scan_dataset(load: Callable[[], dict], shared: dict, rank: Rank = 1, top: Top = 10):
    """Score every head by how far it turns the subspace PROMPTS span (dataset-level Ships, in degrees)."""
    if shared["plan"]:
        return _plan("scan-dataset", load, shared, rank=rank)
    from ..scans.dataset import scan_dataset as run

    _show(run(**load(), rank=rank), top, shared)


@app.command("sahara")
@command(SCAN_OPTIONS, PLAN_OPTIONS)
def sahara(
    load: Callable[[], dict],
    shared: dict,
    group_size: Annotated[int, typer.Option(min=1, help="How many heads to find.")] = 3,
    rank: Rank = 1,
    beam: Annotated[int, typer.Option(min=1, help="Groups kept after every step; 1 is the paper's.")] = 1,
):
    """Find the group of heads that carries the answers to PROMPTS, greedily (Sahara)."""
    if shared["plan"]:
        return _plan("sahara", load, shared, rank=rank, steps=group_size, beam=beam)
    from ..scans.sahara import sahara as run

    _show(run(**load(), group_size=group_size, rank=rank, beam=beam), group_size, shared)


@app.command("generate")
@command(ANSWER_OPTIONS, without=("out", "resume"))
def generate(
    load: Callable[[], dict],
    shared: dict,
    groups: Groups = "none",
):
    """Print what MODEL answers to PROMPTS with each group of heads off."""
    from ..answers.generate import generate as run
    from ..engine.heads import parse_groups
    from ..results.pages import show_texts

    chosen = parse_groups(groups)
    given = load()
    del given["out"]
    texts = run(groups=chosen, **shared["answers"], **given)
    if shared["json"]:
        rows = [
            {"heads": [list(head) for head in group], "prompt": prompt, "text": text}
            for group, answers in zip(chosen, texts, strict=True)
            for prompt, text in zip(given["prompts"], answers, strict=True)
        ]
        print(json_module.dumps(rows, indent=1))
    else:
        show_texts(chosen, given["prompts"], texts)


@app.command("evaluate")
@command(ANSWER_OPTIONS)
def evaluate(
    load: Callable[[], dict],
    shared: dict,
    groups: Groups = None,
    run: Annotated[
        Path | None, typer.Option(help="A finished run folder to take heads from, with --top.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads to take from --run, each a group.")] = 10,
    cumulative: Annotated[
        bool,
        typer.Option("--cumulative", help="Groups of the best 1, 2, ... heads instead. Sahara's always are."),
    ] = False,
    control: Annotated[
        str | None, typer.Option(help="Ordinary prompts, to see how far each ablation breaks the model.")
    ] = None,
    judge: JudgeName = "keywords",
    judge_template: JudgeTemplate = None,
    keep_text: KeepText = False,
    view: Annotated[
        Path | None, typer.Option(help="Write the answers side by side here (md or html).")
    ] = None,
):
    """Judge what MODEL answers to PROMPTS with each group of heads off: attack success rates.

    The unablated model's answers are judged beside them.
    """
    from ..engine.heads import parse_groups
    from ..prompts.datasets import load_prompts

    if view is not None and view.suffix.lower() not in (".md", ".html"):
        raise InputError(f"--view {view}: expected a name ending in .md or .html")
    check_place(view)
    if groups is not None and run is not None:
        raise InputError("--groups names the heads, and --run takes them from a run: give one of them")
    if groups is None and run is None:
        raise InputError(
            "evaluate needs --groups, such as '2-26; 2-26,3-1', or --run with a finished run folder"
        )
    chosen = parse_groups(groups) if run is None else _best(run, top, cumulative, shared["unit"])
    ordinary = None if control is None else load_prompts(control, shared["column"])
    from ..answers.evaluate import evaluate as run_it

    result = run_it(
        groups=[[], *(group for group in chosen if group)], judge=_judge(judge, judge_template, shared),
        control=ordinary, keep_text=keep_text, **shared["answers"], **load(),
    )  # fmt: skip
    if view is not None:
        result.view(view)
    _show(result, top, shared)
    if view is not None and not shared["json"]:
        print(f"answers side by side: {view}")


def _judge(name: str, template: str | None, shared: dict):
    """Model judges go where the model goes."""
    from ..answers.judges.choose import as_judge

    return as_judge(name, template=template, device=shared["device"])


def _best(run: Path, top: int, cumulative: bool, unit: str) -> list[list[tuple[int, int]]]:
    """The groups that a finished run speaks for."""
    from ..results.load import load
    from ..results.sahara import SaharaResult

    result = load(run)
    if not hasattr(result, "top"):
        raise InputError(f"{run} holds no scan: give one of scan, scan-dataset or sahara")
    if result.record.get("status") not in (None, "complete"):
        raise InputError(f"{run} holds a run that is not finished: run it again to continue")
    if result.unit != unit.replace("-", "_"):
        raise InputError(f"{run} is about {result.unit}s: give --unit {result.unit}")
    heads = result.heads[:top] if isinstance(result, SaharaResult) else [s[:2] for s in result.top(top)]
    if cumulative or isinstance(result, SaharaResult):
        return [heads[:n] for n in range(1, len(heads) + 1)]
    return [[head] for head in heads]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run, the heatmap and the completions.")] = Path(
        "demo-run"
    ),
    quiet: Quiet = False,
) -> None:
    """Scan the small model that comes with shipsfast, and show what its top head does."""
    check_place(out / "run")
    quiet_transformers()
    from ..demo.run import run

    run(out, progress=not quiet)


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    json: Json = False,
) -> None:
    """Check every file of a run folder: what is damaged, what is missing, what to do.

    Exit status: 0 sound and complete, 1 damaged or not finished, 2 no run.
    """
    from ..runs.verify import render, verify

    report = verify(run)
    print(json_module.dumps(report, indent=1) if json else render(report))
    if report["verdict"] != "sound":
        raise typer.Exit(1)


@app.command()
def info(json: Json = False) -> None:
    """Say what is installed, what will run, and what is missing and why."""
    from .info import describe, render

    facts = describe()
    print(json_module.dumps(facts, indent=1) if json else render(facts))


app.command("bench")(bench)


def _plan(kind: str, load: Callable[[], dict], shared: dict, **own) -> None:
    """Print what a scan would take."""
    from ..scans.forecast import forecast

    found = forecast(kind, **load(), **own)
    print(json_module.dumps(found.to_json(), indent=1) if shared["json"] else found.render())


def _show(result, top: int, shared: dict) -> None:
    from ..results.tables import as_json, show

    plot, out = shared.get("plot"), shared["out"]
    if plot is not None:
        result.plot(plot)
        for number, other in enumerate(getattr(result, "also", {}).values(), 2):
            other.plot(plot.with_stem(f"{plot.stem}-{number}"))
    if shared["json"]:
        print(json_module.dumps(as_json(result, top, out), indent=1))
    else:
        show(result, top, out)
        if shared["before"] is not None and shared["before"] == as_it_lies(out):
            print("(it was complete: loaded, nothing was run)")


# Errors of a disk, a network share, their permissions, and of paths that cannot be.
DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EFBIG,
    errno.EMFILE, errno.ENODEV, errno.ENXIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


def main() -> None:
    """Entry point. Exit status: 0, 2 for bad input or a disk that fails, 130 after Ctrl-C, 143 after SIGTERM;
    of verify, 1 for a run that is damaged or not finished."""
    running["out"] = None
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # typer's own for Ctrl-C, which says nothing
            _fail(_with_kept("interrupted"))
        raise
    except Stopped:
        _fail(_with_kept("terminated (SIGTERM)"))
        sys.exit(143)
    except InputError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        if error.errno not in DISK and not isinstance(error, WriteError):
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_fail(_with_kept(f"cannot read or write{where}: {error.strerror}")))
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _stop(_number, _frame) -> None:
    raise Stopped


def _with_kept(message: str) -> str:
    """The message, and what of the run at hand is safe."""
    if running["out"] is None:
        return message
    from ..runs.folder import kept

    safe = kept(running["out"])
    return f"{message}; {safe}" if safe else message


def _fail(message: str) -> int:
    print(f"shipsfast: {' '.join(message.split())}", file=sys.stderr)
    return 2
