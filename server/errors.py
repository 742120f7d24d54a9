"""What can go wrong in the server, drawn as a tree; each leaf is one HTTP answer.

ServerError
├── BadRequest 400
│   ├── MalformedBody          the body is not what the route takes
│   ├── UnknownParameter       a field that nobody defines
│   ├── UnsupportedParameter   a field that would change the answer and that we do not act on
│   ├── InvalidValue           a known field with a value outside its limits
│   ├── PromptTooLong          context_length_exceeded
│   ├── AdapterIncompatible    made for another base, or above a limit of this server
│   └── MixtureRefused         adapters that cannot be combined exactly
├── Unauthorized 401
├── Forbidden 403
├── ModelNotFound 404          unknown, or not visible to this key: the same words
├── RouteNotFound 404 · MethodNotAllowed 405 · BodyTooLarge 413
├── EngineFailed 500           a bug of ours ended this request; the server goes on
├── AdapterUnavailable 502     the artifact is corrupt or was refused
└── Unavailable 503            with retry-after
    ├── QueueFull
    └── Draining
StartupRefused                 never an HTTP answer: the server does not start
"""

from __future__ import annotations

from typing import ClassVar


class ServerError(Exception):
    """Root of what a user, a file or the network can cause. `message` may hold values and limits, never file paths."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(ServerError):
    status = 400
    type = "invalid_request_error"
    code = "bad_request"


class MalformedBody(BadRequest):
    code = "malformed_body"


class UnknownParameter(BadRequest):
    code = "unknown_parameter"


class UnsupportedParameter(BadRequest):
    code = "unsupported_parameter"


class InvalidValue(BadRequest):
    code = "invalid_value"


class PromptTooLong(BadRequest):
    code = "context_length_exceeded"


class AdapterIncompatible(BadRequest):
    code = "adapter_incompatible"


class MixtureRefused(BadRequest):
    code = "mixture_refused"


class Unauthorized(ServerError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ServerError):
    status = 403
    type = "permission_error"
    code = "admin_key_required"


class ModelNotFound(ServerError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RouteNotFound(ServerError):
    status = 404
    type = "invalid_request_error"
    code = "route_not_found"


class MethodNotAllowed(ServerError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTooLarge(ServerError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class EngineFailed(ServerError):
    code = "engine_failed"


class AdapterUnavailable(ServerError):
    status = 502
    code = "adapter_unavailable"


class Unavailable(ServerError):
    status = 503
    type = "overloaded_error"
    code = "unavailable"


class QueueFull(Unavailable):
    code = "queue_full"


class Draining(Unavailable):
    code = "draining"


class StartupRefused(Exception):
    """The server cannot run what it was asked to run; the message says why and what would help."""
