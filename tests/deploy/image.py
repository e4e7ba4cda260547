"""deploy/Dockerfile without Docker: its instructions, carried out in a copy-on-write view of this machine.

The base image is this machine with a clean virtual environment as its Python. An overlay over / takes every write, so
that RUN lines are run as they stand (useradd included) and nothing outside changes. The mounts need root on Linux.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

BASE = "/opt/base-python"


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, arguments), continuation lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines()) if word]


def build_context(root: Path, to: Path) -> None:
    """Copy ``root`` less what .dockerignore names."""
    patterns = (root / ".dockerignore").read_text().split()

    def ignored(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == root
        return {
            name
            for name in names
            for pattern in patterns
            if (pattern.startswith("**/") and fnmatch(name, pattern[3:])) or (top and fnmatch(name, pattern))
        }

    shutil.copytree(root, to, ignore=ignored)


@dataclass
class Image:
    """What the instructions come to: the steps of the build as one shell script, and how a container starts."""

    steps: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, dockerfile: str, arguments: dict[str, str]) -> Image:
        """``arguments``: values for the Dockerfile's ARGs, as --build-arg gives them."""
        image = cls()
        for word, rest in instructions(dockerfile):
            image._add(word, rest, arguments)
        return image

    def _add(self, word: str, rest: str, arguments: dict[str, str]) -> None:
        if word == "ARG":
            name, _, default = rest.partition("=")
            self.steps.append(f"export {name}={shlex.quote(arguments.get(name, default))}")
        elif word == "ENV":
            given = dict(pair.split("=", 1) for pair in shlex.split(rest))
            self.environment |= given
            self.steps += [f"export {name}={shlex.quote(value)}" for name, value in given.items()]
        elif word == "WORKDIR":
            self.workdir = rest
            self.steps.append(f"mkdir -p {rest} && cd {rest}")
        elif word == "COPY":
            self.steps.append(copied(*shlex.split(rest)))
        elif word == "RUN":
            self.steps.append(f"( {rest} )")
        elif word == "USER":
            self.user = rest
        elif word == "ENTRYPOINT":
            self.entrypoint = re.findall(r'"([^"]*)"', rest)
        elif word not in ("FROM", "CMD"):
            raise NotImplementedError(f"{word} {rest}")


def copied(*paths: str) -> str:
    """COPY: a folder's contents go into the target, files go into it or become it."""
    *sources, target = paths
    commands = []
    for source in sources:
        into = f"{target}/" if target.endswith("/") or len(sources) > 1 else target
        commands.append(
            f"if [ -d /context/{source} ]; then mkdir -p {into} && cp -r /context/{source}/. {into}; "
            f"else mkdir -p $(dirname {into}x) && cp /context/{source} {into}; fi"
        )
    return " && ".join(commands)


class Container:
    """An image that is built in ``place`` and then runs one command. Use as a context manager.

    ``light``: packages come from the environment that the tests run in, and the machine's own compiler serves for
    apt's; else everything is downloaded as the Dockerfile says.
    """

    def __init__(self, image: Image, context: Path, place: Path, *, light: bool) -> None:
        self.image, self.context, self.place, self.light = image, context, place, light
        self.log = place / "container.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        """Build, then run the entrypoint with ``command``. ``output`` has what both say."""
        script = self.place / "script"
        script.write_text(self._script([*self.image.entrypoint, *command]))
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-eu", str(script)],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
            )  # fmt: skip

    def _script(self, command: list[str]) -> str:
        packages = sysconfig.get_path("purelib")
        seen = {
            path for leaf in (sys.executable, sys.base_exec_prefix + "/bin", packages) for path in Path(leaf).parents
        }
        overlay = tempfile.mkdtemp(prefix="image-", dir=self.place)
        build = [
            # the base image
            f"{sys.executable} -m venv {'--without-pip' if self.light else ''} {BASE}",
            *self._light_base(packages),
            f"export PATH={BASE}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            f"chmod a+rx {' '.join(sorted(map(str, seen)))}",  # seen by the image's user, who is not root
            *self.image.steps,
        ]
        environment = {"HOME": "/home/headrace", **self.image.environment}
        serve = [
            f"cd {self.image.workdir}",
            *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
            f"exec setpriv --reuid {self.image.user} --regid {self.image.user} --clear-groups {shlex.join(command)}",
        ]
        inner = "set -eu\n" + "\n".join([*build, "echo BUILT", *serve]) + "\n"
        (self.context / ".inner").write_text(inner)
        return "\n".join(
            [
                f"mount -t tmpfs tmpfs {overlay} && cd {overlay} && mkdir upper work merged",
                "mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work merged",
                f"mkdir -p merged/context merged{packages} && mount --bind {self.context} merged/context",
                f"mount --bind {packages} merged{packages} && mount -o remount,bind,ro merged{packages}",
                "mount -t tmpfs tmpfs merged/tmp && chmod 1777 merged/tmp",
                "mount --rbind /dev merged/dev && mount -t proc proc merged/proc",
                "exec chroot merged sh /context/.inner",
            ]
        )

    def _light_base(self, packages: str) -> list[str]:
        if not self.light:
            return []
        return [
            f"for f in {BASE}/lib/python*/site-packages; do echo {packages} > $f/base.pth; done",
            f"printf '#!/bin/sh\\nexec {BASE}/bin/python -m pip \"$@\"\\n' > {BASE}/bin/pip",
            f"printf '#!/bin/sh\\nexec true\\n' > {BASE}/bin/apt-get",
            f"chmod a+rx {BASE}/bin/pip {BASE}/bin/apt-get",
            # pip reads NO_BUILD_ISOLATION the other way round: 0 is "no isolation"
            "export PIP_NO_DEPS=1 PIP_NO_BUILD_ISOLATION=0 PIP_NO_INDEX=1 CXXFLAGS=-O1",
        ]

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            if self.running():
                os.killpg(self._process.pid, signal.SIGKILL)  # of unshare, which ends all that it holds
            self._process.wait()
