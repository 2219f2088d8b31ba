"""The judge that a command line names."""

from __future__ import annotations

from .asked import Asked


def chosen_judge(name: str, template: str | None, asked: Asked):
    """Model judges go where the model goes."""
    from ..answers.judges.choose import as_judge

    return as_judge(name, template=template, device=asked.given["device"])
