"""Results as a table to read, as JSON to compare, and as a section of docs/performance.md."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "performance"  # JSON and plots


@dataclass
class Section:
    """One table. ``rows`` map column to value; a column that a row lacks stays empty. ``notes`` stand below."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        cells = [columns, *([show(row.get(name)) for name in columns] for row in self.rows)]
        widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
        lines[1:1] = ["|" + "|".join("-" * (w + 2) for w in widths) + "|"]
        table = "\n".join(lines) + "\n" if self.rows else ""
        return f"### {self.title}\n\n{table}" + "".join(f"\n{wrapped(note)}\n" for note in self.notes)


def show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if isinstance(value, float) and not math.isfinite(value):
            return "-"
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 30 else 2
        return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"
    return str(value)


def middle(values: Sequence[float]) -> float:
    """The median of what is a number; NaN where nothing is."""
    finite = [v for v in values if math.isfinite(v)]
    return round(statistics.median(finite), 3) if finite else math.nan


def wrapped(note: str) -> str:
    """A paragraph in lines of at most 120 characters, as the documents' test asks."""
    return textwrap.fill(note, 120, break_long_words=False, break_on_hyphens=False)


def spread(values: Sequence[float]) -> float:
    """Noise over rounds: (highest - lowest) / median."""
    finite = [v for v in values if math.isfinite(v)]
    return round((max(finite) - min(finite)) / statistics.median(finite), 3) if len(finite) > 1 else math.nan


def circumstances() -> dict[str, Any]:
    """When, what and where. Taken before a run: the load is that of others."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """The short id of the commit, with + if the tree differs from it; empty outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def text(where: dict[str, Any], sections: Sequence[Section]) -> str:
    """The whole report in Markdown."""
    head = (
        f"{where['date']}, commit {where['commit'] or 'unknown'}, on {where['cores']} cores of {where['cpu']}, "
        f"{where['memory_gib']} GiB, {where['system']}, Python {where['python']}; "
        f"load {where['load_before']} before the run."
    )
    return "\n".join([wrapped(head) + "\n", *(section.markdown() for section in sections)])


def write_json(name: str, where: dict[str, Any], results: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    clean = json.loads(json.dumps({"where": where, "results": results}), parse_constant=lambda _: None)
    path.write_text(json.dumps(clean, indent=1) + "\n")
    return path


def write_docs(name: str, body: str, path: Path = DOCS) -> None:
    """Put ``body`` between the marks of ``name``. ValueError if the page has none."""
    page = path.read_text()
    begin, end = f"<!-- results of {name} -->\n", f"<!-- end of {name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"{path} has no section for the results of {name}")
    before, _, rest = page.partition(begin)
    path.write_text(before + begin + "\n" + body.rstrip() + "\n\n" + end + rest.partition(end)[2])


def plot_knees(rows: Sequence[dict[str, Any]], path: Path) -> str | None:
    """Tokens per second and cores by role over the number of workers. Returns why there is no plot, or None."""
    try:
        import matplotlib
    except ImportError:
        return "No plot: matplotlib is not installed."
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    workers = [row["workers"] for row in rows]
    left.plot(workers, [row["tokens_per_s"] for row in rows], "o-")
    left.set(xlabel="simulated workers x 256 sequences", ylabel="tokens/s", ylim=(0, None), xticks=workers)
    base = [0.0] * len(rows)
    for role in ("worker", "redis", "scheduler", "gateway"):
        cores = [row["cpu_cores"].get(role, 0.0) for row in rows]
        right.bar([str(w) for w in workers], cores, bottom=base, label=role)
        base = [a + b for a, b in zip(base, cores, strict=True)]
    right.set(xlabel="simulated workers", ylabel="cores in use")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return None
