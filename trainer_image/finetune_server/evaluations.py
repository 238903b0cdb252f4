"""Golden rows through an engine, as users would ask, and the share of right answers."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import tempfile
import zlib
from collections.abc import Awaitable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from finetune_server import threads
from finetune_server.engine_client import EngineClient, EngineError
from finetune_trainer import storage
from finetune_trainer.failures import TrainerError

LOG = logging.getLogger("finetune_server.evaluations")
CONCURRENCY = 4  # questions at once: an evaluation runs beside users' requests
ANSWER_SECONDS = 300.0
ROWS_SECONDS = 900.0  # to read the rows; as for an adapter
KEPT = 64  # evaluations that are remembered


class Scorer(StrEnum):
    EXACT_MATCH = "ExactMatch"  # the answer is the reference, apart from blanks around it
    JSON_VALID = "JsonValid"  # the answer is JSON; with fields: an object that has them
    JSON_FIELDS = "JsonFields"  # the named fields of both JSON objects are equal
    CONTAINS = "Contains"  # the reference is part of the answer


class State(StrEnum):
    RUNNING = "Running"
    DONE = "Done"
    FAILED = "Failed"


class BadRows(Exception):  # noqa: N818  a user's mistake
    """The data cannot be used; the message names the line."""


@dataclass(frozen=True)
class Task:
    identity: str
    models: tuple[str, ...]
    dataset: str  # URI of a JSONL file
    scorer: Scorer
    fields: tuple[str, ...]
    max_rows: int
    max_tokens: int


@dataclass(frozen=True)
class Row:
    question: list[dict[str, Any]]  # messages before the reference
    reference: str
    prompt: str | None = None  # the question as plain text, for models without chat template


@dataclass
class Evaluation:
    task: Task
    state: State = State.RUNNING
    message: str = ""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {
            "id": self.task.identity,
            "state": self.state,
            "message": self.message,
            "scores": self.scores,
        }


class Evaluations:
    """Running and finished evaluations of one agent."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._all: dict[str, Evaluation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._gate = asyncio.Semaphore(CONCURRENCY)

    def start(self, task: Task) -> Evaluation:
        """Starts an evaluation; one with the same id that runs or is done is returned as it is."""
        known = self._all.get(task.identity)
        if known is not None and known.state is not State.FAILED:
            return known
        evaluation = self._all[task.identity] = Evaluation(task)
        for old in list(self._all)[:-KEPT]:
            if self._all[old].state is not State.RUNNING:
                del self._all[old]
        running = asyncio.create_task(self._run(evaluation), name=f"evaluation {task.identity}")
        self._tasks.add(running)
        running.add_done_callback(self._tasks.discard)
        return evaluation

    def find(self, identity: str) -> Evaluation | None:
        return self._all.get(identity)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, evaluation: Evaluation) -> None:
        task = evaluation.task
        try:
            rows = await _fetch_rows(task)
            facts = await self._client.observe()
            missing = [name for name in task.models if name not in {*facts.base_models, *facts.adapters}]
            if missing:
                raise EngineError(f"the engine does not serve {', '.join(missing)}")
            for model in task.models:
                hits = await self._ask_all(model, rows, task)
                evaluation.scores[model] = {"score": sum(hits) / len(rows), "rows": len(rows)}
        except (BadRows, EngineError) as error:
            evaluation.state, evaluation.message = State.FAILED, str(error)
            LOG.warning("evaluation %s failed: %s", task.identity, error)
        except Exception as error:  # whoever waits for it must hear that no score will come
            evaluation.state = State.FAILED
            evaluation.message = f"the agent failed: {type(error).__name__}; its log says more"
            LOG.exception("evaluation %s ended unexpectedly", task.identity)
        else:
            evaluation.state = State.DONE

    async def _ask_all(self, model: str, rows: list[Row], task: Task) -> list[bool]:
        try:
            # The first failure spares the engine the other questions.
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(self._ask(model, row, task)) for row in rows]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [one.result() for one in asked]

    async def _ask(self, model: str, row: Row, task: Task) -> bool:
        async with self._gate:
            answer = await self._answer(model, row, task)
        return is_right(answer, row.reference, task.scorer, task.fields)

    async def _answer(self, model: str, row: Row, task: Task) -> str:
        def ask(question: list[dict[str, Any]] | str) -> Awaitable[str]:
            return self._client.ask(model, question, max_tokens=task.max_tokens, seconds=ANSWER_SECONDS)

        try:
            return await ask(row.question)
        except EngineError as error:
            if row.prompt is None or error.status != 400 or "chat template" not in str(error):
                raise
        return await ask(row.prompt)


async def _fetch_rows(task: Task) -> list[Row]:
    try:
        async with asyncio.timeout(ROWS_SECONDS):
            return await threads.apart(lambda: read_rows(task.dataset, limit=task.max_rows))
    except TimeoutError:
        raise BadRows(f"{task.dataset} was not read within {ROWS_SECONDS:g} s") from None


def read_rows(uri: str, *, limit: int) -> list[Row]:
    """Returns the first rows of a JSONL file. Raises BadRows, which names the line."""
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-rows-") as work:
            path = storage.local_path(uri) or storage.fetch_file(uri, Path(work))
            content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        # As training reads rows; splitlines() would also cut at U+2028 and others, which a JSON string may hold.
        lines = content.decode("utf-8-sig").split("\n")
    except Exception as error:
        if not (
            storage.is_failure(error) or isinstance(error, EOFError | zlib.error | ValueError | TrainerError)
        ):
            raise
        raise BadRows(f"{uri} cannot be read: {storage.describe_error(error)}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise BadRows(f"{uri} holds no rows")
    return [_parse_row(line, where=f"{uri} line {number}") for number, line in numbered[:limit]]


def _parse_row(line: str, *, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRows(f"{where} is not JSON") from None
    if not isinstance(row, dict):
        raise BadRows(f"{where} is not a JSON object")
    if isinstance(row.get("messages"), list):
        return _parse_turns(row["messages"], where=where)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        # A question to a chat model, as training reads such rows when the model has a chat template.
        return Row([{"role": "user", "content": prompt}], completion, prompt)
    if isinstance(prompt, list) and isinstance(completion, list) and prompt and completion:
        return _parse_turns([*prompt, completion[-1]], where=where)
    raise BadRows(f"{where} has neither messages nor prompt and completion")


def _parse_turns(turns: list[Any], *, where: str) -> Row:
    last = turns[-1] if turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or len(turns) < 2:
        raise BadRows(f"{where}: the last of the messages must be the assistant's, after a question")
    return Row(turns[:-1], str(last.get("content") or ""))


def is_right(answer: str, reference: str, scorer: Scorer, fields: tuple[str, ...]) -> bool:
    """Says whether an answer is right."""
    match scorer:
        case Scorer.EXACT_MATCH:
            return answer.strip() == reference.strip()
        case Scorer.CONTAINS:
            return reference.strip() in answer
        case Scorer.JSON_VALID:
            found = _parse(answer)
            return found is not _INVALID and (
                not fields or (isinstance(found, dict) and all(name in found for name in fields))
            )
        case Scorer.JSON_FIELDS:
            found, right = _parse(answer), _parse(reference)
            return (
                isinstance(found, dict)
                and isinstance(right, dict)
                and all(name in found and name in right and found[name] == right[name] for name in fields)
            )


_INVALID = object()


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _INVALID


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
