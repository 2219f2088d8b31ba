"""`python -m benchmarks`: one entry point for every benchmark.

cpu         the exhaustive scan against the best other ways, appended to benchmarks/results/cpu.jsonl
sahara      a Sahara search beside a KL scan, appended to benchmarks/results/sahara.jsonl
generation  answers with groups of heads off against the best other ways, appended to .../generation.jsonl
judges      the judges of phrases beside people, appended to benchmarks/results/judges.jsonl
beyond      heads off at the newest token only, at each token of given answers, appended to .../beyond.jsonl
half        the exhaustive scan in bfloat16 on the CPU, beside float32 and others' ways, appended to .../half.jsonl
stream      a model streamed from its checkpoint beside the same one in memory, appended to .../stream.jsonl
small       fixed costs: imports, help, a scan of the embedded model, the first scan, appended to .../small.jsonl
top         the top heads: complete scan, search, and other ways to find heads, appended to .../top.jsonl; with --simulate how sure
            a race over prompts is, appended to .../race.jsonl
gpu         everything on a CUDA GPU, appended to benchmarks/results/<device>.jsonl (gpu --help)
gpu-table   what a folder of its rows says
tables      rewrite the tables of README.md and of the pages in docs from the results
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if sys.argv[1:2] == ["gpu"]:  # before anything is imported that may be missing where it runs
    from .gpu.run import main

    sys.exit(main(sys.argv[2:]))
if sys.argv[1:2] == ["gpu-table"]:
    from .gpu.light_table import main

    sys.exit(main(sys.argv[2:]))

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def cpu(
    case: str = typer.Option("", help="Only cases whose name contains this."),
    repeats: int = typer.Option(5, min=1, help="Interleaved runs per path."),
    peaks: bool = typer.Option(True, help="Measure peak memory, each path in a process of its own."),
) -> None:
    """The exhaustive scan on the CPU against the best other ways of doing it."""
    from rich.console import Console

    from .cases import CPU_CASES, SMOKE_CASES
    from .cpu import run_case

    chosen = [c for c in CPU_CASES if case in c.name] or [c for c in SMOKE_CASES if case in c.name]
    for each in chosen:
        run_case(each, repeats, peaks, Console(width=160))


@app.command()
def half(
    repeats: int = typer.Option(3, min=1, help="Interleaved runs per path."),
    smoke: bool = typer.Option(False, help="A tiny model, to see that it runs."),
) -> None:
    """The exhaustive scan in bfloat16 on the CPU beside the same in float32 and beside others' ways in bfloat16."""
    from rich.console import Console

    from .half import run

    run(Console(width=140), repeats, smoke)


@app.command()
def sahara(
    case: str = typer.Option("", help="Only cases whose name contains this."),
    repeats: int = typer.Option(3, min=1, help="Interleaved runs."),
) -> None:
    """What a Sahara search costs beside a KL scan of the same prompts."""
    from rich.console import Console

    from .cases import CPU_CASES, SMOKE_CASES
    from .sahara import run_case

    chosen = [c for c in CPU_CASES if case in c.name] or [c for c in SMOKE_CASES if case in c.name]
    for each in chosen:
        run_case(each, repeats, Console(width=160))


@app.command()
def stream(
    case: str = typer.Option("", help="Only cases whose name contains this."),
    repeats: int = typer.Option(5, min=1, help="Interleaved pairs."),
) -> None:
    """What streaming a model from its checkpoint costs beside having it in memory."""
    from rich.console import Console

    from .cases import CPU_CASES, SMOKE_CASES
    from .stream import run_case

    chosen = [c for c in CPU_CASES if case in c.name] or [c for c in SMOKE_CASES if case in c.name]
    for each in chosen:
        run_case(each, repeats, Console(width=160))


@app.command()
def beyond(
    smoke: bool = typer.Option(False, help="A shape small enough for a test of the benchmark itself."),
    repeats: int = typer.Option(3, min=1, help="Interleaved runs per path."),
    real: bool = typer.Option(
        False, help="The wall time of SmolLM2-135M-Instruct along its own answers, and nothing else."
    ),
) -> None:
    """Heads off at the newest token only, at each token of given answers, against one forward per head and token."""
    from rich.console import Console

    from .beyond import run_case, run_real
    from .cases import ANSWER_CASES, ANSWER_SMOKE

    if real:
        run_real(Console(width=160))
        return
    for each in [ANSWER_SMOKE] if smoke else ANSWER_CASES:
        run_case(each, repeats, Console(width=160))


@app.command()
def small(
    repeats: int = typer.Option(20, min=1, help="Of each start, and of scans of the embedded model."),
    real: bool = typer.Option(True, help="SmolLM2-135M-Instruct as well, which takes minutes."),
) -> None:
    """Fixed costs: imports, help, a scan of the embedded model with one prompt, the first scan of a model beside the next."""
    from rich.console import Console

    from .small import run

    run(repeats, real, Console(width=160))


@app.command(hidden=True)
def first(case: str, repeats: int) -> None:
    """Seconds of the first scan and of the next ones; run by `small` in a process of its own."""
    import json

    from .small import first_and_next

    print(json.dumps(first_and_next(case, repeats)))


@app.command()
def top(
    simulate: bool = typer.Option(
        False, help="Races over the scores of complete scans, in many orders; nothing is timed."
    ),
    orders: int = typer.Option(1000, min=1, help="Orders of the prompts, with --simulate."),
    smoke: bool = typer.Option(False, help="The embedded model alone, in seconds."),
    repeats: int = typer.Option(3, min=1, help="Interleaved runs per path."),
) -> None:
    """The top heads by a search, beside a complete scan and what people use in its place."""
    from rich.console import Console

    if simulate:
        from .race import CASES, VILLAGE, run

        run({VILLAGE: CASES[VILLAGE]} if smoke else CASES, orders, Console(width=160))
        return
    from .top import SMOKE, SMOLLM2, run_case

    run_case(SMOKE if smoke else SMOLLM2, repeats, Console(width=160))


@app.command()
def generation(
    case: str = typer.Option("", help="village or large; default both."),
    repeats: int = typer.Option(3, min=1, help="Interleaved runs per path."),
) -> None:
    """Answers with groups of heads off on the CPU against the best other ways of getting them."""
    from rich.console import Console

    from .cases import GENERATION_CASES
    from .generation import run_case

    if case and case not in GENERATION_CASES:
        raise typer.BadParameter(f"expected {' or '.join(GENERATION_CASES)}", param_hint="--case")
    for each in [GENERATION_CASES[case]] if case else GENERATION_CASES.values():
        run_case(each, repeats, Console(width=160))


@app.command()
def judges(
    pyrit: str = typer.Option("", help="A wheel of pyrit, or a folder with its files; else pip fetches it."),
) -> None:
    """The judges of phrases beside people, on answers that PyRIT ships."""
    from rich.console import Console

    from shipsfast.errors import InputError

    from .judges import run

    try:
        run(pyrit or None, Console(width=160))
    except InputError as error:
        print(f"judges: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command(hidden=True)
def peak(case: str, path: str) -> None:
    """Peak memory of one path of one case; run by `cpu` in a process of its own."""
    from .cases import CPU_CASES, SMOKE_CASES
    from .cpu import peak as measure

    print(f"{measure(next(c for c in CPU_CASES + SMOKE_CASES if c.name == case), path):.1f}")


@app.command()
def tables() -> None:
    """Rewrite the tables of README.md, docs/performance.md, docs/judges.md and docs/top-heads.md from the results."""
    from .tables import update

    print(f"changed: {', '.join(changed)}" if (changed := update()) else "all up to date")


app()
