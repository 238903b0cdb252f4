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
        began = time.monotonic()
        layout, identity = self._setting.layout, self._setting.identity
        argv, environment = part.command(self._setting), part.environment(self._setting)
        fingerprint = parts.fingerprint(part, self._setting)
        record = processes.load(layout, part.name)
        alive = record is not None and record.find() is not None
        if record is None or not alive or record.fingerprint != fingerprint:
            if record is not None:
                self._report(f"{part.name}: " + ("changed, restarting" if alive else "was gone, restarting"))
            # What a killed part left behind (children, the file locks of its data) must not meet the new one.
            processes.stop(layout, identity, (part.name,), grace=part.grace)
            record = processes.start(
                part.name,
                argv,
                layout=layout,
                identity=identity,
                environment={**commands.base_environment(), **environment},
                fingerprint=fingerprint,
            )
            self._wait(part, record, stop)
            self._report(f"{part.name}: ready after {time.monotonic() - began:.1f} s")
        else:
            self._wait(part, record, stop)

    def _wait(self, part: parts.Part, record: processes.Record, stop: threading.Event) -> None:
        deadline = time.monotonic() + part.seconds
        pause = 0.05
        while not part.is_ready(self._setting):
            if record.find() is None:
                self._fail(part, record, "stopped by itself")
            if time.monotonic() > deadline:
                self._fail(part, record, f"was not ready within {part.seconds:.0f} s")
            if stop.wait(pause):
                return
            pause = min(pause * 1.3, 0.5)
        if record.find() is None:
            # Somebody else answered on its port, or it died just now.
            self._fail(part, record, "stopped by itself")

    def _fail(self, part: parts.Part, record: processes.Record, what: str) -> None:
        log = self._setting.layout.log(part.name)
        lines = processes.tail(log, 15, offset=record.log_offset)
        quoted = "\n".join(f"  {line[:300]}" for line in lines) or "  (nothing)"
        raise errors.LocalClusterError(
            f"{part.name} {what}. The end of its log {log}:\n{quoted}",
            remedy="Run `finetune local up` again; if it stays so, `finetune local down --purge` and `up`.",
        )
