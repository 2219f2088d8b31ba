"""Tables of a run folder, read as data: columns by name with the types they must have, in bounded memory.

Nothing in a file decides what is run: pandas' own notes in it are dropped, and no type but those of COLUMNS is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import InputError

if TYPE_CHECKING:  # the command line reads the names below before it knows whether there is a table to read
    import numpy as np
    import pandas as pd

INDEX, NUMBER, TEXT, FLAG, VECTOR = "whole numbers", "numbers", "texts", "true or false", "lists of numbers"
COLUMNS = {
    **dict.fromkeys(
        ("prompt", "token", "layer", "head", "step", "beam", "vector", "group", "num_tokens"), INDEX
    ),
    **dict.fromkeys(("kl_nats", "nll_nats", "score", "angle_deg", "value"), NUMBER),
    **dict.fromkeys(("label", "text_sha256", "text"), TEXT),
    "finished": FLAG,
    "gram": VECTOR,
}
ANSWER = ("group", "prompt", "label", "num_tokens", "finished", "text_sha256")
NLL = (
    "nll_nats"  # of an answer as well, but for runs from before it was measured; and "text", where it is kept
)


def inside(folder: Path, path: Path) -> Path:
    """`path`, if it is a plain file or folder of the run folder. Raises InputError for links, pipes and devices."""
    part = path
    while part != folder:
        if part.is_symlink():
            raise InputError(f"{part} is a link: a run folder holds its own files; copy what it points to")
        part = part.parent
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is not a plain file: delete it")
    return path


def read_table(part: Path | BinaryIO, columns: Sequence[str], *, only: bool = False) -> pd.DataFrame:
    """These columns of a Parquet file. Raises ValueError or OSError for what is not such a table; where `only` they may
    be, for one that has others, or another order, too."""
    import psutil
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        texts = [name for name in columns if COLUMNS[name] == TEXT]
        with pq.ParquetFile(part, read_dictionary=texts) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            if only and schema.names != list(columns):
                raise ValueError(
                    f"it has the columns {', '.join(schema.names)}, expected {', '.join(columns)}"
                )
            for name in columns:
                if schema.names.count(name) != 1:
                    raise ValueError(f"it has {schema.names.count(name)} columns {name!r}")
                kind = schema.field(name).type
                if not _is(kind, COLUMNS[name]):
                    raise ValueError(f"column {name!r} holds {kind}, expected {COLUMNS[name]}")
            # Metadata of column chunks is not read: pyarrow 26 ends the process over some that are damaged.
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            held, room = max(sum(groups), 8 * rows * len(columns)), psutil.virtual_memory().available // 4
            if rows < 0 or min(groups, default=0) < 0 or held > room:
                raise ValueError(f"it declares {rows:,} rows and {held:,} bytes")
            frame = _frame(file.read(columns=list(columns)), room)
    except MemoryError as error:
        raise ValueError(f"it does not fit into memory: {error}") from error
    except (pa.ArrowException, TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    for name in columns:
        if COLUMNS[name] != TEXT and frame[name].isna().any() and COLUMNS[name] != NUMBER:
            raise ValueError(f"column {name!r} has gaps")
        if (
            COLUMNS[name] == INDEX
            and len(frame)
            and not -(2**31) <= int(frame[name].min()) <= int(frame[name].max()) < 2**31
        ):
            raise ValueError(f"column {name!r} holds numbers beyond 2^31")
    return frame


def _frame(table, room: int) -> pd.DataFrame:
    """Without pandas' notes; texts as str or None, once it is known how long they all are: in the file each is kept once."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    held, columns = 0, {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if COLUMNS[name] != TEXT:
            columns[name] = column.to_pandas()
            continue
        for chunk in column.chunks:
            if pa.types.is_dictionary(chunk.type):
                held += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
        if held > room:
            raise ValueError(f"it holds {held:,} bytes of text")
        columns[name] = pd.Series(column.to_pylist(), dtype=object)
    return pd.DataFrame(columns)


def _is(kind, wanted: str) -> bool:
    from pyarrow import types

    if wanted == INDEX:
        return types.is_integer(kind)
    if wanted == NUMBER:
        return types.is_floating(kind)
    if wanted == FLAG:
        return types.is_boolean(kind)
    if wanted == TEXT:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)
    return (types.is_list(kind) or types.is_large_list(kind)) and types.is_floating(kind.value_type)


def cells(frame: pd.DataFrame, names: Sequence[str], shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The columns `names` as an index into an array of `shape`. Raises ValueError for a row outside it: Python would
    count negative numbers from the end."""
    out = []
    for name, size in zip(names, shape, strict=True):
        at = frame[name].to_numpy()
        if at.size and not (0 <= int(at.min()) and int(at.max()) < size):
            raise ValueError(f"column {name!r} counts from {at.min()} to {at.max()}, and there are {size}")
        out.append(at.astype("int64"))
    return tuple(out)
