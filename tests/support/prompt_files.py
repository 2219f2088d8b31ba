"""Prompt files in every format that has columns."""

import csv
import json
from pathlib import Path

import pandas as pd

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def write(path: Path, header, rows) -> Path:
    """A table in the format of the path's suffix."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
        return path
    objects = [dict(zip(header, row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        pd.DataFrame(objects).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(objects, indent=1), "utf-8")
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in objects), "utf-8")
    return path
