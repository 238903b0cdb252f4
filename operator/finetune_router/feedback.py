"""Feedback on answers: a SQLite file that all workers of a replica write and that survives restarts.

A value is counted once per (response, metric); a later one replaces it. Sums are kept beside the records, in the same
transaction, so that reading them costs the same however many records there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError

from finetune_operator.api.routes import GROUPS, Arm, ArmCounters, EpochCounters, Moments
from finetune_router import errors
from finetune_router.errors import ApiError
from finetune_router.tables import Table
from finetune_router.tickets import BadTicketError, Ticket, TicketOffice

logger = logging.getLogger(__name__)

FILE_NAME = "feedback.sqlite"
METRICS_PER_ALIAS = 50  # names that clients may make up for one alias
_BUSY_SECONDS = 5.0  # to wait for another worker's transaction
SECONDS_PER_DAY = 86_400
_LARGEST = 10**9  # of a value, either side of zero
_METRIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
# The index that goes was one over all idempotency keys, which are the clients' own: two may choose the same one.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
    ticket TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL, alias TEXT NOT NULL, arm TEXT NOT NULL,
    revision TEXT NOT NULL, counted INTEGER NOT NULL, comment TEXT, idempotency_key TEXT, at INTEGER NOT NULL,
    PRIMARY KEY (ticket, metric)
) WITHOUT ROWID;
DROP INDEX IF EXISTS records_by_key;
CREATE INDEX IF NOT EXISTS records_by_time ON records (at);
CREATE TABLE IF NOT EXISTS sums (
    alias TEXT NOT NULL, arm TEXT NOT NULL, revision TEXT NOT NULL, metric TEXT NOT NULL,
    n INTEGER NOT NULL, sum REAL NOT NULL, sum_squares REAL NOT NULL,
    PRIMARY KEY (alias, arm, revision, metric)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS group_sums (
    alias TEXT NOT NULL, arm TEXT NOT NULL, revision TEXT NOT NULL, metric TEXT NOT NULL, key_group INTEGER NOT NULL,
    n INTEGER NOT NULL, sum REAL NOT NULL,
    PRIMARY KEY (alias, arm, revision, metric, key_group)
) WITHOUT ROWID;
"""


class Feedback(BaseModel):
    """Body of POST /v1/feedback."""

    model_config = ConfigDict(extra="forbid")

    response_id: Annotated[str, Field(max_length=1100)] = ""
    request_id: Annotated[str, Field(max_length=1100)] = ""
    metric: Annotated[str, Field(max_length=63)]
    value: StrictBool | StrictInt | StrictFloat
    comment: Annotated[str, Field(max_length=4096)] | None = None
    idempotency_key: Annotated[str, Field(min_length=1, max_length=255)] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a piece of feedback."""

    is_new: bool
    body: bytes


class FeedbackStore:
    """The file. Methods block; each opens its own short transaction."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._local = threading.local()
        self._is_prepared = False
        try:
            self._prepare()
        except sqlite3.OperationalError as error:  # no room, no rights: the file itself may be whole
            logger.error("%s cannot be used now, and no feedback is taken: %s", self._path, error)
        except sqlite3.DatabaseError as error:  # requests must be answered all the same
            logger.error("%s is put aside, and the feedback in it is lost: %s", self._path, error)
            self._put_aside()
            self._prepare()

    def put(self, ticket_text: str, ticket: Ticket, feedback: Feedback, *, is_grouped: bool) -> bool:
        """Store a value; whether the response had none for the metric. `is_grouped`: sum it by group of keys as well.

        Raises ApiError when the alias has too many metrics already.
        """
        value = float(feedback.value)
        if not self._is_prepared:
            self._prepare()
        with self._transaction() as database:
            former = database.execute(
                "SELECT value, idempotency_key FROM records WHERE ticket = ? AND metric = ?",
                (ticket_text, feedback.metric),
            ).fetchone()
            key = feedback.idempotency_key
            if former is not None and key is not None and former[1] == key:
                return False
            if former is None:
                self._check_room(database, ticket.alias, feedback.metric)
            database.execute(
                "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    ticket_text, feedback.metric, value, ticket.alias, ticket.arm.value, ticket.revision,
                    int(ticket.counted), feedback.comment, feedback.idempotency_key, int(time.time()),
                ),
            )  # fmt: skip
            old = None if former is None else float(former[0])
            self._add(database, ticket, feedback.metric, value, old, is_grouped=is_grouped)
        return former is None

    def sums(self) -> EpochCounters:
        """All sums, as the counters of this store's own epoch."""
        database = self._database()
        epoch = database.execute("SELECT value FROM facts WHERE name = 'epoch'").fetchone()[0]
        scores: dict[tuple[str, str, str], dict[str, Moments]] = {}
        groups: dict[tuple[str, ...], list[tuple[int, float]]] = {}
        for *key, group, n, total in database.execute("SELECT * FROM group_sums"):
            groups.setdefault(tuple(key), [(0, 0.0)] * GROUPS)[group] = (n, total)
        for alias, arm, revision, metric, n, total, squares in database.execute(
            "SELECT * FROM sums WHERE n > 0"
        ):
            scores.setdefault((alias, arm, revision), {})[metric] = Moments(
                n=n,
                sum=total,
                sum_squares=squares,
                groups=tuple(groups.get((alias, arm, revision, metric), ())),
            )
        return EpochCounters(
            epoch=f"feedback-{epoch}",
            arms=tuple(
                ArmCounters(alias=alias, arm=Arm(arm), revision=revision, scores=found)
                for (alias, arm, revision), found in sorted(scores.items())
            ),
        )

    def prune(self, days: int) -> int:
        """Delete records older than that; sums stay. Returns how many were deleted."""
        with self._transaction() as database:
            return database.execute(
                "DELETE FROM records WHERE at < ?", (int(time.time()) - days * SECONDS_PER_DAY,)
            ).rowcount

    def _prepare(self) -> None:
        with self._transaction() as database:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute("INSERT OR IGNORE INTO facts VALUES ('epoch', ?)", (uuid.uuid4().hex,))
        self._is_prepared = True

    def _put_aside(self) -> None:
        """Rename what is no database; its log must not be taken for the new one's."""
        self._local = threading.local()
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                file = self._path.with_name(FILE_NAME + suffix)
                file.replace(file.with_name(f"{FILE_NAME}.broken{suffix}"))

    def _check_room(self, database: sqlite3.Connection, alias: str, metric: str) -> None:
        known = {
            row[0] for row in database.execute("SELECT DISTINCT metric FROM sums WHERE alias = ?", (alias,))
        }
        if metric not in known and len(known) >= METRICS_PER_ALIAS:
            raise errors.bad_request(
                f"`{alias}` has {len(known)} metrics already: use one of them",
                param="metric",
                code="too_many_metrics",
            )

    def _add(
        self,
        database: sqlite3.Connection,
        ticket: Ticket,
        metric: str,
        value: float,
        old: float | None,
        *,
        is_grouped: bool,
    ) -> None:
        change = (1, value, value * value) if old is None else (0, value - old, value * value - old * old)
        if not ticket.counted:
            change = (0, 0.0, 0.0)  # its metric takes up room all the same
        key = (ticket.alias, ticket.arm.value, ticket.revision, metric)
        database.execute(
            "INSERT INTO sums VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n,"
            " sum = sum + excluded.sum, sum_squares = sum_squares + excluded.sum_squares",
            (*key, *change),
        )
        if is_grouped and ticket.counted:
            database.execute(
                "INSERT INTO group_sums VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " n = n + excluded.n, sum = sum + excluded.sum",
                (*key, ticket.group, *change[:2]),
            )

    def _database(self) -> sqlite3.Connection:
        """This thread's connection."""
        known: sqlite3.Connection | None = getattr(self._local, "database", None)
        if known is None:
            known = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
            known.execute("PRAGMA journal_mode = WAL")
            known.execute("PRAGMA synchronous = NORMAL")
            self._local.database = known
        return known

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._database()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")


