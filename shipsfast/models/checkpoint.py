"""Where a model lies, found before anything is loaded: a folder, a GGUF file, an adapter, or a repository of the hub."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import hub
from ..errors import InputError, UnsupportedModelError

CONFIG, ADAPTER = "config.json", "adapter_config.json"
ORIGIN = "_shipsfast_origin"  # attribute of a model: what run.json says of its files, beside its name
GGUF = ".gguf"


@dataclass(frozen=True)
class Checkpoint:
    """What a name of a model means.

    name: as it was given; place: the folder or repository that transformers is told; gguf: the file in it, if it is one;
    adapter: path of the adapter_config.json that lies there; whole: there is a config.json too, or a GGUF file;
    how: what from_pretrained takes beside it.
    """

    name: str
    place: str
    gguf: str | None = None
    adapter: Path | None = None
    whole: bool = True
    how: dict = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """None if it is on the hub."""
        return Path(self.place) if Path(self.place).is_dir() else None

    def __str__(self) -> str:
        return self.name if self.folder else f"the hub's {self.name} (there is no folder of that name)"

    def file(self, name: str) -> Path | None:
        """The path of one of its files, downloaded if it is on the hub; None if there is none of the name."""
        if self.folder:
            path = self.folder / name
            return path if path.is_file() else None
        return hub.download(self.place, name, here=bool(self.how))


def find(name: str, gguf_file: str | None = None) -> Checkpoint:
    """What `name` means: a folder, a GGUF file or a hub id. gguf_file: the GGUF file in a folder or repository.

    Raises InputError for a path that is no model.
    """
    path = Path(name)
    if path.suffix.lower() == GGUF:
        if gguf_file is not None:
            raise InputError(f"{name} is a GGUF file itself: leave --gguf-file away, or name its folder")
        if not path.is_file():
            raise InputError(
                f"no GGUF file at {name}: a file of the hub is named by its repository and --gguf-file"
            )
        return Checkpoint(name, str(path.parent), gguf=path.name)
    looks_like_path = path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.exists()
    if looks_like_path and not path.is_dir():
        raise InputError(f"no model folder at {name}")
    if path.is_dir():
        return _in_folder(name, path, gguf_file)
    return _on_hub(name, gguf_file)


def check_streamable(found: Checkpoint) -> None:
    """Raises UnsupportedModelError for what cannot be read layer by layer."""
    if found.gguf:
        raise UnsupportedModelError(
            f"{found.name} is a GGUF file, whose weights are dequantised as they are loaded: it cannot be streamed; load it "
            "without --stream, or stream the model's safetensors"
        )
    if found.adapter:
        raise UnsupportedModelError(
            f"{found.name} holds an adapter, whose weights would be left out as layers are read: it cannot be streamed; "
            "merge the adapter into its base model (merge_and_unload, save_pretrained), or load it without --stream"
        )


def _on_hub(name: str, gguf_file: str | None) -> Checkpoint:
    if gguf_file is not None:
        return Checkpoint(name, name, gguf=gguf_file, how=hub.how_to_ask(name, gguf_file))
    try:
        asked = Checkpoint(name, name, how=hub.how_to_ask(name, CONFIG))
    except InputError:
        if hub.download(name, ADAPTER, here=True) is None:
            raise
        asked = Checkpoint(name, name, how={"local_files_only": True})
    adapter = asked.file(ADAPTER)
    return replace(asked, adapter=adapter, whole=adapter is None or asked.file(CONFIG) is not None)


def _in_folder(name: str, path: Path, gguf_file: str | None) -> Checkpoint:
    if gguf_file is not None:
        if Path(gguf_file).is_absolute() or ".." in Path(gguf_file).parts or not (path / gguf_file).is_file():
            raise InputError(f"{name} has no file {gguf_file}: {_ggufs(path) or 'it has no GGUF files'}")
        return Checkpoint(name, name, gguf=gguf_file)
    adapter = path / ADAPTER if (path / ADAPTER).is_file() else None
    whole = (path / CONFIG).is_file()
    if not whole and adapter is None:
        also = _ggufs(path)
        also = f"; {also}: name one with --gguf-file" if also else ""
        raise InputError(f"{name} is not a model folder: it has no {CONFIG}{also}")
    return Checkpoint(name, name, adapter=adapter, whole=whole)


def _ggufs(path: Path) -> str:
    names = sorted(file.name for file in path.glob("*" + GGUF))
    return f"it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""
