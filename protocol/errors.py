"""One error tree. Each class says whose fault it is, its wire code, and the HTTP status it becomes.

    HeadraceError
    ├── RequestError                    the sender's fault: never retried unchanged
    │   ├── InvalidRequest        400   invalid_request
    │   │   └── StructureNotSupported 400 structure_not_supported (a schema, grammar or tokenizer that cannot be served)
    │   ├── NoTokenLeft           400   no_token_left (its own parameters rule out every token)
    │   ├── ContextLengthExceeded 400   context_length_exceeded
    │   ├── SpecialTokensRefused  400   special_tokens_refused
    │   ├── Unauthorized          401   invalid_api_key
    │   ├── NotFound              404   not_found (model_not_found)
    │   ├── Conflict              409   idempotency_conflict
    │   ├── StreamDiverged        409   stream_diverged
    │   ├── Expired               410   expired
    │   └── TooLarge              413   too_large
    ├── ServiceError                    a fault of the service or of what it depends on: may be retried
    │   ├── Overloaded            429   overloaded (carries retry_after, seconds)
    │   ├── EngineFailed          500   engine_failed
    │   ├── GrammarFailed         500   grammar_failed (a grammar that could not be followed to its end)
    │   ├── StoreFailed           500   store_failed (the server refused an operation: a key of a wrong type)
    │   ├── Unavailable           503   unavailable
    │   │   └── WeightsChanged    503   weights_changed (it had begun with weights that no worker has any more)
    │   └── DeadlineExceeded      504   deadline_exceeded
    ├── StartError                      a failed start; the message says what to do
    │   └── ModelRefused                this model cannot be served, with the reason
    └── Fenced                          the caller has been replaced: by a new leader or a newer session

Messages name the field and the limit and never echo a prompt, a token or a key.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

EX_CONFIG = 78  # sysexits.h: exit code of a process that failed with StartError; it is not started again


class HeadraceError(Exception):
    """Anything that Headrace raises on purpose."""


class RequestError(HeadraceError):
    """The sender's fault. ``param`` names the field at fault, if there is one."""

    status: ClassVar[int] = 400
    code: ClassVar[str] = "invalid_request"
    type: ClassVar[str] = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.wire_code = code or type(self).code


class InvalidRequest(RequestError):
    pass


class StructureNotSupported(InvalidRequest):
    code = "structure_not_supported"


class NoTokenLeft(RequestError):
    code = "no_token_left"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class SpecialTokensRefused(RequestError):
    """A text of the request reads as a special token and cannot be told from the chat template's own."""

    code = "special_tokens_refused"


class Unauthorized(RequestError):
    status, code, type = 401, "invalid_api_key", "authentication_error"


class BudgetSpent(RequestError):
    """The tenant has no money left for today."""

    status, code, type = 402, "budget_exhausted", "insufficient_quota"


class NotFound(RequestError):
    status, code, type = 404, "not_found", "not_found_error"


class Conflict(RequestError):
    status, code, type = 409, "idempotency_conflict", "conflict_error"


class StreamDiverged(RequestError):
    status, code, type = 409, "stream_diverged", "conflict_error"


class Expired(RequestError):
    status, code, type = 410, "expired", "not_found_error"


class TooLarge(RequestError):
    status, code = 413, "too_large"


class ServiceError(HeadraceError):
    """Not the sender's fault; the same request may succeed later."""

    status: ClassVar[int] = 503
    code: ClassVar[str] = "unavailable"
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param: str | None = None
        self.retry_after = retry_after
        self.wire_code = type(self).code


class RatesLeft(NamedTuple):
    """What is left of a tenant's limits per minute; None: it has no such limit."""

    requests: float | None = None
    tokens: float | None = None


NO_RATES = RatesLeft()


class Overloaded(ServiceError):
    status, code, type = 429, "overloaded", "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float | None = None, left: RatesLeft = NO_RATES) -> None:
        super().__init__(message, retry_after=retry_after)
        self.left = left


class EngineFailed(ServiceError):
    status, code = 500, "engine_failed"


class GrammarFailed(ServiceError):
    status, code = 500, "grammar_failed"


class NonFiniteLogits(ServiceError):
    """The model gave no numbers for this sequence: weights or input are broken, not the service."""

    status, code = 500, "non_finite_logits"


class StoreFailed(ServiceError):
    """Redis answered with an error that repeating will not mend: a key of a wrong type, a missing permission."""

    status, code = 500, "store_failed"


class Unavailable(ServiceError):
    pass


class Voided(Unavailable):
    """The claim of this request's idempotency key was freed before it was accepted."""


class WeightsChanged(Unavailable):
    code = "weights_changed"


class DeadlineExceeded(ServiceError):
    status, code, type = 504, "deadline_exceeded", "timeout_error"


class StartError(HeadraceError):
    """A start that cannot succeed as asked. Printed without a traceback; the process exits non-zero."""


class ModelRefused(StartError):
    pass


class Fenced(HeadraceError):
    """``cause`` is "epoch" (another leader leads) or "gen" (a newer session of this worker, or none)."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"fenced: {cause}")
        self.cause = cause


def _subclasses(root: type[Any]) -> list[type[Any]]:
    return [c for sub in root.__subclasses__() for c in (sub, *_subclasses(sub))]


def http_status(code: str | None) -> int:
    """HTTP status of a wire code (as found in an error frame); 500 for a code that nobody here knows."""
    known: dict[str, int] = {c.code: c.status for c in (*_subclasses(RequestError), *_subclasses(ServiceError))}
    known |= {"model_not_found": 404, "unknown_parameter": 400, "unsupported_parameter": 400}
    return known.get(code or "", 500)
