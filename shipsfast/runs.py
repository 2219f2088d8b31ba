"""Run folders: run.json says what was run, scores/part-*.parquet hold the scores, grams/ what resampling needs.

Every file appears at once (written beside, fsynced, renamed), so a killed scan leaves whole parts only,
and the same scan continues from them. A folder that belongs to another scan is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .errors import InputError

SCHEMA = 2
MANIFEST = "run.json"
SCORES = "scores"
NOT_THE_MODEL = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
)  # keys of a config
MEASURES = ("noise_floor", "base_singular_values")
SAMPLES = 4096  # numbers of each tensor that enter the fingerprint


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file that appears at `path` complete or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o666 & ~_umask())
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _unfinished(path: Path) -> bool:
    """Is it what a run leaves that was killed while it wrote its first manifest?"""
    return path.name.startswith(f".{MANIFEST}.")


def _umask() -> int:
    """The process's umask; temporary files are made readable by their owner only, results should not be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the model: its config, and names, shapes, types and evenly spaced samples of every tensor."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    named = sorted(model.state_dict(keep_vars=True).items())
    for name, tensor in (part for each in named for part in _plain_parts(*each)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type == "meta" or tensor.numel() == 0:
            continue
        flat = tensor.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        sample = flat[index.to(flat.device)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _plain_parts(name: str, tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or the tensors that a quantised one is made of, with their names."""
    if not isinstance(tensor, torch.Tensor):
        return
    data = tensor.data
    if type(data) is not torch.Tensor and hasattr(data, "__tensor_flatten__"):
        for inner in data.__tensor_flatten__()[0]:
            yield from _plain_parts(f"{name}.{inner}", getattr(data, inner))
    else:
        yield name, tensor


def prompt_hashes(prompts: Sequence[Sequence[int]]) -> list[str]:
    """One hash per prompt, of its token ids."""
    return [hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16] for ids in prompts]


class RunFolder:
    """A folder that a scan writes to and may find parts of itself in.

    identity: what makes two scans the same; anything in it that differs from the folder's is named in the
    InputError that refuses the folder.
    """

    def __init__(self, path: str | Path, identity: dict) -> None:
        self.path = Path(path)
        self.identity = identity
        self.previous: dict = {}  # the manifest found in the folder
        if (self.path / MANIFEST).exists():
            self.previous = read_manifest(self.path)
            self._check(self.previous)
        elif self.path.exists() and (
            not self.path.is_dir() or not all(map(_unfinished, self.path.iterdir()))
        ):
            raise InputError(f"{self.path} exists and is not a shipsfast run: choose another output folder")
        self.path.mkdir(parents=True, exist_ok=True)

    def _check(self, manifest: dict) -> None:
        before = manifest["identity"]
        now = json.loads(json.dumps(self.identity))
        differs = [k for k in {**now, **before} if now.get(k) != before.get(k)]
        if differs:
            raise InputError(
                f"{self.path} holds another run (different {', '.join(differs)}): choose another output folder"
            )

    def previous_measures(self) -> dict:
        """What an unfinished run has measured beside its scores."""
        return {k: self.previous[k] for k in MEASURES if k in self.previous}

    def write_manifest(self, record: dict) -> None:
        text = json.dumps({"schema": SCHEMA, "identity": self.identity, **record}, indent=1, sort_keys=True)
        write_whole(self.path / MANIFEST, lambda p: p.write_text(text + "\n", "utf-8"))

    def write_part(self, frame: pd.DataFrame, room: str = SCORES) -> None:
        number = 1 + max((int(p.stem.split("-")[1]) for p in _parts(self.path, room)), default=-1)
        (self.path / room).mkdir(exist_ok=True)
        write_whole(
            self.path / room / f"part-{number:06d}.parquet", lambda p: frame.to_parquet(p, index=False)
        )


def _parts(path: Path, room: str) -> list[Path]:
    return sorted((path / room).glob("part-[0-9]*.parquet"))


def read_parts(path: Path, room: str, columns: list[str]) -> Iterator[tuple[Path, pd.DataFrame]]:
    """The parts of one room of a run folder, in the order written. Raises InputError for a damaged one."""
    for part in _parts(path, room):
        with damage(part):
            frame = pd.read_parquet(part, columns=columns)
        yield part, frame


@contextlib.contextmanager
def damage(part: Path) -> Iterator[None]:
    """What goes wrong inside is the part's fault."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"{part} is damaged ({' '.join(str(error).split())}): delete it and run again"
        ) from error


def read_manifest(path: Path, kind: str | None = None) -> dict:
    """run.json of a run folder. Raises InputError if it is missing, damaged, of another version or kind."""
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"{path} is not a shipsfast run: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA or "identity" not in manifest:
        raise InputError(f"{file} is not of schema {SCHEMA}, the one this version of shipsfast reads")
    if kind is not None and manifest["identity"].get("kind") != kind:
        raise InputError(
            f"{path} holds a run of kind {manifest['identity'].get('kind')!r}, expected {kind!r}"
        )
    return manifest


def read_scores(path: Path, shape: tuple[int, ...], names: tuple[str, ...], value: str) -> np.ndarray:
    """The scores a run folder holds, float64 of `shape`, NaN where none has been written yet.

    names: the columns that index the dimensions; value: the column of the scores.
    """
    scores = np.full(shape, np.nan)
    for part, frame in read_parts(path, SCORES, [*names, value]):
        with damage(part):
            scores[tuple(frame[name] for name in names)] = frame[value]
    return scores


def score_frame(scores: np.ndarray, names: tuple[str, ...], value: str) -> pd.DataFrame:
    """Scores as rows with the columns `names` and `value`, without those that are NaN."""
    index = np.nonzero(~np.isnan(scores))
    columns = {name: at.astype(np.int32) for name, at in zip(names, index, strict=True)}
    return pd.DataFrame(columns | {value: scores[index]})
