"""Errors of the API, in the shape that OpenAI's clients and vLLM's agree on."""

from __future__ import annotations

from typing import Any

from aiohttp import web


class ApiError(Exception):
    """An answer that is an error; the message is shown to the client."""

    status = 500
    kind = "InternalServerError"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def response(self) -> web.Response:
        return web.json_response(self.document(), status=self.status)

    def document(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}


def translate(error: web.HTTPException, what: str) -> web.Response:
    """Returns an error of aiohttp's in our shape; the type is the status' phrase, as in vLLM."""
    told = ApiError(f"{what}: {error.reason}")
    told.status, told.kind = error.status, error.reason
    response = told.response()
    if "Allow" in error.headers:  # a 405 must say it
        response.headers["Allow"] = error.headers["Allow"]
    return response


class BadRequest(ApiError):  # noqa: N818  as the API names it
    status = 400
    kind = "BadRequestError"


class TooLarge(BadRequest):
    status = 413


class InvalidUserInput(BadRequest):  # vLLM's type for the adapter calls
    kind = "InvalidUserInput"


class CapacityError(BadRequest):
    kind = "LoRACapacityError"


class NotFound(ApiError):  # noqa: N818  as the API names it
    status = 404
    kind = "NotFoundError"


class Unauthorized(ApiError):  # noqa: N818  as the API names it
    status = 401
    kind = "AuthenticationError"


class TooMany(ApiError):  # noqa: N818  as the API names it
    status = 429
    kind = "RateLimitError"


class Unavailable(ApiError):  # noqa: N818  as the API names it
    status = 503
    kind = "ServiceUnavailableError"


def model_not_found(name: str) -> NotFound:
    return NotFound(f"The model `{name}` does not exist.", "model")
