"""Headrace on a GPU, in three commands on a machine with torch and transformers, each row or part with its own time:

    python -m benchmarks.gpu --must      what must hold, row by row, in 7 minutes: held, missed or not reached
    python -m benchmarks.gpu --tests     the tests that a GPU makes worth running, and memcheck of the kernels
    python -m benchmarks.gpu --peers     the same load for transformers' continuous batching and the bare loop

`--parts NAME...` runs any parts, those in no command among them (open loop, long context, starts). `--tiny` runs the
same with small shapes on any machine, to see that the script itself works: its figures mean nothing.

A machine without a network is given the other packages as wheels, fetched elsewhere: `--carry FOLDER` there, `--wheels
FOLDER` here. Results are in --out: gpu.txt and gpu.json are written after each part, gpu.log has what the parts said.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_rows, gpu_wheels

COMMANDS: dict[str, dict[str, float]] = {  # part -> seconds that it may take
    "must": {part: gpu_rows.part_seconds(part) for part in gpu_rows.START_S},
    "tests": {"parity": 100, "tests": 240, "memcheck": 240},
    "peers": {"loop-8b": 80, "transformers-8b": 130, "loop-500m": 60, "transformers-500m": 100},
}
MORE = {
    "machine": 60,
    "plain-8b": 90,
    "open-8b": 200,
    "long-8b": 160,
    "starts-8b": 160,
    "starts-500m": 120,
    "profile-8b": 60,
    "offload-8b": 90,
    "products": 120,
}
SECONDS = {name: seconds for parts in (*COMMANDS.values(), MORE) for name, seconds in parts.items()}
MINUTES = {"must": 7.0, "tests": 8.0, "peers": 7.0, "parts": 8.0}
LOG_LINES = 400  # of each part
LEAST_S = 10  # a part is not begun with less
END_S = 20  # for a part that is told to end
TINY_S = 600.0  # for all parts of a rehearsal, which run in one process

Results = dict[str, dict[str, Any]]


def run_parts(names: list[str], out: Path, seconds: float, tiny: bool) -> Results:
    """What the parts wrote, in one process; ``why`` in it where one did not come to its end. Its log goes to the end
    of gpu.log."""
    scratch = Path(tempfile.mkdtemp(prefix="headrace-gpu-"))
    target, part_log = scratch / "found.json", scratch / "log"
    command = [sys.executable, "-m", "benchmarks.gpu_parts", str(target), *names, *(["--tiny"] if tiny else [])]
    with part_log.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
            _end(process)
    found: Results = json.loads(target.read_text()) if target.exists() else {}
    lines = part_log.read_text(errors="replace").strip().splitlines()
    with (out / "gpu.log").open("a") as whole:
        whole.write(f"==== {' '.join(names)}\n" + "\n".join(lines[-LOG_LINES:]) + "\n")
    for name in names if code != 0 else ():
        if "took_s" not in found.setdefault(name, {}):
            found[name].setdefault("why", f"{code}: " + " | ".join(lines[-3:])[-600:])
    if code != 0:
        print(f"--- {' '.join(names)}: {code}; the end of its log:\n" + "\n".join(lines[-30:]), flush=True)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(results: Results, must: bool) -> str:
    """What there is so far, as text."""
    lines = []
    for name, found in results.items():
        lines.append(f"## {name}")
        for key, value in found.items():
            told = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            lines.append(f"  {key:20} {told}")
    lines += [f"## ratios\n  {name:60} {value}" for name, value in compare(results).items()]
    return "\n".join([*lines, gpu_rows.must_table(results)] if must else lines)


def compare(results: Results) -> dict[str, float]:
    """Tokens a second of ours over transformers', where both were measured."""
    found = {}
    for shape in ("8b", "500m"):
        for ours, row, theirs in (
            (f"loop-{shape}", "loop", "tokens_per_s"),
            (f"stack-{shape}", "burst", "tokens_per_s"),
        ):
            ratio = gpu_rows.ratio(
                gpu_rows.at(ours, row, theirs), gpu_rows.at(f"transformers-{shape}", "all", "tokens_per_s")
            )(results)
            if ratio is not None:
                found[f"{ours} / transformers, 256 requests"] = ratio
    return found


def run(command: str, parts: list[str], out: Path, minutes: float, tiny: bool) -> Results:
    """All of ``parts``, written to ``out`` as they come."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    results: Results = {}
    for names in [parts] if tiny else [[part] for part in parts]:
        left = deadline - time.monotonic() - END_S / 4
        if left < LEAST_S:
            results |= {name: {"why": "no time was left"} for name in names}
        else:
            seconds = TINY_S if tiny else min(SECONDS[names[0]], left)
            results |= run_parts(names, out, seconds, tiny)
        shown = table(results, command == "must")
        (out / "gpu.json").write_text(json.dumps({**results, "ratios": compare(results)}, indent=1))
        (out / "gpu.txt").write_text(shown + "\n")
        print(table({name: results.get(name, {}) for name in names}, must=False), flush=True)
    print(gpu_rows.must_table(results) if command == "must" else "")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    for name in COMMANDS:
        asked.add_argument(f"--{name}", action="store_true", help=f"at most {MINUTES[name]:g} minutes")
    asked.add_argument("--parts", nargs="+", choices=SECONDS, metavar="NAME", help=", ".join(SECONDS))
    asked.add_argument("--carry", type=Path, metavar="FOLDER", help="fetch the wheels that a bare machine lacks")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to install for this run")
    parser.add_argument(
        "--python", default="3.12", help="the bare machine's Python, for --carry (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, help="for all parts together, if not the command's own")
    parser.add_argument("--tiny", action="store_true", help="small shapes, any machine: a rehearsal")
    args = parser.parse_args()
    if args.carry:
        gpu_wheels.download(args.carry, args.python)
        return
    command = next((name for name in COMMANDS if getattr(args, name)), "parts")
    if args.wheels:
        gpu_wheels.install(args.wheels)
    run(command, args.parts or list(COMMANDS[command]), args.out, args.minutes or MINUTES[command], args.tiny)


if __name__ == "__main__":
    main()
