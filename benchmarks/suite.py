"""Everything that can be measured about Headrace alone, in about ten minutes: `make bench`.

    python -m benchmarks.suite                       all, and the results go into docs/performance.md
    python -m benchmarks.suite --only w2 commit      some parts, told but not written
    python -m benchmarks.suite --quick               two minutes, to see that all of it runs; the figures mean little

Workloads go over HTTP against `headrace serve` with its durable server; the bare engine loop, loaded beside it, takes
turns with it, so that both meet the same noise. Medians over rounds; noise is (highest - lowest) / median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gateway, knees, load, models, report, scheduler_core, worker_outputs
from benchmarks.bare import BareProcess
from benchmarks.report import Section, middle, spread
from benchmarks.stack import Stack, Unavailable, end_on_sigterm, settle
from benchmarks.workloads import BODY, WORDS, workload
from headrace.clients.bench import Target
from headrace.clients.workload import Vocabulary
from headrace.serve.embedded import FAST, EmbeddedServer
from headrace.serve.machine import worker_threads

MAX_MODEL_LEN = 4096
KV_GIB = 4
HTTP = ("w1", "w2", "w3", "w4")
PREFILL = "prefill"  # a long prompt beside running streams, on the same stack
ONCE = ("w3",)  # takes its time however fast the machine is
BARE = ("w1", "w2")


@dataclass
class Options:
    shape: str
    cache: Path
    rounds: int
    quick: bool
    threads: int


@dataclass
class Outcome:
    """What a part found: tables to read, and everything for the JSON file."""

    sections: list[Section] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    bounds: list[dict[str, Any]] = field(default_factory=list)

    def bound(self, what: str, found: float, least: float | None = None, most: float | None = None) -> None:
        sign, limit = (">=", least) if least is not None else ("<=", most)
        assert limit is not None
        held = found >= limit if least is not None else found <= limit
        self.bounds.append({"bound": what, "found": found, "wanted": f"{sign} {report.show(limit)}", "held": held})


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------ over HTTP, and the bare loop beside it


def over_http(asked: list[str], options: Options) -> Outcome:
    names = [name for name in asked if name in HTTP]
    path = models.checkpoint(options.shape, options.cache)
    vocabulary = Vocabulary(size=models.SHAPES[options.shape]["vocab_size"])
    env = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}  # as serve sets it
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    bare_runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names if name in BARE}
    limits = ["--max-model-len", str(MAX_MODEL_LEN)]
    threads = ["--threads", str(options.threads)]
    with (
        Stack("--model", str(path), *limits, *threads, "--kv-cache-memory", f"{KV_GIB}GiB") as stack,
        BareProcess(path, env, *limits, *threads) as bare,
    ):
        target = Target(stack.url, options.shape, body=BODY)
        load.warm_up(target, vocabulary)
        settle([bare.process.pid, *(pid for _, pid in stack.pids())])
        for round_ in range(options.rounds):
            for name in names:
                if round_ and name in ONCE:
                    continue
                runs[name].append(one_run(stack, target, vocabulary, name, round_, options.quick))
                say(f"{name} round {round_ + 1}: {runs[name][-1]['tokens_per_s']:.1f} tokens/s over HTTP")
                if name in bare_runs:
                    bare_runs[name].append(bare.run(name, round_, options.quick))
                    say(f"{name} round {round_ + 1}: {bare_runs[name][-1]['tokens_per_s']:.1f} tokens/s in a bare loop")
        beside = []
        if PREFILL in asked:
            for round_ in range(options.rounds):
                few = {"streams": 2, "output": 48, "prompt": 256} if options.quick else {}
                beside.append(load.beside_prefill(target, vocabulary, seed=1000 + 10 * round_, **few))
                say(f"prefill round {round_ + 1}: {beside[-1]['p99_ratio']} of the inter-token p99 without it")
        resident = stack.resident()
    outcome = http_outcome(runs, bare_runs, resident, options)
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    taken = round(resident["worker"] / (weights + KV_GIB * 2**30), 3)
    outcome.bound("worker's resident memory / (weights + KV pool)", taken, most=1.3)
    if beside:
        outcome.figures["prefill"] = beside
        outcome.sections.append(Section("A long prompt beside running streams: milliseconds between tokens", beside))
        outcome.bound("inter-token p99 beside a prefill / without", middle([b["p99_ratio"] for b in beside]), most=2)
    return outcome


def one_run(
    stack: Stack, target: Target, vocabulary: Vocabulary, name: str, round_: int, quick: bool
) -> dict[str, Any]:
    before = stack.use()
    found = load.figures(load.run(target, workload(name, round_, quick), vocabulary))
    if found["failed"] or found["short"]:
        raise Unavailable(f"{name}: {found['failed']} requests failed, {found['short']} short: {found['errors']}")
    return {**found, **stack.use().since(before, found["output_tokens"])}


def http_outcome(
    runs: dict[str, list[dict[str, Any]]],
    bare_runs: dict[str, list[dict[str, Any]]],
    resident: dict[str, int],
    options: Options,
) -> Outcome:
    outcome = Outcome(figures={"http": runs, "bare": bare_runs, "resident_bytes": resident})
    table = Section(f"Over HTTP, shape {options.shape}, {options.threads} worker threads")
    use = Section("What it took")
    for name, found in runs.items():
        rates = [run["tokens_per_s"] for run in found]
        table.rows.append(
            {
                "workload": name,
                "tokens/s": middle(rates),
                "noise": spread(rates),
                **{
                    f"{what} {p} ms": middle([run[f"{what}_{p}_ms"] for run in found])
                    for what in ("ttft", "itl")
                    for p in ("p50", "p99")
                },
                **{
                    head: middle([run[key] if run[key] is not None else float("nan") for run in found])
                    for head, key in (("Redis bytes/token", "redis_bytes_per_token"), ("fsyncs/s", "fsyncs_per_s"))
                },
            }
        )
        use.rows.append(
            {"workload": name}
            | {
                f"{role} us/token": middle([run["cpu_us_per_token"].get(role, float("nan")) for run in found])
                for role in ("worker", "scheduler", "gateway", "redis")
            }
            | {"log bytes/token": middle([run["redis_log_bytes_per_token"] for run in found])}
        )
    table.notes.append("; ".join(f"{name}: {WORDS[name]}" for name in runs) + ".")
    use.notes.append(
        "CPU time by role. Resident, MiB: "
        + ", ".join(f"{role} {size / 2**20:,.0f}" for role, size in resident.items())
        + " (the worker's with its KV pool)."
    )
    if runs:
        outcome.sections += [table, use]
    ratios = Section("Whole stack against the bare engine loop")
    for name, alone in bare_runs.items():
        pairs = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(runs[name], alone, strict=True)]
        ratios.rows.append(
            {
                "workload": name,
                "HTTP tokens/s": middle([run["tokens_per_s"] for run in runs[name]]),
                "bare tokens/s": middle([run["tokens_per_s"] for run in alone]),
                "ratio": middle(pairs),
                "noise": spread(pairs),
                "first token ms later": middle(
                    [a["ttft_p50_ms"] - b["ttft_ms"] for a, b in zip(runs[name], alone, strict=True)]
                )
                if name == "w1"
                else None,
                "engine's share of the bare loop": middle([run["engine_share"] for run in alone]),
            }
        )
        if name == "w2":
            outcome.bound("whole stack / bare engine loop, w2", middle(pairs), least=0.93)
    if ratios.rows:
        outcome.sections.append(ratios)
    return outcome


# ------------------------------------------------------------------ parts alone


def engine_alone(options: Options) -> Outcome:
    """In a process of its own: its memory and its threads end with it."""
    path = models.checkpoint(options.shape, options.cache)
    batches = "1,8" if options.quick else "1,8,32,64"
    command = [
        sys.executable, "-m", "benchmarks.engine", "--model", str(path), "--batches", batches, "--steps-only",
        "--json", "--rounds", "1" if options.quick else "3", "--threads", str(options.threads),
    ]  # fmt: skip
    env = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise Unavailable(f"the engine ended with {done.returncode}: {done.stderr[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    section = Section("Engine alone: one decode step, context 256")
    for rows in map(int, batches.split(",")):
        took, floor = found[f"decode_ms_{rows}"], found.get(f"floor_ms_{rows}")
        section.rows.append(
            {
                "batch": rows,
                "ms": took,
                "noise": found[f"decode_spread_{rows}"],
                "tokens/s": round(1e3 * rows / took, 1),
                "floor ms": floor,
                "percent of the floor's speed": floor and round(100 * floor / took, 1),
                "draws with top-p, ms": found[f"sampler_ms_{rows}"],
            }
        )
    section.notes.append(
        f"The floor: weights read once at {found.get('read_gb_s')} GB/s, products at "
        f"{found.get('product_gflop_s')} GFLOP/s in float32, both measured in the same process."
    )
    outcome = Outcome([section], {"engine": found})
    share = round(found[f"sampler_ms_{rows}"] / found[f"decode_ms_{rows}"], 3)
    outcome.bound(f"draws with top-p / step, {rows} rows", share, most=0.1)
    return outcome


def scheduler_alone(options: Options) -> Outcome:
    section, outcome = Section("Scheduler's core alone: one steady step"), Outcome()
    for sequences, waiting in ((1, 0), (32, 0), (256, 0), (256, 10000)):
        median, high, size = scheduler_core.measure(sequences, 200 if options.quick else 2000, waiting)
        section.rows.append(
            {
                "sequences": sequences,
                "waiting": waiting,
                "us": round(median, 1),
                "p99 us": round(high, 1),
                "plan bytes": size,
            }
        )
        if (sequences, waiting) == (256, 0):
            outcome.bound("scheduler core, us per steady step of 256", round(median, 1), most=1000)
    outcome.sections, outcome.figures = [section], {"scheduler": section.rows}
    return outcome


def commit_alone(options: Options) -> Outcome:
    section, outcome = Section("Commit alone: one worker, a server that syncs its log before it answers"), Outcome()
    for rows in (1, 64, 256):
        with worker_outputs.bench_server(durable=True) as (url, data_dir):
            steps = 20 if options.quick else 200
            found = asyncio.run(worker_outputs.measure_commits(url, rows, steps, data_dir))
        section.rows.append(found)
        if rows == 256:
            outcome.bound("commit, server us a row (256 rows)", found["script_us_per_row"], most=10)
    outcome.sections, outcome.figures = [section], {"commit": section.rows}
    return outcome


def gateway_alone(options: Options) -> Outcome:
    section, outcome = Section("Gateway alone: one process, simulated publications"), Outcome()
    for streams, rate in ((1000, 10000.0),) if options.quick else ((1000, 5000.0), (1000, 10000.0), (1000, 25000.0)):
        with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder), settings=FAST) as server:
            found = asyncio.run(gateway.measure(server.url, streams, rate, 3.0 if options.quick else 6.0))
        section.rows.append({"asked tokens/s": round(rate), **found})
        if rate == 10000.0:
            outcome.bound("one gateway, tokens/s streamed", found["tokens_per_s"], least=0.95 * rate)
            outcome.bound("one gateway, p99 age of a token, ms", found["age_p99_ms"], most=20)
    outcome.sections, outcome.figures = [section], {"gateway": section.rows}
    return outcome


def knees_alone(options: Options) -> Outcome:
    section, outcome = Section("One scheduler, N simulated workers x 256 sequences x 10 ms"), Outcome()
    found = []
    for workers in (1,) if options.quick else (1, 2, 4, 8):
        found.append(knees.measure(workers, 4.0 if options.quick else 8.0))
        say(f"{workers} simulated workers: {found[-1]['tokens_per_s']:,} tokens/s")
    hidden = ("cpu_us_per_token", "redis_log_bytes_per_token", "redis_commands_per_token", "log_share")
    section.rows = [{k: v for k, v in row.items() if k not in hidden} for row in found]
    if not options.quick:
        missing = report.plot_knees(found, report.FIGURES / "knees.svg")
        section.notes.append(missing or "![tokens per second and cores by role](performance/knees.svg)")
    best = max(found, key=lambda row: row["tokens_per_s"])
    section.notes.append(capacity_plan(best["tokens_per_core_s"]))
    outcome.bound("tokens/s through one scheduler, on this machine's cores", best["tokens_per_s"], least=100_000)
    per_core = best["tokens_per_core_s"]
    outcome.bound("tokens/s per core of the scheduler", per_core.get("scheduler", 0), least=100_000)
    outcome.sections, outcome.figures = [section], {"knees": found}
    return outcome


def capacity_plan(per_core: dict[str, int]) -> str:
    """In words: what a million streams of 10 tokens/s take, at the tokens per core and second found."""
    wanted = 10_000_000
    cores = {role: -(-wanted // per_core[role]) for role in ("scheduler", "redis") if per_core.get(role)}
    groups = max(cores.values(), default=0)
    return (
        "A million streams of 10 tokens/s each, at these rates: "
        + ", ".join(f"{count} cores of {role}" for role, count in cores.items())
        + f". Server and scheduler run on one core each, and a shard of a model lies in one slot of a cluster, so that "
        f"is {groups} shards, of one model or of many; gateways by the tokens per CPU second of their own table."
    )


PARTS: dict[str, Callable[[Options], Outcome]] = {
    "engine": engine_alone,
    "scheduler": scheduler_alone,
    "commit": commit_alone,
    "gateway": gateway_alone,
    "knees": knees_alone,
}


# ------------------------------------------------------------------ the whole


def measure(names: list[str], options: Options) -> Outcome:
    """All parts, one after the other. A part that cannot run here is named with the reason."""
    whole = Outcome()
    http = [name for name in (*HTTP, PREFILL) if name in names]
    parts: list[tuple[str, Callable[[], Outcome]]] = [("HTTP", lambda: over_http(http, options))] if http else []
    parts += [(name, lambda part=part: part(options)) for name, part in PARTS.items() if name in names]
    for name, part in parts:
        say(f"--- {name}")
        try:
            found = part()
        except Unavailable as reason:
            found = Outcome([Section(name, notes=[f"Could not run: {reason}"])], {name: {"unavailable": str(reason)}})
        whole.sections += found.sections
        whole.figures |= found.figures
        whole.bounds += found.bounds
    if whole.bounds:
        whole.sections.insert(0, Section("Bounds", whole.bounds))
        whole.figures["bounds"] = whole.bounds
    return whole


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*HTTP, PREFILL, *PARTS]
    parser.add_argument("--only", nargs="+", choices=everything, metavar="PART", help=" ".join(everything))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=models.SHAPES, default="135m")
    parser.add_argument("--threads", type=int, default=worker_threads(1), help="of the worker (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=models.default_cache(), help="for models (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the JSON goes (default: docs/performance/, or the cache)")
    parser.add_argument(
        "--write", action=argparse.BooleanOptionalAction, help="into docs/performance.md (default: all)"
    )
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    options = Options(args.shape, args.cache, rounds, args.quick, args.threads)
    write = args.write if args.write is not None else not (args.only or args.quick)
    where = report.circumstances()
    outcome = measure(args.only or everything, options)
    body = report.text(where, outcome.sections)
    print(body)
    folder = args.json or (report.FIGURES if write else options.cache / "results")
    say(f"written: {report.write_json('suite', where, outcome.figures, folder)}")
    if write:
        report.write_docs("make bench", body)
        say(f"written: {report.DOCS}")


if __name__ == "__main__":
    main()
