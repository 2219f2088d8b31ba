"""Options that say nothing together: refused in one line, before anything is read or loaded."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from ..errors import InputError

# Without --rank-by asr nobody answers, and nobody judges.
OF_ANSWERS = (
    "judge", "judge_template", "max_new_tokens", "do_sample", "top_k", "temperature", "eos_token_id", "keep_text",
)  # fmt: skip
# --plan computes no scores and writes nothing.
OF_RESULTS = ("out", "resume", "plot", "nonfinite", "top", *OF_ANSWERS)


def given_options(context: typer.Context) -> set[str]:
    """Names of the options that were given, at their defaults too."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def check_together(given: set[str], *, plan: bool, answers: bool) -> None:
    """Raises InputError. given: names of options; answers: the scan lets the model answer (--rank-by asr)."""
    if plan:
        idle = _flags(given, OF_RESULTS)
        if idle:
            raise InputError(
                f"--plan runs nothing, so that {idle} would do nothing: leave it away, or leave --plan away"
            )
    elif not answers:
        idle = _flags(given, OF_ANSWERS)
        if idle:
            raise InputError(f"only whole answers have a use for {idle}: add --rank-by asr, or leave it away")


def _flags(given: set[str], names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if name in given)
