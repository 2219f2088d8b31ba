"""Prompts in Arrow's forms: parquet files, and what the datasets library's `save_to_disk` writes.

Texts stay in their dictionaries until their lengths are known: a small file can name a large text many times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import InputError
from .text_files import MOST_FIELD_BYTES, MOST_FILE_BYTES

MOST_ROWS = 50_000_000
STATE, SPLITS = "state.json", "dataset_dict.json"  # in the folder of a data set, and of one with splits
_SPLIT = re.compile(r"\w[\w.-]*")
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow that was written to its end
_PART = re.compile(r"[\w.-]+\.arrow")


def names(path: Path) -> list[str]:
    """The columns of a parquet file."""
    import pyarrow.parquet as pq

    return _read(path, "parquet", lambda: list(pq.ParquetFile(path).schema_arrow.names))


def columns(path: Path, chosen: Sequence[str]) -> list[tuple]:
    """The rows of some columns. Metadata of column chunks is not read: pyarrow 26 ends the process over some that are
    damaged."""
    import pyarrow.parquet as pq

    def read() -> list[tuple]:
        plain = pq.ParquetFile(path)
        _check_types(path, plain.schema_arrow, chosen)
        if not 0 <= plain.metadata.num_rows <= MOST_ROWS:
            raise InputError(f"{path} declares {plain.metadata.num_rows:,} rows: take a part of it")
        leaves = [plain.schema.column(i).path for i in range(len(plain.schema))]
        texts = [leaf for leaf in leaves if leaf.split(".", 1)[0] in chosen or leaf in chosen]
        file = pq.ParquetFile(path, read_dictionary=texts)
        return _rows(path, file.iter_batches(8192, columns=list(chosen)), chosen)

    return _read(path, "parquet", read)


def splits(folder: Path) -> list[str] | None:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; None for any other."""
    if not (folder / SPLITS).is_file():
        return None
    found = _json(folder / SPLITS).get("splits")
    if (
        not isinstance(found, list)
        or not all(isinstance(x, str) and _SPLIT.fullmatch(x) for x in found)
        or not found
    ):
        raise InputError(f"{folder / SPLITS} does not name the splits of a data set")
    return found


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote the folder."""
    return (folder / STATE).is_file()


def saved_names(folder: Path) -> list[str]:
    """The columns of a saved data set."""
    return _read(folder, "Arrow", lambda: _schema(_parts(folder)[0]).names)


def saved_columns(folder: Path, chosen: Sequence[str]) -> list[tuple]:
    """The rows of some columns of a saved data set, part by part as its state names them."""
    import pyarrow as pa

    def read() -> list[tuple]:
        out = []
        for part in _parts(folder):
            _check_types(part, _schema(part), chosen)
            with pa.memory_map(str(part)) as file, pa.ipc.open_stream(file) as stream:
                out += _rows(part, stream, chosen)
                file.seek(file.size() - len(_END))
                if file.read() != _END:
                    raise InputError(f"{part} is cut off: it has no end")
        return out

    return _read(folder, "Arrow", read)


def _parts(folder: Path) -> list[Path]:
    state = _json(folder / STATE)
    if state.get("_indices_data_files"):
        raise InputError(
            f"{folder} keeps a selection of rows beside its data: save it anew with the datasets library, which writes "
            "the rows themselves"
        )
    files = state.get("_data_files")
    names = (
        [file.get("filename") if isinstance(file, dict) else None for file in files]
        if isinstance(files, list)
        else []
    )
    if not names or not all(isinstance(name, str) and _PART.fullmatch(name) for name in names):
        raise InputError(f"{folder / STATE} does not name the Arrow files of the folder")
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}, which its {STATE} names")
        if (size := (folder / name).stat().st_size) > MOST_FILE_BYTES:
            raise InputError(
                f"{folder / name} has {size:,} bytes, and files of up to {MOST_FILE_BYTES:,} are read"
            )
    return [folder / name for name in names]


def _schema(part: Path):
    import pyarrow as pa

    with pa.memory_map(str(part)) as file, pa.ipc.open_stream(file) as stream:
        return stream.schema


def _json(path: Path) -> dict:
    if path.stat().st_size > MOST_FIELD_BYTES:
        raise InputError(f"{path} has more than {MOST_FIELD_BYTES:,} bytes")
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InputError(f"{path} is not a JSON object")
    return body


def _check_types(path: Path, schema, chosen: Sequence[str]) -> None:
    from pyarrow import types

    for name in chosen:
        found = [field.type for field in schema if field.name == name]
        if not found:
            raise InputError(f"{path} has no column {name!r}: it has {', '.join(schema.names)}")
        if len(found) > 1:
            raise InputError(f"{path} has {len(found)} columns named {name!r}: rename one")
        kind = found[0].value_type if types.is_dictionary(found[0]) else found[0]
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
            raise InputError(
                f"{path}: column {name!r} holds bytes ({kind}), expected text: decode them first"
            )
        if not _is_text(kind) and not _is_messages(kind):
            raise InputError(f"{path}: column {name!r} holds {kind}, expected text or lists of messages")


def _is_text(kind) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    )


def _is_messages(kind) -> bool:
    """Lists of structs of which two fields are text: who speaks, and what is said."""
    from pyarrow import types

    if not (types.is_list(kind) or types.is_large_list(kind)) or not types.is_struct(kind.value_type):
        return False
    texts = {field.name for field in kind.value_type if _is_text(field.type)}
    return {"role", "content"} <= texts or {"from", "value"} <= texts


def _rows(path: Path, batches: Iterable, chosen: Sequence[str]) -> list[tuple]:
    out, held = [], 0
    for batch in batches:
        batch.validate(full=True)  # offsets are somebody else's too
        arrays = [batch.column(name) for name in chosen]
        for name, array in zip(chosen, arrays, strict=True):
            held += _text_bytes(array, path, name)
            if held > MOST_FILE_BYTES:
                raise _too_much(path, name)
        if len(out) + len(batch) > MOST_ROWS:
            raise InputError(f"{path} has more than {MOST_ROWS:,} rows: take a part of it")
        out += zip(*(array.to_pylist() for array in arrays), strict=True)
    return out


def _text_bytes(array, path: Path, name: str) -> int:
    """What its texts take as texts of their own."""
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_list(array.type) or types.is_large_list(array.type):
        return _text_bytes(array.flatten(), path, name)
    if types.is_struct(array.type):
        return sum(_text_bytes(field, path, name) for field in array.flatten())
    texts = array.dictionary if types.is_dictionary(array.type) else array
    if not _is_text(texts.type) or types.is_null(texts.type):
        return array.nbytes
    lengths = pc.binary_length(texts)
    if (pc.max(lengths).as_py() or 0) > MOST_FIELD_BYTES:
        raise _too_much(path, name)
    if texts is not array:
        lengths = lengths.take(array.indices)
    return pc.sum(lengths).as_py() or 0


def _too_much(path: Path, name: str) -> InputError:
    return InputError(f"{path}: column {name!r} has more text than prompt files are read with")


def _read(path: Path, kind: str, read: Callable):
    """What pyarrow makes of a file that is not what it says."""
    try:
        return read()
    except InputError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError, MemoryError) as error:
        raise InputError(f"{path} cannot be read as {kind}: {error}") from error
