"""The exception tree; each class knows the HTTP status and the OpenAI error type it answers with."""

from __future__ import annotations


class PhloemError(Exception):
    """Base of everything that Phloem raises on purpose."""

    status = 500
    kind = "internal_error"
    retryable = False
    retry_after: int | None = None  # seconds

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class BadRequest(PhloemError):
    """The request can never succeed as it was sent."""

    status = 400
    kind = "invalid_request_error"


class Unauthorized(PhloemError):
    status = 401
    kind = "authentication_error"


class Forbidden(PhloemError):
    """The call is not for this caller."""

    status = 403
    kind = "permission_error"


class NotFound(PhloemError):
    status = 404
    kind = "not_found_error"


class BodyTooLarge(PhloemError):
    status = 413
    kind = "invalid_request_error"


class SlowBody(PhloemError):
    """The rest of a request's body did not come in time."""

    status = 408
    kind = "invalid_request_error"


class QueueFull(PhloemError):
    """The waiting queue is at its limit; the client should try again."""

    status = 503
    kind = "overloaded_error"
    retryable = True


class OutOfMemory(PhloemError):
    """A step, or one request alone, needs more memory than there is.

    As the answer to a request: 507, because the same request would fail again. As what a launched step raises (see
    `core.batch.Pending`): nothing of that step counts, and it may be run again in smaller pieces.
    """

    status = 507
    kind = "out_of_memory"


class StorageFailed(PhloemError):
    """A disk does not take what is to be kept: it is full, or the folder is gone or not to be written."""

    status = 507
    kind = "storage_failed"
    retryable = True


class EngineDead(PhloemError):
    """The engine process has gone; requests that were in flight are lost."""

    status = 503
    kind = "engine_unavailable"
    retryable = True


class ConfigError(PhloemError):
    """A configuration value is wrong; raised before any port is opened."""


class ModelLoadError(PhloemError):
    """A checkpoint is missing, corrupt or of an unknown architecture; raised before any port is opened."""
