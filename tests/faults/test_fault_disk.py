"""Disks that fill up, fail, cannot be written to, or do not keep what they were given."""

import builtins
import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.runs.verify import verify
from tests.support.faults import found, numbers, scan
from tests.support.model_state import assert_same, state
from tests.support.models import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return build(dtype=torch.float32)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A finished run that tests copy and damage, and its numbers."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, numbers(scan(out, model))


@contextlib.contextmanager
def failing(monkeypatch, below: Path, number: int, code: int):
    """The number-th call that opens for writing, writes, syncs or renames below a folder raises an OSError."""
    calls = []

    def counted(real, names_path):
        def call(first, *args, **kwargs):
            path = names_path(first, *args)
            if path is not None and Path(path).is_relative_to(below):
                calls.append(real.__name__)
                if len(calls) == number:
                    raise OSError(code, os.strerror(code))
            return real(first, *args, **kwargs)

        return call

    def of_fd(fd, *_args):
        return os.readlink(f"/proc/self/fd/{fd}")

    def of_open(path, flags=0, *_args):
        return path if flags & (os.O_WRONLY | os.O_RDWR) else None

    def of_io(path, mode="r", *_args):
        return path if not isinstance(path, int) and set(mode) & set("wa+") else None

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync, of_fd))
        patch.setattr(os, "replace", counted(os.replace, lambda path, *_args: path))
        patch.setattr(os, "mkdir", counted(os.mkdir, lambda path, *_args: path))
        patch.setattr(os, "open", counted(os.open, of_open))
        patch.setattr(io, "open", counted(io.open, of_io))
        patch.setattr(builtins, "open", counted(builtins.open, of_io))
        yield calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_every_write_fails_once(tmp_path, monkeypatch, model, finished, code):
    whole, number, failed = finished[1], 0, set()
    how = dict(heads=[(0, None), (2, 1)], prompts_per_group=3)  # fewer files
    whole = numbers(scan(None, model, **how))
    before = state(model)
    while True:
        number += 1
        out = tmp_path / f"{number}" / "run"
        out.parent.mkdir()
        with failing(monkeypatch, out, number, code) as calls:
            try:
                scan(out, model, **how)
            except OSError as error:
                assert error.errno == code and str(out) in str(error.filename)  # the cause, and where
                failed.add(calls[-1])
            else:
                if len(calls) < number:  # there is no such call any more
                    break
        assert not list(out.rglob("*.tmp"))
        if (out / "run.json").exists():
            assert not verify(out)["problems"]
        assert numbers(scan(out, model, **how)) == whole and numbers(shipsfast.load(out)) == whole
        assert verify(out)["verdict"] == "sound"
    assert number > 20 and failed >= {"fsync", "replace", "open"}, (number, failed)
    assert_same(before, state(model))
    found("disk full, I/O error", number - 1)


