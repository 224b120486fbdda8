"""Whether the hub can be reached, told in seconds: its libraries try for half a minute, and say so in a dozen lines."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request

LOOK = 4.0
"""Seconds that an answer may take."""
_YES = ("1", "ON", "YES", "TRUE")


def reachable() -> bool:
    """Whether the hub (HF_ENDPOINT) answers at all, be it with an error; False under HF_HUB_OFFLINE."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _YES:
        return False
    answers: list[bool] = []
    # A thread: no time is set to looking up a name.
    asking = threading.Thread(target=lambda: answers.append(_answers(endpoint())), name="hub", daemon=True)
    asking.start()
    asking.join(LOOK)
    return answers == [True]


def endpoint() -> str:
    """The address of the hub."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def fetch(repository: str, name: str) -> str:
    """Where a file of a repository of models lies on this machine, once it is fetched; the last copy, where the hub
    cannot be reached. Raises what the hub's library does; ValueError if there is no copy."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from huggingface_hub import hf_hub_download

    there = reachable()
    try:
        return hf_hub_download(repository, name, local_files_only=not there)
    except Exception:
        if there:
            raise
        raise ValueError(unreachable()) from None


def unreachable() -> str:
    """Why nothing was fetched."""
    return f"{endpoint()} does not answer, and no copy is kept here"


def is_kept(repository: str, name: str) -> bool:
    """Whether a copy of a file lies on this machine."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, name), str)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=LOOK).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return type(error.reason).__module__ == "ssl"  # the libraries may know its certificate
    except (OSError, ValueError):
        return False
    return True
