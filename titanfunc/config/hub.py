"""Whether the hub can be reached, told in seconds: its libraries try for half a minute, and say so in a dozen lines."""

from __future__ import annotations

import functools
import http.client
import os
import threading
import urllib.error
import urllib.request

LOOK = 2.0
"""Seconds that an answer may take."""
_YES = ("1", "ON", "YES", "TRUE")


def reachable() -> bool:
    """Whether the hub (HF_ENDPOINT) answers at all, be it with an error, when a process first asks; False under
    HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() not in _YES and _answers_in_time(endpoint())


def endpoint() -> str:
    """The address of the hub."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def fetch(repository: str, name: str) -> str:
    """Where a file of a repository of models lies on this machine, once it is fetched; the last copy, where the hub
    cannot be reached. Raises what the hub's library does; ValueError if there is no copy."""
    if reachable():
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, name)
    copy = _copy(repository, name)  # hf_hub_download asks the hub for agents known to it, even for local files alone
    if copy is None:
        raise ValueError(unreachable())
    return copy


def unreachable() -> str:
    """Why nothing was fetched."""
    return f"{endpoint()} does not answer, and no copy is kept here"


def is_kept(repository: str, name: str) -> bool:
    """Whether a copy of a file lies on this machine."""
    return _copy(repository, name) is not None


def _copy(repository: str, name: str) -> str | None:
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return found if isinstance(found, str) else None


@functools.cache
def _answers_in_time(address: str) -> bool:
    answers: list[bool] = []
    # A thread: no time is set to looking up a name.
    asking = threading.Thread(target=lambda: answers.append(_answers(address)), name="hub", daemon=True)
    asking.start()
    asking.join(LOOK)
    return answers == [True]


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=LOOK).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return type(error.reason).__module__ == "ssl"  # the libraries may know its certificate
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True
