"""What a GPU must show: the rows in their order, what each may take, and whether what was found holds.

Bounds are those of an H100 with an 8B Llama shape in bf16, unless a row says otherwise; ratios are of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Results = dict[str, dict[str, Any]]  # part -> what it found


@dataclass(frozen=True)
class Figure:
    """One number of a row. ``most``: it must be no more than ``must``; else no less. None: it was not reached."""

    name: str
    find: Callable[[Results], float | None]
    must: float
    aim: float
    most: bool = True

    def holds(self, value: float, bound: float) -> bool:
        return value <= bound if self.most else value >= bound


@dataclass(frozen=True)
class Row:
    """``seconds`` is all that measuring it may take, in each part of ``parts``: (part, key of what is found there)."""

    title: str
    parts: tuple[tuple[str, str], ...]
    seconds: float
    figures: tuple[Figure, ...]


def at(part: str, row: str, key: str) -> Callable[[Results], float | None]:
    return lambda results: _number(results.get(part, {}).get(row), key)


def ratio(above: Callable[[Results], float | None], below: Callable[[Results], float | None]) -> Any:
    def find(results: Results) -> float | None:
        one, other = above(results), below(results)
        return round(one / other, 3) if one is not None and other else None

    return find


def _number(found: Any, key: str) -> float | None:
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, (int, float)) and value == value else None


def _steps(part: str, *batches: tuple[int, float, float]) -> tuple[Figure, ...]:
    return tuple(Figure(f"{rows} rows", at(part, "steps", f"over_floor_{rows}"), *bounds) for rows, *bounds in batches)


def _stack_over_engine(name: str, stack: str, engine: str, key: str, must: float, aim: float) -> Figure:
    return Figure(name, ratio(at(stack, key, "tokens_per_s"), at(engine, key, "bare_tokens_per_s")), must, aim, False)


STACK, ENGINE, SMALL = "stack-8b", "engine-8b", "both-500m"
ROWS = (
    Row(
        "256 at once, 64-512 in, 128 out, whole stack", ((STACK, "burst"),), 18,
        (
            Figure("tokens/s", at(STACK, "burst", "tokens_per_s"), 8000, 8500, most=False),
            Figure("TTFT p99 ms", at(STACK, "burst", "ttft_p99_ms"), 2800, 2500),
            Figure("inter-token p99 ms", at(STACK, "burst", "itl_p99_ms"), 40, 30),
        ),
    ),
    Row(
        "Poisson at 80% of the burst's requests/s, 1,500 requests", ((STACK, "poisson"),), 40,
        (
            Figure("TTFT p99 ms", at(STACK, "poisson", "ttft_p99_ms"), 150, 100),
            Figure("inter-token p99 ms", at(STACK, "poisson", "itl_p99_ms"), 30, 25),
        ),
    ),
    Row(
        "256 streams, 64 in, 384 out: device time of the steps / wall time", ((STACK, "share"),), 12,
        (Figure("share", at(STACK, "share", "device_share"), 0.93, 0.97, most=False),),
    ),
    Row(
        "decode step / floor, context 512", ((ENGINE, "steps"),), 12,
        _steps(ENGINE, (1, 1.2, 1.15), (32, 1.2, 1.15), (128, 1.25, 1.2), (256, 1.25, 1.2)),
    ),
    Row(
        "top-p on, 128 rows, more than greedy", ((ENGINE, "top_p"),), 10,
        (Figure("%", at(ENGINE, "top_p", "more_percent"), 5, 3),),
    ),
    Row(
        "host execute, median, 256 rows", ((ENGINE, "execute"),), 4,
        (Figure("ms", at(ENGINE, "execute", "median_ms"), 0.6, 0.4),),
    ),
    Row(
        "one stream, stack / engine: 8B; 0.5B; 0.5B at 32 streams",
        ((STACK, "one"), (ENGINE, "one"), (SMALL, "one"), (SMALL, "few")), 6,
        (
            _stack_over_engine("8B", STACK, ENGINE, "one", 0.95, 0.98),
            _stack_over_engine("0.5B", SMALL, SMALL, "one", 0.9, 0.95),
            _stack_over_engine("0.5B, 32 streams", SMALL, SMALL, "few", 0.95, 0.97),
        ),
    ),
    Row(
        "MoE step / floor of the experts chosen (OLMoE 1B-7B shape)", (("moe", "steps"),), 12,
        _steps("moe", (1, 2.0, 1.7), (32, 1.35, 1.2), (128, 1.35, 1.2)),
    ),
    Row(
        "FP8 8B: step / own floor; prefill against bf16",
        (("fp8", "steps"), ("fp8", "prefill"), (ENGINE, "prefill")),
        8,
        (
            *_steps("fp8", (1, 1.45, 1.3)),
            Figure(
                "prefill, times", ratio(at("fp8", "prefill", "tokens_per_s"), at(ENGINE, "prefill", "tokens_per_s")),
                1.25, 1.4, most=False,
            ),
        ),
    ),
    Row(
        "int4 8B: step / bf16 step, 1 row", (("int4", "steps"),), 8,
        (Figure("ratio", ratio(at("int4", "steps", "step_ms_1"), at(ENGINE, "steps", "step_ms_1")), 0.5, 0.4),),
    ),
)  # fmt: skip
# What the parts take besides their rows: loading, drawing weights, starting.
START_S = {STACK: 60.0, ENGINE: 30.0, SMALL: 40.0, "moe": 42.0, "fp8": 26.0, "int4": 25.0}
TWICE = (SMALL,)  # measures its rows of the stack, then of the bare loop


def seconds_of(part: str, key: str) -> float:
    """What measuring the row ``key`` may take within ``part``; those that are in no table have a minute."""
    return next((row.seconds for row in ROWS if (part, key) in row.parts), 60.0)


def part_seconds(part: str) -> float:
    rows = sum(row.seconds for row in ROWS for of, _ in row.parts if of == part)
    return START_S[part] + rows * (2 if part in TWICE else 1)


def verdict(row: Row, results: Results) -> tuple[str, str]:
    """(held, missed or not reached; the figures, and why some are missing)."""
    values = [figure.find(results) for figure in row.figures]
    told = [_tell(figure, value) for figure, value in zip(row.figures, values, strict=True)]
    known = [(figure, value) for figure, value in zip(row.figures, values, strict=True) if value is not None]
    why = dict.fromkeys(text for part, key in row.parts if (text := _why(results, part, key)))
    if any(not figure.holds(value, figure.must) for figure, value in known):
        state = "missed"
    else:
        state = "held" if len(known) == len(values) else "not reached"
    return state, "; ".join([*told, *(why if len(known) < len(values) else ())])


def _tell(figure: Figure, value: float | None) -> str:
    sign = "<=" if figure.most else ">="
    if value is None:
        return f"{figure.name}: - (must {sign} {figure.must:g})"
    reached = ", aim reached" if figure.holds(value, figure.aim) else ""
    return f"{figure.name}: {value:g} (must {sign} {figure.must:g}{reached})"


def _why(results: Results, part: str, key: str) -> str:
    found = results.get(part)
    if found is None:
        return f"{part} has not run"
    reasons = (found.get(key), found)
    return next((f"{part}: {r['why']}" for r in reasons if isinstance(r, dict) and "why" in r), "")


def must_table(results: Results) -> str:
    lines = ["## what must hold"]
    for row in ROWS:
        state, text = verdict(row, results)
        lines.append(f"  {state:11}  {row.title}\n               {text}")
    return "\n".join(lines)