def test_a_real_full_disk(tmp_path, model, finished):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        ballast = place / "ballast"
        ballast.write_bytes(bytes(32 << 10))
        with pytest.raises(OSError, match="No space left on device") as caught:
            scan(place / "run", model)
        assert caught.value.errno == errno.ENOSPC and not verify(place / "run")["problems"]
        kept = len(shipsfast.runs.manifest.find_parts(shipsfast.runs.manifest.read_manifest(place / "run")))
        assert 0 < kept < 6
        ballast.unlink()
        assert numbers(scan(place / "run", model)) == finished[1]
    finally:
        subprocess.run(["umount", place], check=True)
    found("full file system", 1)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, model, finished):
    """A finished run can be read there, and asked for again; an unfinished one says why not."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR) and Path(path).is_relative_to(tmp_path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    assert numbers(scan(out, model)) == finished[1] and numbers(shipsfast.load(out)) == finished[1]
    (out / "scores" / "part-000001.parquet").unlink()
    for place in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="Read-only file system") as caught:
            scan(place, model)
        assert caught.value.errno == errno.EROFS and str(place) in caught.value.filename
    monkeypatch.undo()
    assert numbers(scan(out, model)) == finished[1]
    found("read-only folder", 2)


def cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-100])


def turn(part: Path, at: float = 0.5, bit: int = 0) -> None:
    data = bytearray(part.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << bit
    part.write_bytes(data)


def swap(part: Path) -> None:
    part.write_bytes(part.with_name("part-000002.parquet").read_bytes())


def link(part: Path) -> None:
    elsewhere = part.parent.parent.parent / "elsewhere"
    elsewhere.write_bytes(part.read_bytes())
    part.unlink()
    part.symlink_to(elsewhere)


def add(part: Path) -> None:
    shutil.copy(part, part.with_name("part-000099.parquet"))


DAMAGE = {
    "cut": (cut, "bytes"), "bit": (turn, "SHA-256"), "first bit": (lambda p: turn(p, 0.0), "SHA-256"),
    "last bit": (lambda p: turn(p, 1.0), "SHA-256"), "empty": (lambda p: p.write_bytes(b""), "has 0 bytes"),
    "gone": (Path.unlink, "is missing"), "another": (swap, "is damaged"), "a link": (link, "is a link"),
    "one more": (add, "is not one of the parts"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_part_is_named_and_computed_again(tmp_path, capfd, model, finished, how):
    out, (spoil, words) = tmp_path / "run", DAMAGE[how]
    shutil.copytree(finished[0], out)
    part = out / "scores" / "part-000001.parquet"
    named = part.with_name("part-000099.parquet") if how == "one more" else part
    spoil(part)
    report = verify(out)
    assert report["verdict"] == "damaged"
    assert [str(named), True] in [
        [x["path"], words in x["what"] and bool(x["do"])] for x in report["problems"]
    ]
    with pytest.raises(shipsfast.InputError, match=f"{named.name} .*{words}.*run"):
        shipsfast.load(out)
    capfd.readouterr()
    if how == "one more":
        named.unlink()
    else:
        assert numbers(scan(out, model)) == finished[1]
        assert named.name in capfd.readouterr().err
        aside = [x["path"] for x in verify(out)["leftovers"]]
        assert aside == ([] if how == "gone" else [str(part) + ".damaged"])
    assert numbers(shipsfast.load(out)) == finished[1] and verify(out)["verdict"] == "sound"
    found("damaged part", 1)


@pytest.mark.parametrize("kind", ["grams", "basis", "scores"])
def test_what_belongs_together_is_computed_together(tmp_path, model, kind):
    from tests.support.faults import PROMPTS, SIZES

    def run(out):
        return shipsfast.scan_dataset(model, PROMPTS, out=out, progress=False, **SIZES)

    whole = run(tmp_path / "run")
    turn(tmp_path / "run" / kind / "part-000000.parquet")
    with (
        pytest.raises(shipsfast.InputError, match="SHA-256") if kind != "basis" else contextlib.nullcontext()
    ):
        shipsfast.load(tmp_path / "run")
    assert verify(tmp_path / "run")["verdict"] == "damaged"
    again = run(tmp_path / "run")
    for result in (again, shipsfast.load(tmp_path / "run")):
        assert np.array_equal(result.angle_deg, whole.angle_deg) and result.noise_floor == whole.noise_floor
        assert np.array_equal(result.grams.heads, whole.grams.heads)
    assert verify(tmp_path / "run")["verdict"] == "sound"
    found("damaged part", 1)


def test_a_damaged_manifest_is_never_believed(tmp_path, capfd, model, finished):
    size, times = (finished[0] / "run.json").stat().st_size, 0
    for at in np.linspace(0, 1, 60):
        out = tmp_path / f"{times}"
        shutil.copytree(finished[0], out)
        turn(out / "run.json", at, times % 7)
        try:
            assert numbers(shipsfast.load(out)) == finished[1]  # a bit of the indentation
        except shipsfast.InputError as error:
            assert "run.json" in str(error)
            report = verify(out)
            assert report["verdict"] == "damaged" and report["problems"][0]["path"].endswith("run.json")
        times += 1
    assert size > 60
    for spoil in (cut, Path.unlink):
        out = tmp_path / spoil.__name__
        shutil.copytree(finished[0], out)
        spoil(out / "run.json")
        with pytest.raises(shipsfast.InputError, match=r"run\.json .*run the same command again"):
            shipsfast.load(out)
        capfd.readouterr()
        assert numbers(scan(out, model)) == finished[1] and "takes its place" in capfd.readouterr().err
        assert numbers(shipsfast.load(out)) == finished[1] and verify(out)["verdict"] == "sound"
        times += 1
    for name in ("run.json", "run.backup.json"):
        cut(out / name)
    with pytest.raises(shipsfast.InputError, match="choose another output folder|is damaged"):
        scan(out, model)
    assert len(list(out.rglob("*.parquet"))) == 6  # nothing is thrown away
    found("damaged manifest", times)


def test_a_manifest_made_by_hand_leads_nowhere_else(tmp_path, finished):
    from shipsfast.runs.manifest import as_text

    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    body = json.loads((out / "run.json").read_text())
    for file in ("../../secret.parquet", "/etc/passwd", "scores/../run.json", "scores/part-000000.parquet\n"):
        changed = {k: v for k, v in body.items() if k != "checksum"}
        changed["parts"] = [changed["parts"][0] | {"file": file}]
        (out / "run.json").write_text(as_text(changed))
        with pytest.raises(
            shipsfast.InputError, match=r"is damaged: parts\[0\].file is not the name of a part"
        ):
            shipsfast.load(out)
