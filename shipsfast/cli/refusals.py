"""`scan --judge`: how often the unablated model refuses the prompts. A ranking of heads by prompts that it answers says nothing
about refusals. Scans and answers do not know each other, so the two are joined here."""

from __future__ import annotations

from .asked import Asked


def refusals(asked: Asked, judge) -> dict:
    """Let the unablated model answer, before the scan: for the scan's record."""
    from ..answers.evaluate import evaluate
    from ..engine.ablation import Ablation
    from ..results.statistics import wilson_interval

    # Nothing is off, so that an ablation that text cannot follow does not matter.
    own = {"out": None, "layers": "auto", "groups": [[]], "judge": judge, "ablation": Ablation()}
    result = asked.run(evaluate, **own)
    refused, prompts = result.labels[0].count("refusal"), len(result.prompts)
    low, high = wilson_interval(refused, prompts)
    return {
        "judge": judge.name, "described": judge.describe(), "generation": result.identity["generation"],
        "refused": refused, "prompts": prompts, "low": low, "high": high,
        **{label: result.labels[0].count(label) for label in ("degenerate", "unfinished")},
        "warnings": result.warnings(),
    }  # fmt: skip


def record_refusals(result, found: dict, asked: Asked) -> None:
    """Into the record of a scan, and into its run.json."""
    warnings = found.pop("warnings")
    added = {"refusals": found, "warnings": warnings}
    result.record |= added
    out = asked.given["out"]
    if out is not None:
        from ..runs.folder import RunFolder

        folder = RunFolder(out, result.identity, result.record)
        try:
            folder.update(**added)
        finally:
            folder.close()
