"""The four workloads by which everything is measured. Seeded, greedy, no end before the length asked for.

w1 is one reader alone, w2 a full machine, w3 arrivals at a steady rate, w4 many who share a prompt's beginning.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.clients.workload import Workload

WORKLOADS = {
    "w1": Workload(requests=1, prompt_len=(128, 128), output_len=(128, 128), seed=1),
    "w2": Workload(requests=64, prompt_len=(32, 256), output_len=(16, 256), seed=2),
    "w3": Workload(requests=60, prompt_len=(32, 256), output_len=(16, 256), rate=1.0, seed=3),
    "w4": Workload(requests=32, prompt_len=(16, 64), output_len=(32, 32), shared_prefix=512, seed=4),
}
WORDS = {
    "w1": "one stream, prompt 128, output 128",
    "w2": "64 requests at once, prompts 32-256, outputs 16-256",
    "w3": "60 Poisson arrivals, 1 a second, lengths as w2",
    "w4": "32 requests at once, a common prefix of 512 tokens, tails 16-64, output 32",
}
BODY = {"temperature": 0.0, "ignore_eos": True}


def workload(name: str, round_: int = 0, quick: bool = False, rate: float | None = None) -> Workload:
    """A workload by name. Every round has a seed of its own, so that no prefix cache knows it from the last one, and
    the same seeds on every side. ``quick``: an eighth of the requests, to see whether all runs."""
    found = WORKLOADS[name]
    found = replace(found, seed=found.seed + 100 * round_, rate=rate or found.rate)
    if quick:
        high = min(32, found.output_len[1])
        found = replace(found, requests=-(-found.requests // 8), output_len=(min(16, high), high))
    return found
