"""Arguments and options that commands share. What a measurement or its execution describes is an option of that description."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from ..answers.measurements import AnswerMeasurement, EvaluationMeasurement
from ..engine.measurement import Execution, Measurement, ScanExecution, described
from ..errors import InputError
from ..prompts.wrapping import DATE
from ..scans.measurements import SaharaMeasurement, ScanMeasurement, ShipsMeasurement
from ..scans.top_measurement import TopMeasurement
from .asked import Asked
from .inherited import inherit


def _option(
    cls: type, name: str, kind=None, *flags: str, more: str = "", text: str = "", least: int | None = None
):
    """The option of a field. kind: its type where text cannot be the field's; more: what the command line adds to the
    field's description, text: what it says instead; least: its smallest value."""
    field = described(cls)[name]
    said = " ".join(filter(None, (text or field.text, more)))
    return Annotated[kind or field.type, typer.Option(*flags, help=said[:1].upper() + said[1:], min=least)]


ModelName = Annotated[str, typer.Argument(help="Model folder, GGUF file or hub id.")]
GgufName = Annotated[
    str | None, typer.Option("--gguf-file", help="The GGUF file to load of MODEL, a folder or hub id.")
]
PromptFile = Annotated[
    str,
    typer.Argument(
        help="Prompts: a csv, tsv, jsonl, json, parquet or txt file, a folder of save_to_disk[:split], or a data set of the "
        "hub, owner/name[:config[:split]]."
    ),
]
Out = _option(ScanExecution, "out", Path | None, text="run folder to write; an unfinished one is continued.")
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Only go on with the unfinished run in --out; an error if none is there."),
]
Template = _option(Measurement, "template", more="auto: chat if the tokenizer has one.")
System = _option(Measurement, "system")
Prefix = _option(Measurement, "prefix")
TemplateArg = _option(
    Measurement, "template_args", list[str] | None, "--template-arg",
    text="A value that the chat template reads, NAME=VALUE, such as enable_thinking=false: JSON where it is JSON, else text. "
    "May be given several times.",
)  # fmt: skip
TemplateDate = _option(Measurement, "template_date")
Column = Annotated[
    str | None,
    typer.Option(
        help="Column of the prompts, or several with commas between them, joined by a blank line. Default: by its name, or "
        "what the layout of a published set says."
    ),
]
GroupBy = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Column of PROMPTS with the group of each, such as category: results by group, and how far the groups agree. The "
        "run folder keeps these names.",
    ),
]
AnswerColumn = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Column of PROMPTS with an answer to each: what is measured is then every token of it, read behind the prompt and the "
        "answer up to there.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")]
