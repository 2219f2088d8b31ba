"""Commands about whole answers: generate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .asked import Asked, check_place
from .inherited import check_same_weights, check_source
from .options import (
    ANSWER_OPTIONS,
    GROUP_OPTIONS,
    Control,
    Groups,
    JudgeName,
    JudgeTemplate,
    JudgeTokens,
    KeepText,
    command,
)
from .shown import show_json, show_result


@command(ANSWER_OPTIONS, without=("out", "resume"))
def generate(asked: Asked, groups: Groups = "none"):
    """Print what MODEL answers to PROMPTS with each group of heads off."""
    from ..answers.generate import generate as run
    from ..engine.heads import parse_groups
    from ..prompts.messages import prompt_text
    from ..prompts.tokens import as_prompts
    from ..results.pages import show_texts

    chosen = parse_groups(groups)
    texts, prompts = asked.run(run, groups=chosen), asked.values["prompts"]
    if not asked.given["json"]:
        return show_texts(chosen, [prompt_text(each) for each in as_prompts(prompts)], texts)
    show_json(
        [
            {"heads": [list(head) for head in group], "prompt": prompt, "text": text}
            for group, answers in zip(chosen, texts, strict=True)
            for prompt, text in zip(prompts, answers, strict=True)
        ]
    )


@command(ANSWER_OPTIONS, GROUP_OPTIONS)
def evaluate(
    asked: Asked,
    groups: Groups = None,
    run: Annotated[
        Path | None, typer.Option(help="A finished run folder to take heads from, with --top.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads to take from --run, each a group.")] = 10,
    cumulative: Annotated[
        bool,
        typer.Option("--cumulative", help="Groups of the best 1, 2, ... heads instead. Sahara's always are."),
    ] = False,
    control: Control = None,
    judge: JudgeName = "keywords",
    judge_template: JudgeTemplate = None,
    judge_tokens: JudgeTokens = None,
    keep_text: KeepText = False,
    view: Annotated[
        Path | None, typer.Option(help="Write the answers side by side here (md or html).")
    ] = None,
    show_answers: Annotated[bool, typer.Option("--show-answers", help="Print all answers, whole.")] = False,
):
    """Judge what MODEL answers to PROMPTS with each group of heads off: attack success rates.

    The unablated model's answers are judged beside them. With --run, the ablation, template, unit and dtype are the run's,
    unless they are given.
    """
    from ..engine.heads import parse_groups

    if view is not None and view.suffix.lower() not in (".md", ".html"):
        raise InputError(f"--view {view}: expected a name ending in .md or .html")
    check_place(view)
    if groups is not None and run is not None:
        raise InputError("--groups names the heads, and --run takes them from a run: give one of them")
    if groups is None and run is None:
        raise InputError(
            "evaluate needs --groups, such as '2-26; 2-26,3-1', or --run with a finished run folder"
        )
    chosen = parse_groups(groups) if run is None else _best(run, top, cumulative, asked)
    if run is not None:
        check_same_weights(run, asked.model)
    ordinary = None if control is None else asked.more_prompts("control", control)
    from ..answers.evaluate import evaluate as run_it

    result = asked.run(
        run_it, groups=[[], *(group for group in chosen if group)], judge=asked.judge(judge, judge_template, judge_tokens),
        control=ordinary, keep_text=keep_text,
    )  # fmt: skip
    if view is not None:
        result.view(view)
    show_result(result, top, asked)
    if show_answers and not asked.given["json"]:
        result.show_answers()
    if view is not None and not asked.given["json"]:
        print(f"answers side by side: {view}")


def _best(run: Path, top: int, cumulative: bool, asked: Asked) -> list[list[tuple[int, int]]]:
    """The groups that a finished run speaks for."""
    from ..results.load import load
    from ..results.sahara import SaharaResult

    result = load(run)
    if not hasattr(result, "top"):
        raise InputError(f"{run} holds no scan: give one of scan, scan-dataset or sahara")
    if result.record.get("status") not in (None, "complete"):
        raise InputError(f"{run} holds a run that is not finished: run it again to continue")
    check_source(run, asked.values["ablation"].kind, asked.source_ids, asked.others is not None)
    if result.unit != asked.values["unit"]:
        raise InputError(f"{run} is about {result.unit}s: give --unit {result.unit}")
    heads = result.heads[:top] if isinstance(result, SaharaResult) else [s[:2] for s in result.top(top)]
    if cumulative or isinstance(result, SaharaResult):
        return [heads[:n] for n in range(1, len(heads) + 1)]
    return [[head] for head in heads]
