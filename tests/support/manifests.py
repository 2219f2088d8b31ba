"""Run folders that are changed as somebody would change them who wants them to be read."""

import hashlib
import json

from shipsfast.runs.manifest import as_text


def edit(run, change=lambda manifest: None) -> None:
    """Change run.json, and make the checksums right again: they keep accidents out, not people."""
    manifest = json.loads((run / "run.json").read_text())
    change(manifest)
    for entry in manifest["parts"]:
        content = (run / entry["file"]).read_bytes()
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (run / "run.json").write_text(as_text(manifest))
