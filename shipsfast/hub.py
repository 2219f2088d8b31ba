"""Can the hub be reached? Asked once before it is used: transformers tries for most of a minute, and then says less.

What needs a file of the hub passes on what `how_to_ask` gives: with a hub that answers nothing changes, without one only the
cache is looked at.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from .errors import InputError

PATIENCE_S = 4.0  # for the first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise
REMEMBERED_S = 60.0  # what the hub said
_last: list = [None, None]  # when it was asked, and what `unreachable` gave


def how_to_ask(name: str, file: str) -> dict:
    """What from_pretrained takes beside a repository's name, so that it does not wait for a hub that is not there.

    file: one that the repository must have.
    Raises InputError, with the cause, if the hub cannot be asked and the file was not downloaded before.
    """
    why = "HF_HUB_OFFLINE is set" if offline() else unreachable()
    if why is None:
        return {}
    if download(name, file, here=True) is None:
        raise InputError(f"there is no folder {name}, nothing of that name was downloaded before, and {why}")
    return {"local_files_only": True}


def offline() -> bool:
    """Was it asked for: HF_HUB_OFFLINE, or TRANSFORMERS_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def unreachable() -> str | None:
    """Why the hub cannot be reached, None if it answers, whatever it says."""
    when, said = _last
    if when is None or time.monotonic() - when > REMEMBERED_S:
        said = _ask()
        _last[:] = time.monotonic(), said
    return said


def _ask() -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    patience = PATIENCE_S
    if os.environ.get("HF_HUB_ETAG_TIMEOUT"):
        patience = float(constants.HF_HUB_ETAG_TIMEOUT)
    try:
        get_session().head(constants.ENDPOINT, timeout=patience)
    except Exception as error:  # noqa: BLE001 (of whichever HTTP library huggingface_hub uses)
        return f"{constants.ENDPOINT} cannot be reached ({_cause(error)})"
    return None


def download(name: str, file: str, *, here: bool = False) -> Path | None:
    """A file of a repository, None if it has none. here: only if it was downloaded before."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, local_files_only=here))
    except (OSError, ValueError):  # all of its errors: no such file or repository, no access, no valid name
        return None


def _cause(error: BaseException) -> str:
    """The innermost reason in one line: the outer ones say that a connection failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return text or type(error).__name__
