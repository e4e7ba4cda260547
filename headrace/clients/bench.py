"""``headrace bench``: load on any OpenAI-compatible server, with latencies as its users see them.

Closed loop (--concurrency N: N users, each sends its next request when the last one has ended), open loop (--rate R:
Poisson arrivals) or a burst (neither: everything at once). Latencies of open loop and burst count from the *scheduled*
arrival, so a client or a server that falls behind shows up as latency instead of hiding it (no coordinated omission;
Gil Tene, "How NOT to Measure Latency"). Everything random comes from --seed.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.clients.workload import Request, Vocabulary, Workload
from protocol.errors import StartError

if TYPE_CHECKING:
    import aiohttp

QUANTILES = (50, 90, 99)
WARMUP_SEED = 1_000_003  # other content than any run's, so that nothing of a run is cached


def run(values: Mapping[str, Any]) -> int:
    """The command. Returns 1 if any request failed."""
    if values["concurrency"] and values["rate"]:
        raise StartError("--concurrency is a closed loop and --rate an open one: give one of them")
    report = asyncio.run(measure(values))
    print_report(report)
    if values["json"]:
        Path(values["json"]).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["failed"] else 0


# ------------------------------------------------------------------ one request


@dataclass
class Result:
    """Measured times of one request, in perf_counter seconds."""

    index: int
    prompt_tokens: int
    asked_tokens: int
    start: float  # latencies count from here: the scheduled arrival, or the send in a closed loop
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)  # arrival of each event that carries a token
    end: float = 0.0
    output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and bool(self.chunks)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """Mean seconds between output tokens; None for a single one."""
        if self.output_tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Target:
    """A server and what every body sent to it has in common."""

    url: str
    model: str
    chat: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)
    says_done: bool = True  # False: its streams end with a finish reason, and no [DONE] after it

    def payload(self, request: Request) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.chat:
            asked["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            asked["prompt"] = request.prompt
        return asked | dict(self.body)


async def send(
    session: aiohttp.ClientSession, target: Target, request: Request, start: float | None, on_token: Callable[[], None]
) -> Result:
    """Stream one request. Never raises for what the server does: that is a result."""
    now = time.perf_counter()
    result = Result(request.index, request.prompt_tokens, request.max_tokens, start=now if start is None else start)
    result.sent = now
    endpoint = f"{target.url}/v1/" + ("chat/completions" if target.chat else "completions")
    try:
        async with session.post(endpoint, json=target.payload(request)) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:200]}")
            await _read_events(response.content, result, on_token, target.says_done)
        if not result.chunks:
            raise RuntimeError("the stream ended without a token")
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
    result.end = time.perf_counter()
    return result


async def _read_events(
    content: aiohttp.StreamReader, result: Result, on_token: Callable[[], None], says_done: bool
) -> None:
    usage: dict[str, int] = {}
    async for line in content:  # server-sent events: one "data: ..." line each
        if not line.startswith(b"data:"):
            continue
        now = time.perf_counter()
        raw = line[5:].strip()
        if raw == b"[DONE]":
            break
        event = json.loads(raw)
        if "error" in event:
            raise RuntimeError(f"in the stream: {str(event['error'])[:200]}")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            result.finish_reason = choice.get("finish_reason") or result.finish_reason
            if _carries_token(choice):
                result.chunks.append(now)
                on_token()
    else:
        if says_done or result.finish_reason is None:
            raise RuntimeError("the stream broke off before its end")
    result.output_tokens = usage.get("completion_tokens") or len(result.chunks)
    result.prompt_tokens = usage.get("prompt_tokens") or result.prompt_tokens


def _carries_token(choice: dict[str, Any]) -> bool:
    """A bare role delta, or a closing event that only carries the finish reason, is no token."""
    delta = choice.get("delta") or {}
    text = choice.get("text") or delta.get("content")
    return bool(text) or not (choice.get("finish_reason") or delta.get("role"))


# ------------------------------------------------------------------ driving


async def drive(
    session: aiohttp.ClientSession,
    target: Target,
    requests: Sequence[Request],
    concurrency: int | None,
    on_token: Callable[[], None] = lambda: None,
    on_end: Callable[[Result], None] = lambda result: None,
) -> tuple[list[Result], float]:
    """Send all; returns the results in request order and the perf_counter time of the start."""
    begin = time.perf_counter()
    results: list[Result] = []

    async def one(request: Request, start: float | None) -> None:
        result = await send(session, target, request, start, on_token)
        results.append(result)
        on_end(result)

    async def user() -> None:
        for request in pending:
            await one(request, None)

    async def arrival(request: Request) -> None:
        due = begin + request.arrival
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await one(request, due)

    pending = iter(requests)
    async with asyncio.TaskGroup() as group:
        if concurrency:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(user())
        else:
            for request in requests:
                group.create_task(arrival(request))
    return sorted(results, key=lambda r: r.index), begin


async def measure(values: Mapping[str, Any]) -> dict[str, Any]:
    """Warm up, run, summarize. StartError if there is no such server."""
    import aiohttp

    headers = {"Authorization": f"Bearer {values['api_key']}"} if values["api_key"] else {}
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=values["timeout"]),
        read_bufsize=1 << 20,
        headers=headers,
    )
    async with session:
        url = values["url"].rstrip("/").removesuffix("/v1")
        card = await _model_card(session, url, values["model"])
        target = Target(url, card["id"], values["api"] == "chat", _common_body(values))
        workload = _workload(values)
        vocabulary = _vocabulary(values, card)
        if values["warmup"]:
            warm = Workload(values["warmup"], workload.prompt_len, (8, 8), seed=values["seed"] + WARMUP_SEED)
            await drive(session, target, warm.build(vocabulary), values["warmup"])
        with LiveView(values["requests"]) as view:
            requests = workload.build(vocabulary)
            results, begin = await drive(session, target, requests, values["concurrency"], view.token, view.end)
    keep = (
        "requests",
        "prompt_len",
        "output_len",
        "shared_prefix",
        "prefix_groups",
        "concurrency",
        "seed",
        "ignore_eos",
    )
    config = {"url": url, "model": target.model, "api": values["api"], "rate": values["rate"]}
    return {"config": config | {k: values[k] for k in keep}, **summarize(results, begin)}


def _workload(values: Mapping[str, Any]) -> Workload:
    names = ("requests", "prompt_len", "output_len", "shared_prefix", "prefix_groups", "seed")
    return Workload(**{name: values[name] for name in names}, rate=values["rate"] or math.inf)


def _common_body(values: Mapping[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {"temperature": values["temperature"]}
    if values["ignore_eos"]:
        body["ignore_eos"] = True
    return {**body, **values["body"]}


def _vocabulary(values: Mapping[str, Any], card: Mapping[str, Any]) -> Vocabulary:
    text = values["prompt"] == "text" or values["api"] == "chat"
    size = values["vocab_size"] or card.get("vocab_size") or 1000
    try:
        return Vocabulary(text=text, size=size, tokenizer=values["tokenizer"] and Path(values["tokenizer"]))
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
        raise StartError(f"--tokenizer {values['tokenizer']}: {error}") from None


async def _model_card(session: aiohttp.ClientSession, url: str, model: str | None) -> dict[str, Any]:
    """The entry of /v1/models to be measured: the one named, else the first."""
    import aiohttp

    try:
        async with session.get(f"{url}/v1/models") as response:
            if response.status != 200:
                raise StartError(f"{url}/v1/models answered {response.status}; pass --api-key or another --url")
            cards: list[dict[str, Any]] = (await response.json())["data"]
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        raise StartError(f"no OpenAI-compatible server at {url}: {error}") from None
    for card in cards:
        if model is None or card["id"] == model:
            return card
    served = ", ".join(c["id"] for c in cards) or "nothing"
    raise StartError(f"--model {model}: not served at {url} (which serves {served})")


# ------------------------------------------------------------------ reporting


def quantile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics (numpy's default)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread_ms(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    spread = {f"p{q}": quantile(values, q) for q in QUANTILES} | {"mean": statistics.fmean(values), "max": max(values)}
    return {name: round(value * 1e3, 3) for name, value in spread.items()}


def summarize(results: Sequence[Result], begin: float) -> dict[str, Any]:
    """Figures of one run. It ends with its last token, not when the client has closed its sockets."""
    good = [r for r in results if r.ok]
    span = max((r.chunks[-1] for r in good), default=begin) - begin
    tokens = sum(r.output_tokens for r in good)
    prompt_tokens = sum(r.prompt_tokens for r in good)
    return {
        "completed": len(good),
        "failed": len(results) - len(good),
        "errors": dict(Counter((r.error or "")[:120] for r in results if not r.ok).most_common(5)),
        "shorter_than_asked": sum(r.output_tokens < r.asked_tokens for r in good),
        "duration_s": round(span, 4),
        "prompt_tokens": prompt_tokens,
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / span, 3) if good else 0.0,
        "total_tokens_per_s": round((tokens + prompt_tokens) / span, 3) if good else 0.0,
        "requests_per_s": round(len(good) / span, 4) if good else 0.0,
        "ttft_ms": spread_ms([r.chunks[0] - r.start for r in good]),
        "itl_ms": spread_ms([gap for r in good for gap in r.gaps]),
        "tpot_ms": spread_ms([r.per_token for r in good if r.per_token is not None]),
        "e2e_ms": spread_ms([r.end - r.start for r in good]),
        # how late the client itself sent; if this is not tiny, the client is the bottleneck
        "send_lag_ms": spread_ms([r.sent - r.start for r in results]),
        "tokens_per_event": round(tokens / max(1, sum(len(r.chunks) for r in good)), 3),
    }


def print_report(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{report['config']['model']} at {report['config']['url']}", title_justify="left")
    for column in ("milliseconds", *(f"p{q}" for q in QUANTILES), "mean", "max"):
        table.add_column(column, justify="left" if column == "milliseconds" else "right")
    names = {
        "ttft_ms": "time to first token",
        "itl_ms": "between tokens",
        "tpot_ms": "per output token",
        "e2e_ms": "end to end",
        "send_lag_ms": "client's own lag",
    }
    for key, name in names.items():
        spread = report[key]
        cells = [f"{v:,.1f}" for v in spread.values()] if spread else ["-"] * 5
        table.add_row(name, *cells)
    console.print(table)
    console.print(
        f"{report['output_tokens_per_s']:,.1f} output tokens/s, {report['requests_per_s']:,.2f} requests/s: "
        f"{report['completed']} completed ({report['output_tokens']:,} tokens) in {report['duration_s']:.1f} s, "
        f"{report['failed']} failed, {report['shorter_than_asked']} shorter than asked",
        highlight=False,
        soft_wrap=True,
    )
    for error, count in report["errors"].items():
        console.print(f"  {count} x {error}", markup=False, highlight=False, soft_wrap=True)


class LiveView:
    """Progress while it runs: a bar on a terminal, else a line for each tenth, on stderr."""

    def __init__(self, requests: int) -> None:
        self.requests, self.done, self.tokens = requests, 0, 0
        self.begin = time.perf_counter()

    def __enter__(self) -> LiveView:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self.bar = Progress(*columns, console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.requests)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def token(self) -> None:
        self.tokens += 1

    def end(self, result: Result) -> None:
        self.done += 1
        rate = self.tokens / (time.perf_counter() - self.begin)
        if self.bar:
            self.bar.update(self.task, completed=self.done, description=f"{rate:,.0f} events/s")
        elif self.done * 10 // self.requests > (self.done - 1) * 10 // self.requests:
            print(f"{self.done}/{self.requests} requests, {rate:,.0f} events/s", file=sys.stderr, flush=True)
