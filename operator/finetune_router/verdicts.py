"""What an engine's answer, or its absence, means: for the comparison of the arms, and for the client."""

from __future__ import annotations

from finetune_router import errors
from finetune_router.errors import ApiError
from finetune_router.forwarding import Attempt, Failure
from finetune_router.observations import End
from finetune_router.tables import Route


def is_refusal(attempt: Attempt) -> bool:
    """Whether the answer is a 4xx or 501 that may be the revision's fault, for example of its chat template."""
    reply = attempt.reply
    return attempt.failure is None and reply is not None and reply.status >= 400


def is_taken(attempt: Attempt) -> bool:
    """Whether the revision gives what was asked for."""
    reply = attempt.reply
    return attempt.failure is None and reply is not None and reply.status < 400


def judge_end(attempt: Attempt) -> tuple[End, int]:
    """How an attempt counts, and the status that stands for it."""
    reply = attempt.reply
    match attempt.failure:
        case None if reply is not None:
            return (End.ANSWERED if reply.status < 400 else End.CLIENT), reply.status
        case Failure.MISSING:
            return End.CLIENT, 404
        case Failure.BUSY if reply is not None:
            return (End.ERROR if reply.status >= 500 else End.CLIENT), reply.status
        case Failure.ERROR if reply is not None:
            return End.ERROR, max(reply.status, 500)
        case Failure.TIMEOUT:
            return End.ERROR, 504
    return End.ERROR, 502


def no_answer(route: Route, failure: Failure | None) -> ApiError:
    """What the client is told when no engine answered."""
    match failure:
        case Failure.MISSING:
            return errors.not_ready(route.alias)
        case Failure.TIMEOUT:
            return errors.engine_too_slow()
    return errors.engine_unreachable()
