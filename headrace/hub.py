"""Hub ids: whether the hub can be asked at all, before libraries try and warn for half a minute.

A repository that is in the local cache is served without the hub. What is in no cache, while no network is there, is
told in one sentence.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

from headrace.model_check import check_config
from protocol.errors import StartError

REACH_S = 3.0  # how long a name and a connection may take
OFFLINE = "HF_HUB_OFFLINE"
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def check_hub(model: str, max_model_len: int | None = None) -> None:
    """StartError unless the config of ``model`` is in the cache or can be had. Where the hub is out of reach and the
    model is cached, HF_HUB_OFFLINE is set for this process and its children: nothing asks in vain."""
    cached = _cached(model)
    reason = None if os.environ.get(OFFLINE) else _unreachable()
    if cached is None and (os.environ.get(OFFLINE) or reason):
        raise StartError(
            f"--model {model}: no such directory, nor is it in the hub's cache, and the hub cannot be asked "
            f"({reason or OFFLINE + ' is set'}); name a local directory, or mend the network"
        )
    if reason:
        os.environ[OFFLINE] = "1"
    check_config(cached or _fetched(model), max_model_len)


def _cached(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json")
    except ValueError:  # no hub id
        raise StartError(f"--model {model}: no such directory, and no hub id (owner/name)") from None
    return Path(found) if isinstance(found, str) else None


def _fetched(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as Unknown

    try:
        return Path(hf_hub_download(model, "config.json", etag_timeout=REACH_S))
    except GatedRepoError:
        reason = "its authors ask for an agreement: accept it on the hub and set HF_TOKEN"
    except Unknown:
        reason = "the hub has no such model, or it is private and HF_TOKEN is not set"
    except LocalEntryNotFoundError:
        reason = "the hub does not answer"
    except EntryNotFoundError:
        reason = "this repository has no config.json, so it is no transformers model"
    except Exception as error:  # of its HTTP client, of the file system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    raise StartError(f"--model {model}: cannot be fetched from the hub: {reason}")


def _unreachable() -> str | None:
    """Why the hub cannot be connected to within REACH_S; None if it can, or if a proxy is between."""
    if any(os.environ.get(name) for name in PROXIES):
        return None
    place = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host = place.hostname or "huggingface.co"
    reason = f"{host} does not answer within {REACH_S:g} s"

    def reach() -> None:
        nonlocal reason
        try:
            socket.create_connection((host, place.port or (80 if place.scheme == "http" else 443)), REACH_S).close()
            reason = ""
        except OSError as error:
            reason = f"{host}: {error.strerror or error}"

    asking = threading.Thread(target=reach, daemon=True)  # looking up a name has no timeout of its own
    asking.start()
    asking.join(REACH_S)
    return reason or None
