"""What `shipsfast info` says: versions, devices, which backends will run, what is missing and the remedy."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

from .._version import __version__

PACKAGES = ("torch", "transformers", "triton", "numpy", "pandas", "pyarrow", "matplotlib")
# What only some inputs need, and for what.
EXTRAS = {
    "gguf": "GGUF files",
    "accelerate": "GGUF files",
    "peft": "adapters",
    "datasets": "data sets of the hub",
}


def describe() -> dict:
    """Facts by name; everything is looked up, nothing is assumed."""
    import torch

    from ..ops.divergences import kl_backend
    from ..ops.extension import extension_status
    from ..ops.tree_attention import resolve_backend

    loaded, why = extension_status()
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return {
        "shipsfast": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": {name: _version(name) for name in EXTRAS},
        "extension": {"loaded": loaded, "detail": why},
        "triton_kernels": _triton(torch),
        "devices": {
            name: {
                "name": torch.cuda.get_device_name(name)
                if name != "cpu"
                else f"{torch.get_num_threads()} threads",
                "attention": resolve_backend("auto", torch.device(name), torch.float32),
                "kl": kl_backend(name),
            }
            for name in devices
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _triton(torch) -> str:
    if importlib.util.find_spec("triton") is None:
        return "not available: the package triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "installed, not used: torch sees no CUDA GPU"
    return "available"


def render(facts: dict) -> str:
    """The same as text, one fact a line."""
    lines = [f"shipsfast {facts['shipsfast']}, Python {facts['python']}"]
    lines += [f"  {name}: {found or 'not installed'}" for name, found in facts["packages"].items()]
    lines += [
        f"  {name}: {found or f'not installed; {EXTRAS[name]} need it (pip install {name})'}"
        for name, found in facts["extras"].items()
    ]
    extension = facts["extension"]
    lines.append(
        f"native extension: {'loaded' if extension['loaded'] else 'not loaded'} ({extension['detail']})"
    )
    lines.append(f"Triton kernels: {facts['triton_kernels']}")
    for name, device in facts["devices"].items():
        lines.append(f"{name} ({device['name']}): attention by {device['attention']}, KL by {device['kl']}")
    return "\n".join(lines)
