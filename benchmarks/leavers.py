"""What clients cost that leave: limits that are evaded by leaving, and memory that a grace holds.

    python -m benchmarks.leavers --json leavers.json
    python -m benchmarks.leavers --tree ../headrace-before      # another checkout, with its kernels built

*evasion*: a key of 1 request at once and 1,000 tokens a minute asks for 12 long answers, detached, and leaves each as
soon as the head of the answer is there; later it reads what was generated (`GET /v1/requests/{id}` is free). Told: how
many were accepted, how many ran at once at most, how many tokens they had in how many seconds.

*grace*: three times 100 requests of a megabyte, each of which asks to continue for a day without its client, and is
left at once. Told: memory of the gateway after each hundred, once all of these requests have ended. Before them come
twice 100 without a grace: what the allocator keeps of a hundred bodies at once is no matter of the grace.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import socket
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.stack import Stack, end_on_sigterm

DEMO_MODEL = Path(__file__).parent.parent / "examples" / "demo-model"
MODEL = "left"
KEYS: dict[str, dict[str, Any]] = {
    "limited-key": {"tenant": "limited", "concurrent": 1, "tokens_per_minute": 1000},
    "free-key": {"tenant": "free"},
}
TRIES, TOKENS, PATIENCE_S = 12, 1500, 300.0
GRACES = ("0", "0", "86400", "86400", "86400")  # seconds, of one hundred after the other
GRACE_REQUESTS, GRACE_BYTES = 100, 1_000_000
ENDED_S = 10.0  # after the last of a hundred was left: they are cancelled, or have run to their end


def get(stack: Stack, path: str, key: str) -> Any:
    request = urllib.request.Request(stack.url + path, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())


def post_and_leave(stack: Stack, path: str, key: str, body: dict[str, Any], header: str, wait: bool) -> str | None:
    """The request id, if the head of an answer was waited for and it was a 200."""
    packed = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", stack.port)) as link:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n{header}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(packed)}\r\n\r\n"
        link.sendall(head.encode() + packed)
        if not wait:
            return None
        reply = http.client.HTTPResponse(link)
        reply.begin()
        return reply.getheader("X-Request-Id") if reply.status == 200 else None


# ------------------------------------------------------------------ limits


def evasion(stack: Stack) -> dict[str, Any]:
    body = {
        "model": MODEL, "prompt": "def add(a, b):", "max_tokens": TOKENS, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    began, rids, refused = time.monotonic(), [], 0
    while len(rids) + refused < TRIES:
        rid = post_and_leave(stack, "/v1/completions", "limited-key", body, "X-Headrace-Detached: true", True)
        rids += [rid] if rid else []
        refused += rid is None
    at_once, tokens, running = 0, 0, set(rids)
    while running and time.monotonic() - began < PATIENCE_S:
        told = {rid: get(stack, f"/v1/requests/{rid}", "limited-key") for rid in running}
        ended = {rid for rid, it in told.items() if it["status"] not in ("queued", "running")}
        at_once = max(at_once, len(running) - len(ended))
        tokens += sum(told[rid]["response"]["usage"]["completion_tokens"] for rid in ended)
        running -= ended
        time.sleep(0.25)
    seconds = round(time.monotonic() - began, 1)
    return {"tried": TRIES, "accepted": len(rids), "at_once": at_once, "tokens": tokens, "seconds": seconds}


# ------------------------------------------------------------------ memory


def grace(stack: Stack) -> dict[str, Any]:
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "ignore_eos": True,
        "chat_template_kwargs": {"a": "x" * GRACE_BYTES}, "stream": True,
    }  # fmt: skip
    held = []
    for seconds in GRACES:
        for _ in range(GRACE_REQUESTS):
            post_and_leave(stack, "/v1/chat/completions", "free-key", body, f"X-Headrace-Resume: {seconds}", False)
        settled(stack)
        held.append((seconds, gateway_mib(stack)))
    return {"requests_each": GRACE_REQUESTS, "bytes": GRACE_BYTES, "grace_s_and_gateway_mib": held}


def gateway_mib(stack: Stack) -> float:
    """Resident memory of the gateway; the median of some looks, for a collection may be under way."""
    looks = []
    for _ in range(5):
        looks.append(stack.resident()["gateway"] / (1 << 20))
        time.sleep(0.2)
    return round(statistics.median(looks), 1)


def settled(stack: Stack) -> None:
    """Wait until a request of the same tenant is answered (what was sent before is through), then a while."""
    deadline = time.monotonic() + 300
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1}).encode()
    headers = {"Authorization": "Bearer free-key", "Content-Type": "application/json"}
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(urllib.request.Request(stack.url + "/v1/completions", body, headers), timeout=300)
            break
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    time.sleep(ENDED_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, help="a checkout whose code serves (default: this one)")
    parser.add_argument("--only", choices=("evasion", "grace"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    end_on_sigterm()
    told: dict[str, Any] = {"tree": str(args.tree or "this one"), "cpus": os.cpu_count()}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as keys:
        json.dump(
            [{"sha256": hashlib.sha256(key.encode()).hexdigest(), **fields} for key, fields in KEYS.items()], keys
        )
        keys.flush()
        options = ("--model", str(DEMO_MODEL), "--served-model-name", MODEL, "--api-keys-file", keys.name)
        with Stack(*options, tree=args.tree and args.tree.resolve()) as stack:
            for name, measure in (("evasion", evasion), ("grace", grace)):
                if args.only in (None, name):
                    told[name] = measure(stack)
                    print(name, json.dumps(told[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