Sample = Annotated[int | None, typer.Option(min=1, help="N prompts drawn at random.")]
Seed = Annotated[
    int, typer.Option(min=0, help="Of --sample, of --do-sample, and of what a search for top heads draws.")
]
# Lists, so that what is given twice is not forgotten: only `scan` takes several.
HowAblated = _option(Measurement, "ablation", list[str], "--ablation")
Scale = _option(Measurement, "scale", list[str], "--scale")
EachAblation = _option(
    ShipsMeasurement, "ablation", list[str], "--ablation",
    more="May be given several times, for one run that scans by all and compares them.",
)  # fmt: skip
EachScale = _option(ShipsMeasurement, "scale", list[str], "--scale", more="May be given several times.")
Source = Annotated[
    Path | None,
    typer.Option(
        help="Prompt file for mean (default: PROMPTS) and resample (one prompt each, or one for all; of several, --limit and "
        "--sample take the same as of PROMPTS)."
    ),
]
Align = Annotated[
    str,
    typer.Option(
        help="For resample from prompts of other lengths: exact (refuse them), end (both end together) or template (match what "
        "both begin and end with)."
    ),
]
At = _option(
    ShipsMeasurement, "at", list[str] | None, "--at",
    more="May be given twice, one of each.",
)  # fmt: skip
AtAblation = _option(ScanMeasurement, "at", list[str] | None, "--at")
HeadNames = _option(
    ShipsMeasurement, "heads", str | None, text="Only these: LAYER-HEAD or LAYER, comma-separated."
)
Unit = _option(Measurement, "unit")
Backend = _option(Execution, "backend")
Layers = _option(Execution, "layers")
Dtype = Annotated[str, typer.Option(help="auto, float64, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default cuda where there is one.")]
PlanOnly = Annotated[
    bool, typer.Option("--plan", help="Run nothing: print plan, memory and time. config.json is enough.")
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="With --plan: what the device has in all, such as 80GiB; default what is free."),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read decoder layers from the checkpoint as they run: for models larger than the memory.",
    ),
]
MaxMemory = _option(
    Execution,
    "max_memory",
    str | None,
    text="Memory to use beyond the model, such as 8GiB; default what is free.",
)
RemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with MODEL, with all your rights."),
]
Plot = Annotated[Path | None, typer.Option(help="Write the heatmap here (png, svg or pdf).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Top = Annotated[int, typer.Option("--top", min=1, help="How many heads to list.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress bar, and no word on what was taken of prompt files."),
]
MetricNames = _option(
    ShipsMeasurement, "metric", list[str], "--metric",
    more="logit_diff:TOKEN,TOKEN, refusal_logit:TOKEN,TOKEN,... or projection:FILE[,LAYER] with a file of shipsfast direction; may be "
    "given several times, for one pass that measures all (plots of all but the first get a number).",
)  # fmt: skip
NonFinite = _option(ShipsMeasurement, "nonfinite")
K = _option(TopMeasurement, "k", None, "-k", least=1)
ErrorChance = _option(TopMeasurement, "error")
ScreenName = _option(TopMeasurement, "screen")
TopMetric = _option(
    TopMeasurement, "metric", list[str], "--metric",
    more="or logit_diff:TOKEN,TOKEN, refusal_logit:TOKEN,TOKEN,... or projection:FILE[,LAYER] with a file of shipsfast direction.",
)  # fmt: skip
TopNonFinite = _option(TopMeasurement, "nonfinite")
Rank = _option(SaharaMeasurement, "rank", least=1)
GroupSize = _option(SaharaMeasurement, "group_size", least=1)
Beam = _option(SaharaMeasurement, "beam", least=1)
SearchControl = _option(SaharaMeasurement, "control", str | None, more="A prompt file.")
Penalty = _option(SaharaMeasurement, "penalty", float | None)
NewTokens = _option(AnswerMeasurement, "max_new_tokens")
DoSample = _option(
    AnswerMeasurement, "do_sample", None, "--do-sample", text="Draw tokens instead of taking the likeliest."
)
TopK = _option(AnswerMeasurement, "top_k")
Temperature = _option(AnswerMeasurement, "temperature")
EndTokens = _option(
    AnswerMeasurement, "eos_token_id", list[str] | None, "--eos-token-id",
    text="Id of a token that ends a text, may be given several times, or none; default: all that model, tokenizer and chat template name.",
)  # fmt: skip
Groups = _option(
    EvaluationMeasurement,
    "groups",
    str | None,
    text="Groups of heads to switch off, such as '2-26; 2-26,3-1'; 'none' is the unablated model.",
)
OrdinaryPrompts = _option(
    ShipsMeasurement,
    "control",
    str | None,
    more="A prompt file, of which all are taken, whatever --limit says.",
)
Control = _option(EvaluationMeasurement, "control", str | None, more="A prompt file.")
JudgeName = _option(EvaluationMeasurement, "judge", str)
JudgeTemplate = Annotated[
    str | None,
    typer.Option(
        help="What a model judge is shown: a text with {completion}, or a file of it; {prompt} if it asks."
    ),
]
JudgeTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens that a chat judge may write; default 8, and more for one that thinks first."
    ),
]
KeepText = _option(EvaluationMeasurement, "keep_text", None, "--keep-text")
ARGUMENTS = {"model": ModelName, "prompts": PromptFile}
RUN_OPTIONS = {
    "out": (Out, None),
    "resume": (Resume, False),
    "template": (Template, "auto"),
    "system": (System, None),
    "prefix": (Prefix, ""),
    "template_args": (TemplateArg, None),
    "template_date": (TemplateDate, DATE),
    "column": (Column, None),
    "limit": (Limit, None),
    "sample": (Sample, None),
    "seed": (Seed, 0),
    "ablation": (HowAblated, ("undifferentiated",)),
    "scale": (Scale, ("1e-5",)),
    "source": (Source, None),
    "align": (Align, "exact"),
    "unit": (Unit, "head"),
    "backend": (Backend, "auto"),
    "layers": (Layers, "auto"),
    "dtype": (Dtype, "auto"),
    "device": (Device, None),
    "max_memory": (MaxMemory, None),
    "trust_remote_code": (RemoteCode, False),
    "gguf_file": (GgufName, None),
    "json": (Json, False),
    "quiet": (Quiet, False),
}
ANSWER_OPTIONS = {
    "max_new_tokens": (NewTokens, 128),
    "do_sample": (DoSample, False),
    "top_k": (TopK, 5),
    "temperature": (Temperature, 1.0),
    "eos_token_id": (EndTokens, None),
}
GROUP_OPTIONS = {"group_by": (GroupBy, None)}
READ_OPTIONS = {"at": (At, None), "answer_column": (AnswerColumn, None)}
SCAN_OPTIONS = {
    "heads": (HeadNames, None),
    "at": (AtAblation, None),
    "plot": (Plot, None),
    "stream": (Stream, False),
}
SEVERAL = {"ablation": (EachAblation, ("undifferentiated",)), "scale": (EachScale, ("1e-5",))}
PLAN_OPTIONS = {"plan": (PlanOnly, False), "device_memory": (DeviceMemory, None)}
# Without --rank-by asr or --judge nobody answers, and nobody judges.
OF_ANSWERS = (
    "judge", "judge_template", "judge_tokens", "max_new_tokens", "do_sample", "top_k", "temperature", "eos_token_id", "keep_text",
)  # fmt: skip
# --plan computes no scores and writes nothing.
OF_RESULTS = ("out", "resume", "plot", "nonfinite", "top", "error", "screen", "group_by", *OF_ANSWERS)


