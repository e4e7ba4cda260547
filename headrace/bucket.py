"""A model in a bucket of Google Cloud Storage (``gs://BUCKET/FOLDER``): copied into the cache once, and again where an
object has changed. Vertex AI names its models so. Who may read is what the library finds: the service account of the
machine, or GOOGLE_APPLICATION_CREDENTIALS.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from headrace.serve.progress import Progress
from protocol.errors import StartError

SCHEME = "gs://"
MISSING = "--model {}: models in a bucket need the package google-cloud-storage: pip install 'headrace[gcs]'"


def fetched(uri: str, cache: Path, report: Progress) -> Path:
    """The folder with the copies of all objects below ``uri``. StartError says what is missing."""
    bucket, _, folder = uri.removeprefix(SCHEME).strip("/").partition("/")
    place = cache / "gcs" / hashlib.sha256(uri.strip("/").encode()).hexdigest()[:32]
    try:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
    except ImportError:
        raise StartError(MISSING.format(uri)) from None
    try:
        client = storage.Client.create_anonymous_client() if "STORAGE_EMULATOR_HOST" in os.environ else storage.Client()
        prefix = f"{folder}/" if folder else ""
        objects = [blob for blob in client.list_blobs(bucket, prefix=prefix) if not blob.name.endswith("/")]
        whole, done = sum(blob.size for blob in objects) or 1, 0
        for blob in objects:
            _copy(blob, place, blob.name.removeprefix(prefix))
            done += blob.size
            report("download", done / whole)
    except (GoogleAPIError, GoogleAuthError, OSError) as error:
        raise StartError(f"--model {uri}: it cannot be copied: {error}") from None
    if not objects:
        raise StartError(f"--model {uri}: there is nothing under this name")
    return place


def _copy(blob: Any, place: Path, name: str) -> None:
    """One object, whole or not at all; nothing where this generation of it was copied before."""
    to = place / name
    if not to.resolve().is_relative_to(place.resolve()):
        raise OSError(f"{name} would lie outside of the model's folder")
    mark, generation = to.with_name(f".{to.name}.generation"), str(blob.generation)  # a download may forget it
    if to.is_file() and mark.is_file() and mark.read_text() == generation:
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.part")
    blob.download_to_filename(str(part))
    part.replace(to)
    mark.write_text(generation)
