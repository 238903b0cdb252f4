"""Users of the help desk: they send tickets to the router, look at the answers, and say whether the category was right.

eval "$(finetune local env)"; python examples/quickstart/users.py --seconds 60

The tickets are those of heldout.jsonl. Each user keeps a name, so the router keeps them on one side of a comparison.
Without --seconds and --requests they go on until they are interrupted. The last thing printed is a table per revision.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
KEYS = {"category", "priority", "summary"}
REPORT_SECONDS = 10.0


@dataclass
class Tally:
    """What users saw of one revision."""

    answers: int = 0
    valid: int = 0  # the answer is JSON with the three keys
    right: int = 0  # and its category is the expected one
    seconds: float = 0.0
    first_invalid: float | None = None  # Unix time
    last: float | None = None  # Unix time


@dataclass
class Diary:
    """What happened so far; written by all users, who share one thread."""

    began: float = field(default_factory=time.time)
    sent: int = 0
    failed: int = 0
    revisions: dict[str, Tally] = field(default_factory=dict)

    def note(self, revision: str, expected: dict[str, Any], text: str, seconds: float) -> bool:
        """Counts an answer and returns whether its category is right."""
        tally = self.revisions.setdefault(revision, Tally())
        answer = parse(text)
        right = answer is not None and answer["category"] == expected["category"]
        tally.answers += 1
        tally.valid += answer is not None
        tally.right += right
        tally.seconds += seconds
        tally.last = time.time()
        if answer is None and tally.first_invalid is None:
            tally.first_invalid = tally.last
        return right

    def line(self) -> str:
        parts = [
            f"{name} {tally.answers} ({tally.valid} JSON, {tally.right} right)"
            for name, tally in self.revisions.items()
        ]
        failed = f"; {self.failed} requests failed" if self.failed else ""
        return f"{time.time() - self.began:4.0f} s: " + (", ".join(parts) or "no answer yet") + failed


def parse(text: str) -> dict[str, Any] | None:
    """The answer if it is what was asked for: a JSON object with category, priority and summary."""
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        return None
    return answer if isinstance(answer, dict) and set(answer) == KEYS else None


class Users:
    """Many users, a few of them at a time."""

    def __init__(self, options: argparse.Namespace, client: openai.AsyncOpenAI) -> None:
        self.options = options
        self.client = client
        self.diary = Diary()
        self.random = random.Random(options.seed)
        self.names = [f"user-{number}" for number in range(options.users)]
        self.tickets = self.endless_tickets()
        self.over = asyncio.Event()

    def endless_tickets(self) -> Iterator[tuple[list[dict[str, str]], dict[str, Any]]]:
        """Question and expected answer; all tickets in turn, in another order each time."""
        lines = (HERE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line)["messages"] for line in lines]
        while True:
            for *question, answer in self.random.sample(rows, len(rows)):
                yield question, json.loads(answer["content"])

    async def play(self) -> Diary:
        timers = [asyncio.create_task(self.report())]
        if self.options.seconds:
            timers.append(asyncio.create_task(self.stop_later()))
        await asyncio.gather(*(self.one_after_the_other() for _ in range(self.options.concurrency)))
        for timer in timers:
            timer.cancel()
        return self.diary

    async def one_after_the_other(self) -> None:
        while not self.over.is_set():
            if self.options.requests and self.diary.sent >= self.options.requests:
                return
            self.diary.sent += 1
            try:
                await self.ask(self.random.choice(self.names))
            except openai.APIError as error:
                self.diary.failed += 1
                print(f"request failed: {type(error).__name__}: {error}", file=sys.stderr)
                await asyncio.sleep(1)

    async def ask(self, user: str) -> None:
        """One ticket, and what the user says of the answer."""
        question, expected = next(self.tickets)
        began = time.monotonic()
        raw = await self.client.chat.completions.with_raw_response.create(
            model=self.options.model,
            messages=question,  # type: ignore[arg-type]
            max_tokens=self.options.max_tokens,
            temperature=0,
            user=user,
        )
        answer = raw.parse()
        revision = raw.headers.get("x-adapter-revision") or self.options.model
        text = answer.choices[0].message.content or ""
        right = self.diary.note(revision, expected, text, time.monotonic() - began)
        if self.options.feedback:
            await self.client.post(
                "/feedback",
                body={"response_id": answer.id, "metric": "right_category", "value": right},
                cast_to=object,
            )

    async def report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            print(self.diary.line(), flush=True)

    async def stop_later(self) -> None:
        await asyncio.sleep(self.options.seconds)
        self.over.set()


async def main() -> None:
    options = parse_options()
    async with openai.AsyncOpenAI(
        base_url=options.url, api_key=options.api_key, timeout=120, max_retries=0
    ) as client:
        users = Users(options, client)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, users.over.set)
        diary = await users.play()
    if options.summary:
        options.summary.write_text(json.dumps(asdict(diary), indent=1), encoding="utf-8")
    print_table(diary)
    if not diary.revisions:
        raise SystemExit(f"no answer from {options.url}")


def print_table(diary: Diary) -> None:
    table = Table(title=f"{diary.sent} requests in {time.time() - diary.began:.0f} s, {diary.failed} failed")
    for heading in ("revision", "answers", "valid JSON", "right category", "seconds each"):
        table.add_column(heading, justify="left" if heading == "revision" else "right")
    for name, tally in diary.revisions.items():
        shares = (f"{100 * count / tally.answers:.0f} %" for count in (tally.valid, tally.right))
        table.add_row(name, str(tally.answers), *shares, f"{tally.seconds / tally.answers:.1f}")
    Console().print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--url", default=os.environ.get("OPENAI_BASE_URL"), help="with /v1 (default: OPENAI_BASE_URL)"
    )
    parser.add_argument("--model", default="support-triage", help="alias (default: support-triage)")
    parser.add_argument("--api-key", default="none", help="where the router asks for one")
    parser.add_argument("--users", type=int, default=200, help="how many names there are (default: 200)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (default: 8)")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--requests", type=int, help="stop after this many requests")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default: 64)")
    parser.add_argument("--seed", type=int, default=7, help="of the choice of users and tickets (default: 7)")
    parser.add_argument("--no-feedback", dest="feedback", action="store_false", help="say nothing of answers")
    parser.add_argument("--summary", type=Path, help="write what was counted to this JSON file")
    options = parser.parse_args()
    if not options.url:
        parser.error("say where the router is: --url, or OPENAI_BASE_URL")
    return options


if __name__ == "__main__":
    asyncio.run(main())
