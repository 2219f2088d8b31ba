"""Can the hub be reached? Asked once before it is used: transformers tries for most of a minute, and then says less.

What needs a file of the hub passes on `how_to_ask()`: with a hub that answers nothing changes, without one only the cache
is looked at.
"""

from __future__ import annotations

import os

from ..errors import InputError

PATIENCE_S = 4.0  # for the first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise


def how_to_ask() -> dict:
    """What from_pretrained and cached_file take, so that they do not wait for a hub that is not there."""
    return {"local_files_only": True} if offline() or unreachable() else {}


def offline() -> bool:
    """Was it asked for: HF_HUB_OFFLINE, or TRANSFORMERS_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def unreachable() -> str | None:
    """Why the hub cannot be reached, None if it answers, whatever it says."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    patience = PATIENCE_S
    if os.environ.get("HF_HUB_ETAG_TIMEOUT"):
        patience = float(constants.HF_HUB_ETAG_TIMEOUT)
    try:
        get_session().head(constants.ENDPOINT, timeout=patience)
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
        return f"{constants.ENDPOINT} cannot be reached ({_cause(error)})"
    return None


def check_reachable(name: str, wanted: str) -> None:
    """Raises InputError, with the cause, if something that only the hub has cannot be had. wanted: such as "a data set"."""
    if offline():
        raise InputError(f"{wanted} {name} would come from the hub, and HF_HUB_OFFLINE is set: give a path, or unset it")
    why = unreachable()
    if why:
        raise InputError(f"{wanted} {name} would come from the hub: {why}; give a path, or try again with a network")


def _cause(error: BaseException) -> str:
    """The innermost reason in one line: the outer ones say that a connection failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return text or type(error).__name__
