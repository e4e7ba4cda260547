"""What hosting services tell a container in its environment, as defaults of our options (--contract)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace.bucket import SCHEME
from headrace.model import nested
from protocol.errors import StartError

ANYWHERE = "0.0.0.0"  # the service's proxy comes from outside the container, and has checked who calls


def defaults(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of our options that the contract of this command line implies; {} without one. StartError."""
    name = _named(argv, environ)
    if name == "sagemaker":
        port, model = environ.get("SAGEMAKER_BIND_TO_PORT", "8080"), _folder("/opt/ml/model")
    elif name == "vertex":
        port, model = environ.get("AIP_HTTP_PORT", "8080"), _stored(environ.get("AIP_STORAGE_URI", ""), argv, environ)
    elif name == "azureml":
        port, model = environ.get("AZUREML_SERVING_PORT", "5001"), _folder(environ.get("AZUREML_MODEL_DIR", ""))
    else:
        return {}
    found = {"HEADRACE_HOST": ANYWHERE, "HEADRACE_PORT": port}
    return {**found, "HEADRACE_MODEL": model} if model else found


def _named(argv: Sequence[str], environ: Mapping[str, str]) -> str | None:
    if not argv or argv[0] not in ("serve", "gateway"):
        return None
    for at, word in enumerate(argv):
        if word == "--contract" and at + 1 < len(argv):
            return argv[at + 1]
        if word.startswith("--contract="):
            return word.partition("=")[2]
    return environ.get("HEADRACE_CONTRACT")


def _folder(given: str) -> str | None:
    folder = Path(given)
    return nested(folder) if given and folder.is_dir() else None


def _stored(uri: str, argv: Sequence[str], environ: Mapping[str, str]) -> str | None:
    named = "HEADRACE_MODEL" in environ or any(word == "--model" or word.startswith("--model=") for word in argv)
    if not uri or named or argv[0] == "gateway":
        return None
    if uri.startswith(SCHEME):
        return uri  # it is copied when the start needs it
    if "://" in uri:
        raise StartError(
            f"AIP_STORAGE_URI: models are copied from {SCHEME} alone; put the model into the image, or mount it, "
            "and name its folder by --model or HEADRACE_MODEL"
        )
    return _folder(uri)
