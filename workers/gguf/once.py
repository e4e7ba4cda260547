"""One conversion, whoever asks for it: the directory appears whole or not at all, and several processes make it once.

Nothing heavy is imported before it is known that there is something to do.
"""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from protocol.errors import StartError
from workers.engines.base import Progress


def convert_once(source: Path, directory: Path, progress: Progress) -> None:
    """Make ``directory`` from the GGUF file ``source`` unless it is there. Of several processes one converts, the
    others wait. StartError says what is wrong with the file, or that there is no room."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with (directory.parent / f".{directory.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if directory.is_dir():
                return
            unfinished = directory.parent / f".{directory.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            unfinished.mkdir()
            try:
                _convert(source, unfinished, progress)
                unfinished.rename(directory)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise StartError(f"cannot write {directory} ({error.strerror}); choose another --cache-dir") from None


def _convert(source: Path, directory: Path, progress: Progress) -> None:
    try:
        from workers.gguf.convert import convert
    except ImportError as error:
        raise StartError(
            f"{source}: reading GGUF needs packages that are not installed ({error.name or error}); "
            "install them with pip install 'headrace[gguf]'"
        ) from None
    convert(source, directory, progress)
