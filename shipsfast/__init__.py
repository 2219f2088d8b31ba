"""shipsfast: switch off every attention head of a language model, one at a time, exactly and fast.

The names below are the public ones. They load on first use, so that `import shipsfast` is quick.
"""

from importlib import import_module

from ._version import __version__

_PUBLIC = {
    "Ablation": "engine.ablation",
    "ablate": "engine.ablate",
    "contrast": "results.contrast",
    "ContrastResult": "results.contrast",
    "Direction": "results.direction",
    "direction": "scans.direction",
    "EvalResult": "results.evaluation",
    "evaluate": "answers.evaluate",
    "generate": "answers.generate",
    "HeadScore": "results.head_map",
    "InputError": "errors",
    "KeywordJudge": "answers.judges.keywords",
    "ShipsResult": "results.ships",
    "UnsupportedModelError": "errors",
    "load": "results.load",
    "load_prompts": "prompts.datasets",
    "logit_diff": "scans.metrics",
    "probe": "scans.hidden_metrics",
    "projection": "scans.hidden_metrics",
    "refusal_logit": "scans.metrics",
    "SaharaResult": "results.sahara",
    "SinkMass": "results.sink_mass",
    "SubspaceResult": "results.subspace",
    "sahara": "scans.sahara",
    "scan": "scans.ships",
    "scan_asr": "answers.asr",
    "scan_dataset": "scans.dataset",
    "sink_mass": "scans.sink_mass",
    "top_heads": "scans.top_heads",
    "TopHeads": "results.top_heads",
    "top_tokens": "scans.top_tokens",
    "TopTokens": "results.top_tokens",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 (the keys are strings)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'shipsfast' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
