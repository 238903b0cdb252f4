"""Errors in the shape that OpenAI clients understand."""

from __future__ import annotations

import json
from dataclasses import dataclass

RETRY_SECONDS = 2
NOT_READY = "model_not_ready"


@dataclass(eq=False)
class ApiError(Exception):
    """An answer of the router itself, not of an engine."""

    status: int
    message: str
    kind: str
    code: str
    param: str | None = None
    retry_after: int | None = None
    """Seconds; becomes Retry-After."""
    allow: str = ""
    """Methods; becomes Allow."""
    request_id: str = ""
    """The id that the engines saw; "" when the request went to none."""

    def body(self) -> bytes:
        return json.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": self.kind,
                    "param": self.param,
                    "code": self.code,
                }
            }
        ).encode()


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_body") -> ApiError:
    return ApiError(400, message, "invalid_request_error", code, param)


def unauthorized() -> ApiError:
    return ApiError(
        401, "no valid API key: send Authorization: Bearer <key>", "authentication_error", "invalid_api_key"
    )


def model_not_found(model: str) -> ApiError:
    return ApiError(
        404,
        f"The model `{model[:256]}` does not exist; GET /v1/models lists those that do.",
        "invalid_request_error",
        "model_not_found",
        "model",
    )


def unknown_path(path: str) -> ApiError:
    return ApiError(404, f"no such path: {path[:256]}", "invalid_request_error", "unknown_url")


def method_not_allowed(method: str, path: str, allowed: str) -> ApiError:
    text = f"{method} is not for {path}"
    return ApiError(405, text, "invalid_request_error", "method_not_allowed", allow=allowed)


def too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes", "invalid_request_error", "request_too_large"
    )


def too_busy(what: str) -> ApiError:
    return ApiError(429, f"{what}: try again shortly", "rate_limit_error", "router_overloaded", retry_after=1)


def body_too_slow(seconds: float) -> ApiError:
    return ApiError(
        408, f"the body did not arrive within {seconds:g} s", "invalid_request_error", "request_timeout"
    )


def not_ready(alias: str) -> ApiError:
    return ApiError(
        503,
        f"`{alias}` has no revision ready to answer yet",
        "service_unavailable_error",
        NOT_READY,
        "model",
        RETRY_SECONDS,
    )


def no_routes() -> ApiError:
    return ApiError(
        503,
        "the router has no routes yet",
        "service_unavailable_error",
        "router_not_ready",
        None,
        RETRY_SECONDS,
    )


def engine_unreachable() -> ApiError:
    return ApiError(
        502,
        "no engine could be reached, or it broke off before it answered",
        "api_error",
        "engine_unreachable",
        None,
        RETRY_SECONDS,
    )


def engine_too_slow() -> ApiError:
    return ApiError(504, "the engine did not answer in time", "api_error", "engine_timeout")
