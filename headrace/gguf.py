"""GGUF checkpoints as the command line takes them: a file, a directory that holds one, ``owner/name:file.gguf``.

Each becomes a directory of safetensors first. That is made once, by a process of its own (``python -m workers.gguf``),
in a cache that is keyed by the file's content: a later start finds it without reading the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from headrace.serve import leash
from headrace.serve.progress import Progress, parse
from protocol.errors import EX_CONFIG, StartError

CONVERSION = 1  # counts changes of workers/gguf after which a file has to be converted anew
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):(.+\.gguf)", re.ASCII)
HUB_TIMEOUT_S = 5


def source_of(model: str) -> Path | None:
    """The GGUF file that ``model`` names; None if it is no GGUF checkpoint. A file on the hub is fetched."""
    path = Path(model).expanduser()
    if is_gguf(path):
        return path
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            shown = ", ".join(file.name for file in files[:4])
            raise StartError(f"--model {model}: this directory holds several GGUF files ({shown}); name one of them")
        return files[0] if files else None
    on_hub = None if path.exists() else HUB_FILE.fullmatch(model)
    return _from_hub(*on_hub.groups()) if on_hub else None


def is_gguf(path: Path) -> bool:
    """A file that is called so, or begins so."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.is_file()
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def directory_of(cache: Path, sha256: str) -> Path:
    """Where the GGUF file of this hash is found once it is converted."""
    return cache / "models" / f"gguf-{sha256[:24]}-{CONVERSION}"


def converted(source: Path, directory: Path, report: Progress) -> Path:
    """``directory``, made from ``source`` if it is not there yet. StartError with the converter's own sentence."""
    if directory.is_dir():
        return directory
    argv = [sys.executable, "-m", "workers.gguf", str(source), str(directory)]
    command = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *argv]
    report("convert", 0.0)  # importing torch takes seconds
    said = ""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                told = parse(line)
                if told is not None:
                    report(*told)
                else:
                    said = line.strip() or said
        except BaseException:
            process.kill()
            raise
    if process.returncode == EX_CONFIG:
        raise StartError(said)
    if process.returncode:
        raise StartError(f"{source}: converting it ended with code {process.returncode}: {said[:200]}")
    return directory


def digest(path: Path, cache: Path) -> str:
    """sha256 of the file, remembered by its place, size and time of change. StartError if it cannot be read."""
    try:
        real, stat = path.resolve(), path.stat()
        stamp = [str(real), stat.st_size, stat.st_mtime_ns]
        note = cache / "models" / ".digests" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:24]}.json"
        remembered = _read_note(note)
        if remembered is not None and remembered[:3] == stamp:
            return str(remembered[3])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps([*stamp, found]))
        unfinished.rename(note)
    except OSError as error:
        raise StartError(f"{error.filename or path}: {error.strerror}; --cache-dir chooses another cache") from None
    return found


def _read_note(note: Path) -> list[object] | None:
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and len(found) == 4 else None


def _from_hub(repository: str, file: str) -> Path:
    """A file of a hub repository, from huggingface_hub's cache or fetched into it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, etag_timeout=HUB_TIMEOUT_S))
    except Exception as error:  # the library's own, those of its HTTP client, of the file system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StartError(f"--model {repository}:{file}: cannot be fetched from the hub: {reason[:200]}") from None
