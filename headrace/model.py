"""What ``--model`` means: which directory or hub id the roles load, and under which name it is served."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace import bucket, default_model, gguf, hub
from headrace.model_check import check_model
from headrace.options import demo_model, served_name
from headrace.serve.progress import Progress
from protocol.errors import StartError


@dataclass(frozen=True)
class Chosen:
    """``path`` is what the roles load, ``name`` what clients call it, ``origin`` where it is from, for a person."""

    path: str
    name: str
    origin: str = ""

    @property
    def options(self) -> dict[str, str]:
        """As the roles take it."""
        return {"model": self.path, "served_model_name": self.name}

    def __str__(self) -> str:
        return f"{self.name}  ({self.origin})" if self.origin else self.name


def choose(values: Mapping[str, Any], report: Progress, tell: Callable[[str], None]) -> Chosen:
    """The model that these options name, fetched and converted if need be; without ``--model`` the small chat model,
    else the demo model of the tree. ``tell`` gets a line before a long wait. StartError says what cannot be used."""
    cache = cache_dir(values["cache_dir"])
    chosen = _named(str(values["model"]), cache, report) if values["model"] else _default(cache, report, tell)
    check(chosen.path, values)
    name = values["served_model_name"] or chosen.name
    return Chosen(chosen.path, name, chosen.origin)


def check(model: str, values: Mapping[str, Any]) -> None:
    """StartError for a model of which a look at its files tells that these options cannot serve it."""
    weights = values.get("engine") == "torch"  # only serve and a worker have one
    max_model_len = values.get("max_model_len") if weights else None  # a simulated engine has no positions
    check_model(model, weights=weights, max_model_len=max_model_len)
    if values.get("engine") != "simulated" and not Path(model).expanduser().exists():
        hub.check_hub(model, max_model_len)


def cache_dir(wanted: str | None) -> Path:
    """Where models that were fetched or converted here are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(wanted or f"{base}/headrace").expanduser().absolute()


def nested(folder: Path) -> str | None:
    """The folder itself, or the one folder or GGUF file in it that holds the model, as registries nest them."""
    found = [path.parent for path in folder.rglob("config.json")] + list(folder.rglob("*.gguf"))
    return str(min(found, key=lambda path: (len(path.parts), path))) if found else None


def _named(model: str, cache: Path, report: Progress) -> Chosen:
    if model.startswith(bucket.SCHEME):
        copied = nested(bucket.fetched(model, cache, report))
        if copied is None:
            raise StartError(f"--model {model}: there is neither a config.json nor a .gguf file in it")
        return replace(_named(copied, cache, report), name=model.rstrip("/").rpartition("/")[2], origin=model)
    source, name = gguf.source_of(model), served_name(model)
    if source is None:
        return Chosen(model, name)
    directory = gguf.converted(source, gguf.directory_of(cache, gguf.digest(source, cache)), report)
    return Chosen(str(directory), name, f"{source.name}, converted in {directory}")


def _default(cache: Path, report: Progress, tell: Callable[[str], None]) -> Chosen:
    try:
        directory = default_model.directory(cache, report, tell)
    except default_model.NotFetched as reason:
        demo = demo_model()
        if demo is None:
            raise StartError(
                f"no model: {reason}, and the demo model is not here; pass --model with a local directory, "
                "a .gguf file or a hub id"
            ) from None
        return Chosen(str(demo), demo.name, f"{reason}, so the model in the tree, which writes nonsense")
    return Chosen(str(directory), default_model.NAME, default_model.ORIGIN)