def command(*more: dict, without: tuple[str, ...] = (), instead: dict | None = None) -> Callable:
    """A command with the arguments and options of every run, of `more`, and of its own. instead: in the place of some of them.

    The function decorated gets what was `asked`, checked but not loaded, and its own options.
    """

    def decorate(function: Callable) -> Callable:
        every = {name: option for some in (*more, RUN_OPTIONS) for name, option in some.items()}
        options = {name: option for name, option in every.items() if name not in without} | (instead or {})
        left_out = {name: every[name][1] for name in without}

        def run(context: typer.Context, **given) -> None:
            explicit = given_options(context)
            for name in ("ablation", "scale"):
                if len(given.get(name, ())) == 1:
                    (given[name],) = given[name]
            if "plan" in options:
                by_answers = given.get("rank_by") == "asr"
                check_together(explicit, plan=given["plan"], answers=by_answers)
            if given.get("run") is not None and given["groups"] is None:  # and the options that made it
                given = inherit(given["run"], given, explicit)
            asked = Asked(left_out | {name: given.pop(name) for name in (*ARGUMENTS, *options)})
            function(asked, **given)

        def parameter(name: str, kind, default=inspect.Parameter.empty) -> inspect.Parameter:
            return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        parameters = [
            parameter("context", typer.Context),
            *(parameter(name, kind) for name, kind in ARGUMENTS.items()),
            *(parameter(p.name, p.annotation, p.default) for p in own),
            *(parameter(name, kind, default) for name, (kind, default) in options.items()),
        ]
        run.__doc__ = function.__doc__
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def given_options(context: typer.Context) -> set[str]:
    """Names of the options that were given, at their defaults too."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def check_together(given: set[str], *, plan: bool, answers: bool) -> None:
    """Raises InputError for options that say nothing together, before anything is read or loaded.

    given: names of options; answers: the scan lets the model answer (--rank-by asr).
    """
    if plan:
        idle = _flags(given, OF_RESULTS)
        if idle:
            raise InputError(
                f"--plan runs nothing, so that {idle} would do nothing: leave it away, or leave --plan away"
            )
    elif not answers and "judge" in given:
        idle = _flags(given, ("keep_text",))
        if idle:
            raise InputError(f"only --rank-by asr keeps answers: leave {idle} away, or add it")
        if "stream" in given:
            raise InputError(
                "--judge lets the model answer, which takes all of it in memory: leave --stream away"
            )
    elif not answers:
        idle = _flags(given, OF_ANSWERS)
        if idle:
            raise InputError(
                f"only whole answers have a use for {idle}: add --judge or --rank-by asr, or leave it away"
            )


def _flags(given: set[str], names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if name in given)
