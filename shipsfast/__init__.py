"""shipsfast: switch off every attention head of a language model, one at a time, exactly and fast.

The names below are the public ones. They load on first use, so that `import shipsfast` is quick.
"""

from importlib import import_module

from ._version import __version__

_PUBLIC = {
    "Ablation": "ablation",
    "ablate": "ablation",
    "EvalResult": "evaluation",
    "evaluate": "evaluation",
    "generate": "generation",
    "HeadScore": "results",
    "InputError": "errors",
    "KeywordJudge": "refusal",
    "ShipsResult": "results",
    "UnsupportedModelError": "errors",
    "load": "results",
    "load_prompts": "prompts",
    "logit_diff": "metrics",
    "refusal_logit": "metrics",
    "SaharaResult": "results",
    "SubspaceResult": "results",
    "sahara": "greedy",
    "scan": "ships",
    "scan_asr": "asr",
    "scan_dataset": "dataset",
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
