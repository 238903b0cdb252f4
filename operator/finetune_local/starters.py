"""Bringing one part to life: leave it, restart it, wait for it, and tell why it did not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from finetune_local import commands, errors, parts, processes


class Starter:
    """Brings one part to life."""

    def __init__(self, setting: commands.Setting, report: Callable[[str], None]) -> None:
        self._setting = setting
        self._report = report

    def ensure(self, part: parts.Part, stop: threading.Event) -> None:
        """Leave it alone when it runs as wanted; else start it. Then wait until it is ready."""
        record = processes.load(self._setting.layout, part.name)
        reason = self._reason_to_start(part, record)
        if reason is None and record is not None:
            # It may be dying just now (Ray notices the death of one of its processes after a while).
            if self._await_ready(part, record, stop) is None:
                return
            reason = "went down"
        if reason and record is not None:
            self._report(f"{part.name}: {reason}, restarting")
        self._start(part, stop)

    def _reason_to_start(self, part: parts.Part, record: processes.Record | None) -> str | None:
        """None when the part runs as wanted."""
        if record is None or record.find() is None:
            return "was gone"
        return "changed" if record.fingerprint != parts.fingerprint(part, self._setting) else None

    def _start(self, part: parts.Part, stop: threading.Event) -> None:
        began = time.monotonic()
        layout, identity = self._setting.layout, self._setting.identity
        # What a killed part left behind (children, the file locks of its data) must not meet the new one.
        processes.stop(layout, identity, (part.name,), grace=part.grace)
        argv = part.command(self._setting)
        try:
            record = processes.start(
                part.name,
                argv,
                layout=layout,
                identity=identity,
                environment={**commands.base_environment(), **part.environment(self._setting)},
                fingerprint=parts.fingerprint(part, self._setting),
                nice=part.nice,
            )
        except OSError as error:
            raise errors.LocalClusterError(
                f"{part.name} cannot be started: {error.filename or argv[0]}: {error.strerror or error}",
                remedy=f"Where {argv[0]} is damaged, delete it: `finetune local up` then gets it anew.",
            ) from error
        if problem := self._await_ready(part, record, stop):
            self._fail(part, record, problem)
        if not stop.is_set():
            self._report(f"{part.name}: ready after {time.monotonic() - began:.1f} s")

    def _await_ready(self, part: parts.Part, record: processes.Record, stop: threading.Event) -> str | None:
        """None when the part is ready (or another one failed), else what is wrong with it."""
        deadline = time.monotonic() + part.seconds
        pause = 0.05
        while not part.is_ready(self._setting):
            if record.find() is None:
                return "stopped by itself"
            if time.monotonic() > deadline:
                return f"was not ready within {part.seconds:.0f} s"
            if stop.wait(pause):
                return None
            pause = min(pause * 1.3, 0.5)
        # Somebody else may have answered on its port, or it died just now.
        return "stopped by itself" if record.find() is None else None

    def _fail(self, part: parts.Part, record: processes.Record, what: str) -> None:
        log = self._setting.layout.log(part.name)
        lines = processes.tail(log, 15, offset=record.log_offset)
        quoted = "\n".join(f"  {line[:300]}" for line in lines) or "  (nothing)"
        raise errors.LocalClusterError(
            f"{part.name} {what}. The end of its log {log}:\n{quoted}",
            remedy="Run `finetune local up` again; if it stays so, `finetune local down --purge` and `up`.",
        )