class FeedbackDesk:
    """Takes feedback from clients; the file is written in a thread, so that no request waits for a disk."""

    def __init__(self, store: FeedbackStore, tickets: TicketOffice, *, days: int) -> None:
        """`days`: how long records are kept (see FeedbackStore.prune)."""
        self._store = store
        self._tickets = tickets
        self._days = days
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self.counts: dict[tuple[str, str, str], int] = {}
        """(alias, arm, metric) -> values taken."""
        self.changed = False
        self._told = ""
        """What was wrong with the store at the last request."""

    async def take(self, data: bytes, table: Table) -> Outcome:
        """Store a piece of feedback; the table says what is summed by group.

        Raises ApiError: 400 for a bad body or id, 503 when the store cannot write.
        """
        try:
            feedback = Feedback.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            raise errors.bad_request(f"{where}: {first['msg']}", param=where) from None
        self._check(feedback)
        text = feedback.response_id or feedback.request_id
        try:
            ticket = self._tickets.read(text)
        except BadTicketError as error:
            raise errors.bad_request(
                f"response_id: {error}", param="response_id", code="invalid_response_id"
            ) from None
        # Of an older answer the record may be deleted, and its value would count a second time.
        if ticket.minted_at < time.time() - self._days * SECONDS_PER_DAY:
            raise errors.bad_request(
                f"response_id: of an answer that is more than {self._days} days old (--feedback-days)",
                param="response_id",
                code="expired_response_id",
            )
        key = self._tickets.normalise(text)
        route = table.find(ticket.alias)
        is_grouped = route is not None and f"scores/{feedback.metric}" in route.grouped
        put = functools.partial(self._store.put, key, ticket, feedback, is_grouped=is_grouped)
        try:
            is_new = await asyncio.get_running_loop().run_in_executor(self._thread, put)
        except sqlite3.Error as error:
            if str(error) != self._told:  # a disk stays full for longer than one request
                logger.error("feedback cannot be stored: %s", error)
            self._told = str(error)
            raise ApiError(
                503, "feedback cannot be stored now", "api_error", "store_unavailable", retry_after=5
            ) from None
        self._told = ""
        if is_new:
            count = (ticket.alias, ticket.arm.value, feedback.metric)
            self.counts[count] = self.counts.get(count, 0) + 1
            self.changed = True
        answer = {
            "object": "feedback",
            "response_id": text,
            "metric": feedback.metric,
            "model": ticket.alias,
            "arm": ticket.arm.value,
            "revision": ticket.revision,
            "counted": ticket.counted,
        }
        return Outcome(is_new, json.dumps(answer).encode())

    def _check(self, feedback: Feedback) -> None:
        if bool(feedback.response_id) == bool(feedback.request_id):
            raise errors.bad_request("send either response_id or request_id", param="response_id")
        if _METRIC.fullmatch(feedback.metric) is None:
            raise errors.bad_request(
                "metric: up to 63 letters, digits, and . _ - inside; for example helpful", param="metric"
            )
        if not -_LARGEST <= feedback.value <= _LARGEST:  # also NaN; an integer may be too large for a float
            raise errors.bad_request("value: a boolean, or a number between -1e9 and 1e9", param="value")
