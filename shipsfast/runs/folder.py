"""Run folders: run.json says what was run and lists the parts, which hold the scores. docs/run-folders.md describes them.

Every file appears at once (written beside, fsynced, renamed). A part counts from the moment the manifest lists it with
its checksum: what is not listed, or is not what was listed, is never read. So a scan that is killed at any moment
leaves whole parts, and the same scan continues from them. A folder that belongs to another scan is refused.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import io
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import InputError, WriteError, note
from ..text import counted
from .identity import in_words
from .kinds import COUNTED, KINDS, ROOMS, SCORES
from .lock import NAME as LOCK
from .lock import FolderLock
from .manifest import (
    ABLATIONS,
    BACKUP,
    FURTHER,
    MANIFEST,
    SCHEMA,
    DamagedError,
    DamagedPartError,
    Part,
    as_text,
    find_parts,
    read_manifest,
)
from .tables import unlisted
from .whole_files import write_whole

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
MEASURES = (
    "noise_floor", "packing_noise", "base_singular_values", "repeated_angle_max_abs_deg", "error", "control_noise_floor",
)  # fmt: skip
ENVIRONMENT = ("device", "versions", "attention_backend", "layers", "kl_backend", "head_precision")
# Folders that are closed, and their locks let go of, when the call that opened them ends: see `closing`.
_opened: contextvars.ContextVar[contextlib.ExitStack | None] = contextvars.ContextVar("opened", default=None)


def _unfinished(path: Path) -> bool:
    """Is it what a run leaves that was killed before or while it wrote its first manifest?"""
    if path.name.startswith(f".{MANIFEST}.") or path.name == LOCK:
        return True
    # Folders of further metrics and ablations are there, and locked, before the first manifest is.
    inner = path.name in (FURTHER, ABLATIONS) or (
        path.parent.name in (FURTHER, ABLATIONS) and path.name.isdigit()
    )
    return inner and path.is_dir() and not path.is_symlink() and all(map(_unfinished, path.iterdir()))


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """Every run folder that is opened inside is closed at the end, however that comes."""
    with contextlib.ExitStack() as stack:
        token = _opened.set(stack)
        try:
            yield
        finally:
            _opened.reset(token)


class RunFolder:
    """A folder that a scan writes to and may find parts of itself in.

    identity: what makes two scans the same; anything in it that differs from the folder's is named in the
    InputError that refuses the folder. record: what runs now, for that message and to compare machines.
    complete: the run is finished; whether its parts are sound `finished` finds. Otherwise the folder is locked, until
    `close`. What is damaged, was left by a kill or belongs to no run is told on stderr and cleared away.
    """

    def __init__(self, path: str | Path, identity: dict, record: dict | None = None) -> None:
        self.path = Path(path)
        self.identity = identity
        self.now = record or {}
        self.previous: dict = {}  # the manifest found in the folder
        self.parts: list[Part] = []
        self._record: dict = {}
        self._lock: FolderLock | None = None
        self._from_backup = ""  # what is wrong with run.json, where its copy was taken
        self._look()
        done = self.previous.get("status") == "complete" and not self._from_backup
        self.complete = done and not self._unlisted()
        if not self.complete:
            self._take_over()

    def _take_over(self) -> None:
        self.begin()
        self.complete = self._record.get("status") == "complete"  # the sweep was all it needed
        if self.complete:
            self.close()

    def finished(self, load: Callable[[Path], T], rooms: Collection[str] | None = None) -> T | None:
        """What `load` makes of the folder of a finished run; None if there is something to do.

        Each part is read and held against its checksum once: those of `rooms`, by default
        all that its kind reads, by `load`, the others here.
        """
        if not self.complete:
            return None
        read = KINDS[self.identity["kind"]].read if rooms is None else rooms
        try:
            for part in self.parts:
                if part.room not in read:
                    part.sound(self.path)
            return load(self.path)
        except DamagedPartError:
            self._take_over()
        return load(self.path) if self.complete else None  # somebody else has made it good

    def _look(self) -> None:
        """Raises InputError if something else lies there."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"{self.path} exists and is not a shipsfast run: choose another output folder")
        self._check_places()
        if (self.path / MANIFEST).exists() or (self.path / BACKUP).exists():
            try:
                self.previous = read_manifest(self.path)
            except DamagedError as error:
                try:
                    self.previous = read_manifest(self.path, name=BACKUP)
                except InputError:
                    raise error from None
                self._from_backup = error.problem
        elif not all(map(_unfinished, self.path.iterdir())):
            raise InputError(f"{self.path} exists and is not a shipsfast run: choose another output folder")
        if self.previous:
            self._check(self.previous)
        self.parts = find_parts(self.previous)
        self._record = {
            k: v for k, v in self.previous.items() if k not in ("schema", "identity", "parts", "checksum")
        }

    def _check_places(self) -> None:
        """Raises InputError for rooms and a lock that no run makes: what is written would go elsewhere, or nowhere."""
        further = [self.path / name for name in (FURTHER, ABLATIONS)]
        nested = [
            each
            for room in further
            if room.is_dir() and not room.is_symlink()
            for each in sorted(room.iterdir())
        ]
        for room in (*(self.path / name for name in ROOMS), *further, *nested):
            if room.is_symlink():
                raise InputError(
                    f"{room} is a link: a run folder holds its own files; copy what it points to"
                )
            if room.exists() and not room.is_dir() and room not in nested:
                raise InputError(f"{room} is not a folder: take it away, or choose another output folder")
        lock = self.path / LOCK
        if lock.is_symlink() or lock.is_dir():
            raise InputError(f"{lock} is not the file that a run makes there: take it away")

    def _check(self, manifest: dict) -> None:
        before = manifest["identity"]
        now = json.loads(json.dumps(self.identity))
        differs = [k for k in {**now, **before} if now.get(k) != before.get(k)]
        if differs:
            words = in_words(differs, before, now, manifest, self.now)
            raise InputError(
                f"{self.path} holds another run (different {', '.join(differs)}): {words}; choose another output folder"
            )

    def _unlisted(self) -> list[Path]:
        """Parts that the manifest does not list."""
        return [file for room in ROOMS for file in unlisted(self.path, room, self.parts)]

    def begin(self) -> None:
        """Lock the folder, and make it consist of sound parts only."""
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path)
            stack = _opened.get()
            if stack is not None:
                stack.callback(self.close)
            self._look()  # again: it may have changed before it was locked
            self._sweep()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, WriteError):
                place = error.filename or str(self.path)
                raise WriteError(error.errno, os.strerror(error.errno or errno.EIO), place) from error
            raise

    def close(self) -> None:
        """Let others write; may be called again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _sweep(self) -> None:
        problems = {part: problem for part in self.parts if (problem := part.read(self.path)[1])}
        for part, problem in problems.items():
            place = self.path / part.file
            note(f"{place} {problem}: its scores are computed again")
            if place.exists() or place.is_symlink():
                os.replace(place, place.with_name(place.name + ".damaged"))
        # What was written together is computed together.
        lost = {part.commit for part in problems}
        self.parts = [part for part in self.parts if part.commit not in lost]
        if self._from_backup:
            note(f"{self._from_backup}: its copy {BACKUP} is sound, and takes its place")
        if lost or self._from_backup:
            self._from_backup = ""
            self._record["status"] = "running"
            self._commit()
        for room in (self.path, *(self.path / name for name in ROOMS)):
            for file in sorted(room.glob(".*.tmp")):
                if file.is_symlink() or not file.is_dir():
                    file.unlink()
        for file in self._unlisted():
            if self._record.get("status") == "complete":
                note(f"{file} is not one of the parts that {MANIFEST} lists: it is removed")
            else:
                note(
                    f"{file} was never finished, or belongs to a damaged part: its scores are computed again"
                )
            file.unlink()

    def previous_measures(self) -> dict:
        """What an unfinished run has measured beside its scores."""
        return {k: self.previous[k] for k in MEASURES if k in self.previous}

    @property
    def same_environment(self) -> bool:
        """Does the run go on where it was begun: device, versions, backends? A new one does."""
        return not self.previous or all(
            self.previous.get(k) == json.loads(json.dumps(self.now.get(k))) for k in ENVIRONMENT
        )

    def write_manifest(self, record: dict) -> None:
        """run.json with this record, what makes the run this run, and the parts written so far."""
        self.begin()
        self._record = dict(record)
        self._commit()

    def _commit(self) -> None:
        body = {"schema": SCHEMA, "identity": self.identity, "parts": [p.entry() for p in self.parts]}
        text = as_text(self._record | body)
        write_whole(self.path / MANIFEST, lambda p: p.write_text(text, "utf-8"))
        # A copy, for the day that a bit of the first one turns. Its checksum makes up for the missing fsync.
        write_whole(self.path / BACKUP, lambda p: p.write_text(text, "utf-8"), sync=False)

    def update(self, **record) -> None:
        """Add to what the manifest says."""
        self.write_manifest(self._record | record)

    def leave_out(self, room: str) -> list[Path]:
        """The parts of a room, which the next manifest does not list; then they can be removed."""
        gone = [part for part in self.parts if part.room == room]
        self.parts = [part for part in self.parts if part.room != room]
        return [self.path / part.file for part in gone]

    def write_part(self, frame: pd.DataFrame, room: str = SCORES, **record) -> None:
        self.write_parts({room: frame}, **record)

    def write_parts(self, frames: dict[str, pd.DataFrame], **record) -> None:
        """Parts that belong together, by room, and then the manifest that lists them, with `record` added to it."""
        self.begin()
        before, written = self.parts, []
        commit = 1 + max((part.commit for part in self.parts), default=-1)
        try:
            for room, frame in frames.items():
                if not len(frame):
                    continue
                data = io.BytesIO()
                frame.to_parquet(data, index=False)
                (self.path / room).mkdir(exist_ok=True)
                number = 1 + max((p.number for p in self.parts if p.room == room), default=-1)
                part = Part.of(f"{room}/part-{number:06d}.parquet", data.getbuffer(), len(frame), commit)
                written.append(self.path / part.file)
                write_whole(written[-1], lambda p, data=data: p.write_bytes(data.getbuffer()))
                self.parts = [*self.parts, part]
            self._record |= record
            self._commit()
        except BaseException as error:
            if not self._is_listed(written):
                self.parts = before
                for file in written:
                    with contextlib.suppress(OSError):
                        file.unlink(missing_ok=True)
            if isinstance(error, OSError) and not isinstance(error, WriteError):
                raise WriteError(
                    error.errno, os.strerror(error.errno or errno.EIO), str(self.path)
                ) from error
            raise

    def _is_listed(self, files: list[Path]) -> bool:
        """Did the manifest get there, before things went wrong?"""
        try:
            listed = {self.path / part.file for part in find_parts(read_manifest(self.path))}
        except InputError:
            return False
        return listed.issuperset(files)


def kept(path: Path | None) -> str:
    """What of a run is safe on the disk, in words; empty where nothing is."""
    if path is None:
        return ""
    try:
        parts = find_parts(read_manifest(path))
    except (InputError, OSError):  # a name that is too long, say
        return ""
    rows = sum(part.rows for part in parts if part.room in COUNTED)
    if not rows:
        return ""
    return f"what was finished is kept in {path} ({counted(rows, 'row')} in {counted(len(parts), 'part')}), run again to continue"
