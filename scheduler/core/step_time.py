"""How long steps take at one worker, how much prefill a step may hold, and how far ahead to plan.

**Step time.** A step takes nearly the same time whatever it holds until its products, and no longer the reading of the
weights, fill it: `fixed + tokens x price`, or, where the engine records graphs, the time of the bucket that the step is
padded to. An engine that records buckets times each at its warm-up and says so (`Capacity.step_us`); for others the
fixed part and the price are learned. A price per token that contains the fixed part would spiral: a small chunk looks
dear, so the next one is smaller.

**The knee.** Decodes and prefills together fill the smallest step whose cost per token is within KNEE of the best that
the machine can do. Below it tokens are dear, above it every stream waits longer for nothing.

**How far ahead.** The device must never wait for a plan, and a new request should not have to wait behind plans made
too early. So the planned work outstanding at a worker covers its *lead*: the time from the decision to plan until the
worker could start on it, plus the time until its commit is known here. The lead cannot be measured at a saturated
worker (its hint comes when the device is done, however early the plan was), but lateness can: the hint says how long
the device waited. The lead grows by the lateness, and shrinks by a thousandth per step that was in time; in equilibrium
fewer than one step in a hundred is late, by little. A plan sent to an idle worker measures the way directly.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

FIRST_LEAD_S = 0.01
MOST_LEAD_S = 0.25
DECAY = 0.999
SMOOTHING = 0.2
MOST_SCALE = 2.0  # bound on how much one slow step changes an estimate
KNEE = 0.88  # a token at the knee costs at most 1 / KNEE of what one costs in the largest step
LEAST_KNEE = 32
SHORT_PROMPT = 256
SLOWER = 1.9  # how much longer a step may take for the prefill of a prompt behind which nobody waits
UNBOUNDED = 1 << 62


class AffineSteps:
    """`fixed + price x (tokens + ROW x rows)`, learned by a Kalman filter whose two parameters drift slowly.

    While steps of one size come, what they do not tell apart stays as it was learned before. What a decode row costs
    beyond a prefill token (it reads a context) is not a third parameter: where the number of rows stays as it is, that
    cannot be told from the fixed part.
    """

    ROW = 0.5
    NOISE = 0.1  # of a measured time, as a share of it
    DRIFT = 1e-3  # growth of the variance of each parameter, per step
    FIRST_FIXED = 16  # tokens whose price the fixed part is taken for at first

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens
        self._fixed = self._price = 0.0  # seconds
        self._variance = (0.0, 0.0, 0.0)  # of fixed, of price, and their covariance

    def seconds(self, rows: int, tokens: int) -> float:
        """Of a step of ``tokens``, ``rows`` of them decodes; 0 while nothing is known."""
        return self._fixed + self._price * (tokens + self.ROW * rows) if tokens else 0.0

    def padded(self, tokens: int) -> int:
        return tokens

    def learn(self, rows: int, tokens: int, exec_s: float) -> None:
        size = tokens + self.ROW * rows
        if not self._price:
            price = exec_s / (size + self.FIRST_FIXED)
            self._fixed, self._price = self.FIRST_FIXED * price, price
            self._variance = ((2 * self._fixed) ** 2, price**2, 0.0)
            return
        expected = self.seconds(rows, tokens)
        exec_s = min(max(exec_s, expected / MOST_SCALE), expected * MOST_SCALE)
        fixed, price, both = self._variance
        fixed, price = fixed * (1 + self.DRIFT), price * (1 + self.DRIFT)
        of_fixed, of_price = fixed + both * size, both + price * size
        whole = of_fixed + of_price * size + (self.NOISE * max(exec_s, expected)) ** 2
        off = (exec_s - expected) / whole
        self._fixed = max(0.0, self._fixed + of_fixed * off)
        self._price = max(1e-9, self._price + of_price * off)
        self._variance = (fixed - of_fixed**2 / whole, price - of_price**2 / whole, both - of_fixed * of_price / whole)

    def knee(self) -> int:
        """Tokens of the smallest step that is nearly as cheap per token as the largest; 0 while nothing is known."""
        if not self._price:
            return 0
        best_s = self._price + self._fixed / self._most  # of a token, in the largest step
        return min(self._most, max(LEAST_KNEE, round(self._fixed / (best_s / KNEE - self._price))))


class MeasuredSteps:
    """Times of the buckets that the engine recorded and timed, set right by a fifth of what a step was off."""

    def __init__(self, step_us: Sequence[tuple[int, int]]) -> None:
        self._warm = [(tokens, us / 1e6) for tokens, us in sorted(step_us)]
        self._now = self._warm.copy()

    def _bucket(self, tokens: int) -> int:
        return min(bisect.bisect_left(self._now, (tokens, 0.0)), len(self._now) - 1)

    def seconds(self, rows: int, tokens: int) -> float:
        """``rows`` makes no difference: reading their contexts is learned with the decode steps."""
        size, seconds = self._now[self._bucket(tokens)]
        return seconds * max(1.0, tokens / size) if tokens else 0.0

    def padded(self, tokens: int) -> int:
        """The size of the bucket that a step of ``tokens`` takes."""
        return max(tokens, self._now[self._bucket(tokens)][0])

    def learn(self, rows: int, tokens: int, exec_s: float) -> None:
        k = self._bucket(tokens)
        size, seconds = self._now[k]
        off = exec_s / self.seconds(rows, tokens)
        self._now[k] = (size, seconds * (1 + SMOOTHING * (min(max(off, 1 / MOST_SCALE), MOST_SCALE) - 1)))

    def knee(self) -> int:
        """From the times at warm-up: with noise on them another bucket would be found at every look."""
        best = min(seconds / size for size, seconds in self._warm)
        return next(size for size, seconds in self._warm if seconds / size * KNEE <= best)


class StepTimeModel:
    """What one worker's steps are expected to take, and how much prefill may stand beside decodes.

    ``step_us``: (tokens, microseconds) of the steps that the engine timed; empty: it learns. ``target_s``: longest step
    that the operator wants streams to wait for, where it can be kept; 0: none.
    """

    def __init__(self, step_us: Sequence[tuple[int, int]] = (), most_tokens: int = 2048, target_s: float = 0.0) -> None:
        self.lead_s = FIRST_LEAD_S
        self._steps: AffineSteps | MeasuredSteps = MeasuredSteps(step_us) if step_us else AffineSteps(most_tokens)
        self._target_s = target_s
        self._decode_s: dict[int, float] = {}  # bit length of the number of rows -> seconds of steps without prefill

    def decode_s(self, rows: int) -> float:
        """Expected time of a step of ``rows`` decodes alone; 0 while nothing is known."""
        if not rows:
            return 0.0
        known = self._decode_s.get(rows.bit_length())
        if known is not None:
            return known
        if (modelled := self._steps.seconds(rows, rows)) or not self._decode_s:
            return modelled
        size = rows.bit_length()
        return self._decode_s[min(self._decode_s, key=lambda k: (abs(k - size), k))]

    def step_s(self, rows: int, prefill_tokens: int) -> float:
        """Expected time of a step: that of its decodes, and what the prefill tokens add to it."""
        steps, decode_s = self._steps, self.decode_s(rows)
        if not prefill_tokens:
            return decode_s
        whole = steps.seconds(rows, rows + prefill_tokens)
        return whole + max(0.0, decode_s - steps.seconds(rows, rows))

    def learn(self, rows: int, prefill_tokens: int, exec_s: float) -> None:
        """One step of ``rows`` decodes and ``prefill_tokens`` took ``exec_s``."""
        tokens = rows + prefill_tokens
        if not tokens or exec_s <= 0:
            return
        if prefill_tokens or isinstance(self._steps, AffineSteps):
            beyond = max(0.0, self.decode_s(rows) - self._steps.seconds(rows, rows)) if prefill_tokens else 0.0
            self._steps.learn(rows, tokens, max(exec_s - beyond, exec_s / MOST_SCALE))
        if not prefill_tokens:
            size = rows.bit_length()
            known = self._decode_s.get(size)
            if known is None:
                self._decode_s[size] = exec_s
            else:
                off = min(max(exec_s / known, 1 / MOST_SCALE), MOST_SCALE) - 1
                self._decode_s[size] = known * (1 + SMOOTHING * off)

    def chunk(self, rows: int, prompt_tokens: int, prompts: int) -> int:
        """Most prefill tokens beside ``rows`` decodes, where ``prompts`` wait or are being prefilled, the next one with
        ``prompt_tokens`` to compute.

        Decodes and prefill fill the knee; where decodes take more than half of it, prefill still gets half a knee. A
        long prompt behind which nobody waits gains little by it and slows every stream for many steps: it takes no more
        than makes the step SLOWER times as long, or a quarter of a knee. A target between tokens bounds all of them.
        """
        knee = self._steps.knee()
        if not knee:
            return UNBOUNDED
        most = self._steps.padded(max(knee, rows + knee // 2)) - rows
        slower_s = SLOWER * self.decode_s(rows)
        limit_s = max(self._target_s, slower_s) if self._target_s else UNBOUNDED
        if prompts <= 1 and prompt_tokens > SHORT_PROMPT:
            limit_s = min(limit_s, slower_s)
        if limit_s == UNBOUNDED:
            return most
        return max(min(most, knee // 4), self._within(limit_s, rows, most))

    def _within(self, limit_s: float, rows: int, most: int) -> int:
        """The most of ``most`` prefill tokens with which the step is expected to stay within ``limit_s``."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.step_s(rows, middle) <= limit_s:
                low = middle
            else:
                high = middle - 1
        return low

    def was_late(self, idle_s: float) -> None:
        """The device waited for a plan that could have been sent earlier."""
        self.lead_s = min(MOST_LEAD_S, self.lead_s + idle_s)

    def was_in_time(self) -> None:
        self.lead_s *= DECAY

    def measured_way(self, way_s: float) -> None:
        """Plan -> hint of a plan sent to an idle worker, less its time on the device."""
        self.lead_s += (min(MOST_LEAD_S, max(0.0, way_s)) - self.lead_s) * SMOOTHING
