"""``headrace submit``: one prompt, or a file of jobs with a bounded number in progress.

The results file is written as jobs end, in that order, each line with its job's id. It is also the state of a run:
if the run is started again, jobs in the file are skipped, and jobs in progress are joined by id, not run twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from headrace.clients.queue import AsyncClient
from protocol.errors import InvalidRequest, RequestError, StartError, Unavailable
from protocol.messages import Job

SERVED_S = 4.0  # how long a leader and a worker may take to show that they live
SAMPLING = ("max_tokens", "temperature", "seed")  # options that fill in what a job leaves open


def run(values: Mapping[str, Any]) -> int:
    """The command. Returns 1 if anything failed."""
    if (values["prompt"] is None) == (values["file"] is None):
        raise StartError("give either --prompt or --file")
    if values["file"] is not None and values["out"] is None:
        raise StartError("--file needs --out, where the results go")
    return asyncio.run(_run(values))


async def _run(values: Mapping[str, Any]) -> int:
    try:
        async with AsyncClient(values["redis_url"], values["model"], tenant=values["tenant"]) as client:
            if not values["wait"] and not await client.is_served(SERVED_S):
                raise StartError(f"nobody serves {client.model} now: nothing was sent (--wait lets jobs wait for it)")
            if values["file"] is not None:
                return await FileRun(client, values).run()
            return await _one(client, values)
    except Unavailable as error:
        raise StartError(f"--redis-url: {error}") from None


async def _one(client: AsyncClient, values: Mapping[str, Any]) -> int:
    """One prompt: the request id with nothing else asked, the text as it comes with --follow, else the whole text."""
    text = sys.stdin.read() if values["prompt"] == "-" else values["prompt"]
    job = job_of({"messages": [{"role": "user", "content": text}]} if values["chat"] else {"prompt": text}, values)
    request = await client.submit_job(job)
    print(f"request {request}", file=sys.stderr)
    async for piece in client.stream(request):
        if piece.error is not None:
            print(f"headrace submit: {piece.error}", file=sys.stderr)
            return 1
        if values["follow"]:
            print(piece.text, end="", flush=True)
        else:
            print(piece.text, end="")
    print()
    return 0


def job_of(line: dict[str, Any], values: Mapping[str, Any]) -> Job:
    """A Job from a map as producers write it. Raises InvalidRequest."""
    sampling = {name: values[name] for name in SAMPLING if values[name] is not None}
    given = {"tenant": values["tenant"], "priority": values["priority"], **line}
    try:
        given["sampling"] = sampling | dict(line.get("sampling") or {})
        return msgspec.convert(given, Job, strict=True)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise InvalidRequest(str(error)) from None


class FileRun:
    """One run over a file of jobs."""

    def __init__(self, client: AsyncClient, values: Mapping[str, Any]) -> None:
        self.client = client
        self.values = values
        self.source, self.target = Path(values["file"]), Path(values["out"])
        self.failed = 0

    async def run(self) -> int:
        try:
            lines = [line for line in self.source.read_text().splitlines() if line.strip()]
            done = self._done_before()
            out = self.target.open("a")
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"--file and --out: {error}") from None
        jobs = {name_of(line, place): line for place, line in enumerate(lines)}
        if len(jobs) < len(lines):
            raise StartError(f"{self.source}: two jobs have the same id")
        if before := len(jobs.keys() & done):
            print(f"{before} of {len(jobs)} jobs are in {self.target} already", file=sys.stderr)
        waiting = iter([(name, line) for name, line in jobs.items() if name not in done])
        with out, FileProgress(len(jobs), len(jobs.keys() & done)) as progress:

            async def user() -> None:
                for name, line in waiting:
                    self._write(out, await self._run_line(name, line))
                    progress.advance()

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.values["window"], len(jobs))):
                    group.create_task(user())
        print(f"{len(jobs)} jobs, {self.failed} failed; results in {self.target}", file=sys.stderr)
        return 1 if self.failed else 0

    def _done_before(self) -> set[str]:
        """Ids that the results file holds with a real end. An incomplete last line (the run was killed) is removed."""
        done: set[str] = set()
        if not self.target.exists():
            return done
        kept = []
        for line in self.target.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if not entry.get("error"):
                    done.add(entry["id"])
                    kept.append(line)
        fresh = self.target.with_name(self.target.name + ".new")
        fresh.write_text("".join(line + "\n" for line in kept))
        fresh.replace(self.target)
        return done

    async def _run_line(self, name: str, line: str) -> dict[str, Any]:
        """The results line of one job; what is wrong with it stands there too."""
        try:
            job = msgspec.structs.replace(job_of(_parse(line), self.values), id=name)
            request = await self.client.submit_when_possible(job)
            result = await self.client.result(request)
        except RequestError as error:
            self.failed += 1
            return {"id": name, "error": {"code": error.wire_code, "message": error.message, "param": error.param}}
        entry: dict[str, Any] = {"id": name, "request_id": request, "choices": []}
        for choice in result.choices:
            told = {"text": choice.text, "finish_reason": choice.finish_reason, "tokens": len(choice.token_ids)}
            read = {name: getattr(choice, name) for name in ("content", "reasoning_content", "tool_calls")}
            entry["choices"].append(told | {name: value for name, value in read.items() if value is not None})
            if choice.error is not None:
                entry["error"] = {"message": str(choice.error)}
        self.failed += "error" in entry
        return entry

    @staticmethod
    def _write(out: IO[str], entry: dict[str, Any]) -> None:
        out.write(json.dumps(entry, ensure_ascii=False) + "\n")
        out.flush()


def name_of(line: str, place: int) -> str:
    """The id of a job: its own, else one made of its place and content, the same in every run."""
    with contextlib.suppress(RequestError):
        if isinstance(given := _parse(line).get("id"), str):
            return given
    return f"line-{place + 1}-{hashlib.sha256(line.encode()).hexdigest()[:16]}"


def _parse(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest("this line is no JSON object")
    return value


class FileProgress:
    """A bar on a terminal, else a line for each tenth, on stderr."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def __enter__(self) -> FileProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.done)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self) -> None:
        self.done += 1
        if self.bar:
            self.bar.advance(self.task)
        elif self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            print(f"{self.done}/{self.total} jobs", file=sys.stderr, flush=True)
