"""How long steps take at one worker, and how far ahead of it to plan.

The device must never wait for a plan, and a new request should not have to wait behind plans made too early. So the
planned work outstanding at a worker covers its *lead*: the time from the decision to plan until the worker could
start on it, plus the time until its commit is known here. The lead cannot be measured at a saturated worker (its hint
comes when the device is done, however early the plan was), but lateness can: the hint says how long the device waited.
The lead grows by the lateness, and shrinks by a thousandth per step that was in time; in equilibrium fewer than one
step in a hundred is late, by little. A plan sent to an idle worker measures the way directly.
"""

from __future__ import annotations

FIRST_LEAD_S = 0.01
MOST_LEAD_S = 0.25
DECAY = 0.999
SMOOTHING = 0.2
DRIFT = 0.025  # learning rate of decode times from steps that also hold prefill tokens
MOST_SCALE = 5.0  # bound on how much one slow step changes the estimate
LEAST_CHUNK = 8
SHORT_CHUNK = 64
SHORT_PROMPT = 256
SLOWER = 1.7  # how much longer a step may take for a prefill in it: below 2, because the estimate lags
WAITING_WEIGHT = 4  # weight of a waiting prompt against a stream, since batches stay smaller until it runs
UNBOUNDED = 1 << 62


class StepTimeModel:
    """Step times as decode time by number of rows, plus a time per prefill token alone, or beside so many rows.

    Beside few rows a token costs more than in a long chunk of its own, since small matrix products are slow.
    """

    def __init__(self) -> None:
        self.lead_s = FIRST_LEAD_S
        self.prefill_token_s = 0.0
        self._decode_s: dict[int, float] = {}  # bit length of the number of rows -> seconds
        self._beside_s: dict[int, float] = {}  # the same -> seconds per prefill token beside them

    def decode_s(self, rows: int) -> float:
        """Expected time of a step of ``rows`` decodes alone; 0 while nothing is known."""
        if not rows or not self._decode_s:
            return 0.0
        size = rows.bit_length()
        known = self._decode_s.get(size)
        return known if known is not None else self._decode_s[min(self._decode_s, key=lambda k: (abs(k - size), k))]

    def token_s(self, rows: int) -> float:
        """Expected time of one prefill token beside ``rows`` decodes; 0 while nothing is known."""
        return self._beside_s.get(rows.bit_length(), self.prefill_token_s)

    def step_s(self, rows: int, prefill_tokens: int) -> float:
        return self.decode_s(rows) + prefill_tokens * self.token_s(rows)

    def learn(self, rows: int, prefill_tokens: int, exec_s: float) -> None:
        """One step of ``rows`` decodes and ``prefill_tokens`` took ``exec_s``.

        An unknown part is initialized with the time that the known part leaves, or with its share of the tokens. The
        error of a mixed step goes almost entirely to the prefill tokens, since steps with decodes alone are frequent
        unless load never pauses.
        """
        tokens = rows + prefill_tokens
        if not tokens or exec_s <= 0:
            return
        size = rows.bit_length()
        decode_s, prefill_s = self.decode_s(rows), prefill_tokens * self.token_s(rows)
        if rows and (not decode_s or (not prefill_tokens and size not in self._decode_s)):
            decode_s = max(exec_s - prefill_s, exec_s * rows / tokens)
        if prefill_tokens and not prefill_s:
            prefill_s = max(exec_s - decode_s, exec_s * prefill_tokens / tokens)
        off = min(exec_s / (decode_s + prefill_s), MOST_SCALE) - 1
        if rows:
            self._decode_s[size] = decode_s * (1 + (DRIFT if prefill_tokens else SMOOTHING) * off)
        if prefill_tokens:
            token_s = prefill_s / prefill_tokens * (1 + SMOOTHING * off)
            if rows:
                self._beside_s[size] = token_s
            if not rows or not self.prefill_token_s:
                self.prefill_token_s = token_s

    def chunk(self, rows: int, prompt_tokens: int, prompts: int) -> int:
        """Most prefill tokens beside ``rows`` decodes, for a prompt of which ``prompt_tokens`` are to be computed.

        As many as make the step take SLOWER times as long as without them; at least LEAST_CHUNK, so that prefills do
        not starve where a prefill token costs as much as a decode (small machines). A short prompt may take more: it
        slows only few steps. So may any where many ``prompts`` wait: a longer step delays each decode, but shortens the
        wait of each prompt behind this one.
        """
        decode_s, token_s = self.decode_s(rows), self.token_s(rows)
        if not decode_s or not token_s:
            return UNBOUNDED
        least = SHORT_CHUNK if prompt_tokens <= SHORT_PROMPT else LEAST_CHUNK
        return max(least, round((SLOWER - 1) * decode_s / token_s * max(1.0, WAITING_WEIGHT * (prompts - 1) / rows)))

    def was_late(self, idle_s: float) -> None:
        """The device waited for a plan that could have been sent earlier."""
        self.lead_s = min(MOST_LEAD_S, self.lead_s + idle_s)

    def was_in_time(self) -> None:
        self.lead_s *= DECAY

    def measured_way(self, way_s: float) -> None:
        """Plan -> hint of a plan sent to an idle worker, less its time on the device."""
        self.lead_s += (min(MOST_LEAD_S, max(0.0, way_s)) - self.lead_s) * SMOOTHING
