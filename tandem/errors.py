"""The errors that Tandem's users can meet, each with its code, HTTP status and gRPC status.

TandemError
  +-- InvalidRequest      a field is wrong; names it, its value and its limit        400  INVALID_ARGUMENT
  |     +-- UnknownModel                                                             404  NOT_FOUND
  +-- Unauthenticated     no API key, or one that is wrong, revoked or expired       401  UNAUTHENTICATED
  +-- PermissionDenied    the API key is good, but not for this                      403  PERMISSION_DENIED
  +-- UnknownRequest      no such request is known                                   404  NOT_FOUND
  +-- DuplicateRequest    the id is in use                                           409  ALREADY_EXISTS
  +-- TakenOver           another router has the request: its stream goes on there    409  ABORTED
  +-- MoveImpossible      a running request cannot be moved (so, now); says why        409  FAILED_PRECONDITION
  +-- ScaleRefused        pools cannot have these sizes (now); says why              409  FAILED_PRECONDITION
  +-- DrainRefused        a worker cannot be drained (so, now); says why             409  FAILED_PRECONDITION
  +-- Overloaded          over capacity; says when to come again                     429  RESOURCE_EXHAUSTED
  |     +-- RateLimited   over a limit of its API key; says when to come again       429  RESOURCE_EXHAUSTED
  +-- Unavailable         no worker can serve this now                               503  UNAVAILABLE
  |     +-- Stopping      the router ends; another one, or the next, goes on         503  UNAVAILABLE
  |     +-- StoreAway     what only the shared store knows cannot be had now          503  UNAVAILABLE
  +-- DeadlinePassed      the request's own deadline is over                         504  DEADLINE_EXCEEDED
  +-- RequestLost         placed and re-placed in vain; names the last failure       502  ABORTED
  +-- StepFailed          the engine fails to run its steps, and its alone           500  INTERNAL
  +-- NotFinite           the model's logits for it are NaN or infinite              500  INTERNAL
  +-- Cancelled           ended by its client or an operator                         499  CANCELLED
"""

from __future__ import annotations

from typing import ClassVar


class TandemError(Exception):
    """Base of all errors that cross Tandem's edge. `code` is stable; the message is for people."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    openai_type: ClassVar[str] = "server_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CommandError(Exception):
    """Base of errors that end a command of the command line; the message is for people.

    `exit_status` is 2 where a setting or an argument is wrong, 1 where it could not be done.
    """

    exit_status: ClassVar[int] = 1


class InvalidRequest(TandemError):
    """A field that the client sent cannot be served."""

    code = "invalid_request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    openai_type = "invalid_request_error"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class UnknownModel(InvalidRequest):
    """The model named is not the one served."""

    code = "model_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class Unauthenticated(TandemError):
    """The caller shows no API key, or none that is good. The message never says what was shown."""

    code = "invalid_api_key"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    openai_type = "invalid_request_error"


class PermissionDenied(TandemError):
    """The API key is good, but this is not for it."""

    code = "permission_denied"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    openai_type = "invalid_request_error"


class UnknownRequest(TandemError):
    """No request of that id is known."""

    code = "unknown_request"
    http_status = 404
    grpc_status = "NOT_FOUND"
    openai_type = "invalid_request_error"


class DuplicateRequest(TandemError):
    """The request id is in use."""

    code = "duplicate_request"
    http_status = 409
    grpc_status = "ALREADY_EXISTS"
    openai_type = "invalid_request_error"


class TakenOver(TandemError):
    """Another router has the request now, where its client resumed the stream."""

    code = "taken_over"
    http_status = 409
    grpc_status = "ABORTED"


class MoveImpossible(TandemError):
    """The request cannot be moved, or not there, or not now. It runs on where it is."""

    code = "move_impossible"
    http_status = 409
    grpc_status = "FAILED_PRECONDITION"
    openai_type = "invalid_request_error"


class ScaleRefused(TandemError):
    """The pools cannot have these sizes now; the message says why."""

    code = "scale_refused"
    http_status = 409
    grpc_status = "FAILED_PRECONDITION"
    openai_type = "invalid_request_error"


class DrainRefused(TandemError):
    """The worker cannot be drained, or was not in time. It works on, unless the message says otherwise."""

    code = "drain_refused"
    http_status = 409
    grpc_status = "FAILED_PRECONDITION"
    openai_type = "invalid_request_error"


class Overloaded(TandemError):
    """The cluster is over its capacity; come again after `retry_after_ms`."""

    code = "overloaded"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class RateLimited(Overloaded):
    """The API key has used up its allowance; come again after `retry_after_ms`."""

    code = "rate_limit_exceeded"


class Unavailable(TandemError):
    """No worker can serve the request now."""

    code = "unavailable"
    http_status = 503
    grpc_status = "UNAVAILABLE"


class Stopping(Unavailable):
    """The router ends. What it kept of the request is to be had from the next one, where routers share a store."""

    code = "stopping"


class StoreAway(Unavailable):
    """The store that routers share does not answer; what only it knows is to be had when it is back."""

    code = "store_away"


class DeadlinePassed(TandemError):
    """The request did not end within its deadline."""

    code = "deadline_passed"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class RequestLost(TandemError):
    """Every attempt to serve the request failed; the message names the last failure."""

    code = "request_lost"
    http_status = 502
    grpc_status = "ABORTED"


class NotFinite(TandemError):
    """The model says NaN or infinity of this request's next token. It would anywhere: not to be tried again."""

    code = "not_finite"


class StepFailed(TandemError):
    """The engine cannot run this request's next step, while it runs others': not to be tried again."""

    code = "step_failed"


class Cancelled(TandemError):
    """The request was ended by its client or an operator."""

    code = "cancelled"
    http_status = 499
    grpc_status = "CANCELLED"


ERRORS: dict[str, type[TandemError]] = {
    error.code: error
    for error in (
        TandemError,
        InvalidRequest,
        UnknownModel,
        Unauthenticated,
        PermissionDenied,
        UnknownRequest,
        DuplicateRequest,
        TakenOver,
        MoveImpossible,
        DrainRefused,
        ScaleRefused,
        Overloaded,
        RateLimited,
        Unavailable,
        Stopping,
        StoreAway,
        DeadlinePassed,
        RequestLost,
        NotFinite,
        StepFailed,
        Cancelled,
    )
}


def error_of(
    code: str, message: str, *, field: str = "", retry_after_ms: int = 1000, kind: type[TandemError] = TandemError
) -> TandemError:
    """The error of this code and message, as its other end raised it; `kind` where the code is not known.

    `field`: of an InvalidRequest, whose message begins with it.
    """
    found = ERRORS.get(code, kind)
    if issubclass(found, InvalidRequest):
        name = field or message.partition(": ")[0]
        return found(name, message.removeprefix(f"{name}: "))
    if issubclass(found, Overloaded):
        return found(message, retry_after_ms=retry_after_ms)
    return found(message)
