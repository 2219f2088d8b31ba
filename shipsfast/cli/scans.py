"""Commands about what the next token says: scan, top, scan-dataset, sahara, top-tokens, bench."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import InputError, parse_bytes
from ..scans.measurements import check_penalty
from ..scans.top_measurement import check_chance
from .asked import Asked, quiet_transformers, taken, template_for
from .options import (
    ANSWER_OPTIONS,
    GROUP_OPTIONS,
    PLAN_OPTIONS,
    READ_OPTIONS,
    SCAN_OPTIONS,
    SEVERAL,
    At,
    Backend,
    Beam,
    Column,
    Device,
    Dtype,
    ErrorChance,
    GgufName,
    GroupSize,
    Json,
    JudgeName,
    JudgeTemplate,
    JudgeTokens,
    K,
    KeepText,
    Limit,
    MaxMemory,
    MetricNames,
    ModelName,
    NonFinite,
    OrdinaryPrompts,
    Penalty,
    Quiet,
    Rank,
    ScreenName,
    SearchControl,
    Template,
    Top,
    TopMetric,
    TopNonFinite,
    command,
)
from .refusals import record_refusals, refusals
from .shown import show_json, show_report, show_result


@command(ANSWER_OPTIONS, SCAN_OPTIONS, READ_OPTIONS, PLAN_OPTIONS, GROUP_OPTIONS, instead=SEVERAL)
def scan(
    asked: Asked,
    metric: MetricNames = ("kl",),
    nonfinite: NonFinite = "raise",
    control: OrdinaryPrompts = None,
    top: Top = 10,
    rank_by: Annotated[
        str,
        typer.Option(
            help="score: the metric, of the next token. asr: attack success rate of whole answers, judged."
        ),
    ] = "score",
    judge: JudgeName = None,
    judge_template: JudgeTemplate = None,
    judge_tokens: JudgeTokens = None,
    keep_text: KeepText = False,
):
    """Score every attention head of MODEL on PROMPTS (Ships: KL of the next token, in nats).

    With --control: also on ordinary prompts, and say which heads matter more on PROMPTS than on those.
    With --judge: also let the unablated model answer, and say how often it refuses these prompts.
    With --rank-by asr: let the model answer with every head off, and judge the answers (--judge, by default keywords).
    The options from --judge to --eos-token-id are for these two.
    """
    from ..scans.metrics import parse_metric

    if nonfinite not in ("raise", "mark"):
        raise InputError(f"--nonfinite {nonfinite}: expected raise or mark")
    chosen = [parse_metric(each) for each in metric]
    if rank_by not in ("score", "asr"):
        raise InputError(f"--rank-by {rank_by}: expected score or asr")
    if rank_by == "score":
        from ..scans.ships import scan as run

        ordinary = None if control is None else asked.more_prompts("control", control)
        before = None if judge is None else refusals(asked, asked.judge(judge, judge_template, judge_tokens))
        return _scanned(asked, run, top, before, metric=chosen, nonfinite=nonfinite, control=ordinary)
    if asked.given["plan"]:
        raise InputError("--plan is for scans of the next token: leave --rank-by asr away")
    fields = {"at": "at", "answer-column": "answers"}
    idle = [option for option, field in fields.items() if asked.values[field] is not None]
    if idle:
        raise InputError(
            f"--{idle[0]} says which tokens of a text are read, and --rank-by asr has the model answer: give one of them"
        )
    if tuple(metric) != ("kl",):
        raise InputError(
            "--metric measures the next token, and --rank-by asr whole answers: give one of them"
        )
    if control is not None:
        raise InputError(
            "--control of a scan is about scores of the next token: scan both sets with --rank-by asr, and give their runs to "
            "shipsfast contrast"
        )
    if nonfinite == "mark":
        raise InputError(
            "--nonfinite mark is about scores of the next token: leave it out with --rank-by asr"
        )
    from ..answers.asr import scan_asr

    judge = asked.judge(judge or "keywords", judge_template, judge_tokens)
    show_result(asked.run(scan_asr, judge=judge, keep_text=keep_text), top, asked)


@command(SCAN_OPTIONS, PLAN_OPTIONS)
def top(
    asked: Asked,
    k: K = 10,
    error: ErrorChance = 0.01,
    screen: ScreenName = "auto",
    metric: TopMetric = ("kl",),
    nonfinite: TopNonFinite = "raise",
):
    """Find the -k heads of MODEL with the largest mean scores on PROMPTS, exactly, in a part of the work of a scan.

    The heads are those that scan ranks first, but for a chance of --error that one is missing. What that rests on is printed with them.
    """
    check_chance(error, screen)
    from ..scans.top_heads import top_heads as run

    _scanned(asked, run, k, k=k, error=error, screen=screen, metric=metric, nonfinite=nonfinite)


@command(SCAN_OPTIONS, PLAN_OPTIONS)
def scan_dataset(asked: Asked, rank: Rank = 1, top: Top = 10):
    """Score every head by how far it turns the subspace PROMPTS span (dataset-level Ships, in degrees)."""
    from ..scans.dataset import scan_dataset as run

    _scanned(asked, run, top, rank=rank)


@command(SCAN_OPTIONS, PLAN_OPTIONS)
def sahara(
    asked: Asked,
    group_size: GroupSize = 3,
    rank: Rank = 1,
    beam: Beam = 1,
    control: SearchControl = None,
    penalty: Penalty = None,
):
    """Find the group of heads that carries the answers to PROMPTS, greedily (Sahara)."""
    check_penalty(penalty, control is not None)
    ordinary = None if control is None else asked.more_prompts("control", control)
    from ..scans.sahara import sahara as run

    _scanned(
        asked, run, group_size, group_size=group_size, rank=rank, beam=beam, control=ordinary, penalty=penalty
    )


@command(
    {name: SCAN_OPTIONS[name] for name in ("heads", "stream")} | {"at": (At, None)}, without=("out", "resume")
)
def top_tokens(
    asked: Asked,
    top: Annotated[int, typer.Option("--top", min=1, help="How many tokens to list each way.")] = 10,
):
    """Say which next tokens become likelier and less likely as heads of MODEL (--heads) are switched off, one at a time."""
    if asked.given["heads"] is None:
        raise InputError("top-tokens needs --heads, such as 2-26 or 2-26,3-1: a scan says which")
    from ..scans.top_tokens import top_tokens as run

    result = asked.run(run, head=asked.values["heads"], k=top)
    show_json(result.to_json()) if asked.given["json"] else result.show()


def _scanned(asked: Asked, function, top: int, judged: dict | None = None, **own) -> None:
    """judged: what `refusals` found, for the record."""
    if asked.given["plan"]:
        return show_report(asked.forecast(function, **own), asked.given["json"])
    result = asked.run(function, **own)
    if judged is not None:
        record_refusals(result, judged, asked)
    show_result(result, top, asked)


BenchPrompts = Annotated[
    str | None, typer.Argument(help="Prompts, as for scan; random tokens where there are none.")
]
Seconds = Annotated[
    float, typer.Option(help="What the timed scan may take, roughly; heads are sampled for it.")
]


def bench(
    model: ModelName,
    prompts: BenchPrompts = None,
    seconds: Seconds = 20.0,
    template: Template = "auto",
    column: Column = None,
    limit: Limit = None,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    device: Device = None,
    max_memory: MaxMemory = None,
    gguf_file: GgufName = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast MODEL scans here, how near that is to what the device can do, and what holds it back."""
    from ..prompts.datasets import sample_prompts

    texts = (
        None
        if prompts is None
        else taken(prompts, column, quiet, choose=lambda found: sample_prompts(found, limit))[0]
    )
    quiet_transformers()
    from ..models.loading import load_model, load_tokenizer
    from ..scans.bench import bench as run

    memory = None if max_memory is None else parse_bytes(max_memory)
    tokenizer = None if texts is None else load_tokenizer(model, gguf_file=gguf_file)
    result = run(
        load_model(model, dtype=dtype, device=device, gguf_file=gguf_file), texts, tokenizer, template=template_for(template, tokenizer),
        backend=backend, max_memory=memory, seconds=seconds, progress=not quiet,
    )  # fmt: skip
    show_report(result, json)
