"""run.json, the manifest of a run folder: reading it, and the parts it lists. Nothing here needs a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ..errors import InputError
from .part_file import inside
from .schema import PART_FILE, check_manifest

SCHEMA = 3
MANIFEST, BACKUP = "run.json", "run.backup.json"
FURTHER = "also"  # the folder of further metrics' run folders
ABLATIONS = "by_ablation"  # of further ablations'
MOST_BYTES = 1 << 30  # of a manifest: more is not one of ours


class DamagedError(InputError):
    """A manifest that is not as it was written; .problem says which, without a remedy."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}: {remedy}")
        self.problem = problem


class DamagedPartError(InputError):
    """A part that is not as it was written, or that the manifest does not list: a run that goes on makes it good."""


@dataclass(frozen=True)
class Part:
    """A part as the manifest lists it. file: such as "scores/part-000000.parquet"; rows: of its table; commit: parts
    that were written together, which are only worth something together, have the same."""

    file: str
    sha256: str
    bytes: int
    rows: int
    commit: int

    @classmethod
    def of(cls, file: str, data, rows: int, commit: int) -> Self:
        return cls(file, hashlib.sha256(data).hexdigest(), len(data), rows, commit)

    @property
    def room(self) -> str:
        return self.file.split("/")[0]

    @property
    def number(self) -> int:
        return int(PART_FILE.fullmatch(self.file)[2])

    def entry(self) -> dict:
        return asdict(self)

    def read(self, folder: Path) -> tuple[bytes, str]:
        """Its bytes, and what is wrong with them: "" if they are those that were written."""
        place = folder / self.file
        try:
            if place.is_symlink() or place.parent.is_symlink():
                return b"", "is a link, which a run never makes"
            size = place.stat().st_size
            if size != self.bytes:
                return b"", f"is damaged: it has {size} bytes, and {self.bytes} were written"
            data = place.read_bytes()
        except FileNotFoundError:
            return b"", "is missing"
        except OSError as error:
            return b"", f"cannot be read ({error.strerror})"
        if hashlib.sha256(data).hexdigest() != self.sha256:
            return b"", "is damaged: its SHA-256 is not that of what was written"
        return data, ""

    def sound(self, folder: Path) -> bytes:
        """Its bytes. Raises DamagedPartError if they are not those that were written."""
        data, problem = self.read(folder)
        if problem:
            raise DamagedPartError(
                f"{folder / self.file} {problem}: run the same command again, which computes its scores anew"
            )
        return data


def as_text(body: dict) -> str:
    """The text of a manifest, with its own checksum."""
    # As it will be read: tuples are lists, keys are strings.
    body = {k: v for k, v in json.loads(json.dumps(body)).items() if k != "checksum"}
    return json.dumps(body | {"checksum": _checksum(body)}, indent=1, sort_keys=True) + "\n"


def _checksum(body: dict) -> str:
    try:
        text = json.dumps({k: v for k, v in body.items() if k != "checksum"}, sort_keys=True)
    except RecursionError:  # nested as deep as can just be read
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def find_parts(manifest: dict) -> list[Part]:
    """The parts that a manifest lists, in the order written."""
    return [Part(**entry) for entry in manifest.get("parts", [])]


def without_run(path: Path) -> str:
    """What a place lacks that is no run folder."""
    return f"it has no {MANIFEST}" if path.exists() else "it does not exist"


def read_manifest(path: Path, kind: str | None = None, *, name: str = MANIFEST) -> dict:
    """run.json of a run folder, as a dict without its checksum.

    Raises InputError if it is missing, of another version or kind; DamagedError if it is not as it was written.
    """
    file = path / name
    if not file.is_file() and not (path / BACKUP).is_file():
        raise InputError(f"{path} is not a shipsfast run: {without_run(path)}")
    remedy = "choose another output folder"
    if name == MANIFEST and (path / BACKUP).is_file():
        remedy = f"run the same command again, which takes its copy {BACKUP}"
    if file.exists() or file.is_symlink():
        inside(path, file)
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        manifest = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{file} is missing", remedy) from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged ({error})", remedy) from error
    if not isinstance(manifest, dict):
        raise DamagedError(f"{file} is damaged (it holds no object)", remedy)
    schema = manifest.get("schema")
    # A bit that turns in the number itself is caught by the checksum, if the rest is of ours.
    if schema != SCHEMA and manifest.get("checksum") != _checksum(manifest | {"schema": SCHEMA}):
        older = isinstance(schema, int) and schema < SCHEMA
        what = (
            "an earlier version of shipsfast, without checksums" if older else "another version of shipsfast"
        )
        raise InputError(
            f"{file} is of schema {schema!r}, written by {what}; this one reads and writes schema {SCHEMA}: scan again "
            "into a new folder"
        )
    if schema != SCHEMA or manifest.get("checksum") != _checksum(manifest):
        raise DamagedError(f"{file} is damaged (its checksum is not that of its contents)", remedy)
    check_manifest(file, manifest)
    if kind is not None and manifest["identity"].get("kind") != kind:
        raise InputError(
            f"{path} holds a run of kind {manifest['identity'].get('kind')!r}, expected {kind!r}"
        )
    return {k: v for k, v in manifest.items() if k != "checksum"}
