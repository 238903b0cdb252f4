"""How a request to the Kubernetes API fails. Each is an ordinary event for callers."""

from __future__ import annotations

import json


class ApiError(Exception):
    """A request failed; `str()` is the server's own message."""


class ConflictError(ApiError):
    """The object changed or exists already (409): read it again."""


class InvalidError(ApiError):
    """The server refuses the object (400, 422): sending it again cannot help."""


class ForbiddenError(ApiError):
    """RBAC or a quota forbids it (401, 403)."""


class UnavailableError(ApiError):
    """The server is away or busy (429, 5xx, no connection, timeout): try again later."""


class FencedError(UnavailableError):
    """Another operator may lead by now: the request was not sent."""


def from_answer(status: int, data: bytes, request: str) -> ApiError:
    """The error that an HTTP status stands for; `request` is what was asked."""
    try:
        message = str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {status}"
    text = f"{request}: {message}"
    match status:
        case 409:
            return ConflictError(text)
        case 400 | 422:
            return InvalidError(text)
        case 401 | 403:
            return ForbiddenError(text)
        case 429 | 500 | 502 | 503 | 504:
            return UnavailableError(text)
        case _:
            return ApiError(text)
