"""Reports events: lines in the server's own log, and one JSON line per event.

Every rank of a sharded model says that it is steered, with the word of this run; all decide the
same, so only rank 0 reports verdicts.
"""

from __future__ import annotations

from typing import Any

from steerbridge.events import Events
from steerbridge.fingerprint import ModelFacts
from steerbridge.runtime import Outcome


class Reporter:
    """Reports the events of one model."""

    def __init__(self, model: Any, known: ModelFacts) -> None:
        self._known, self._first = known, getattr(model, "rank", 0) == 0
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._events = Events(lambda why: self._log("ERROR", why))

    def active(self, calibrated: bool) -> None:
        """The package is attached; no request has been answered yet."""
        self._log("INFO", f"Steerbridge steers {self._known.name} ({self._dtype})")
        self._events.active(self._known, calibrated)

    def verdict(self, request: int, outcome: Outcome) -> None:
        """A prompt was decided."""
        if not self._first:
            return
        scores = ", ".join(f"{v.probe} {v.score:.4f}" for v in outcome.verdicts)
        result = f"fired {', '.join(outcome.rules)}" if outcome.rules else "not fired"
        self._log("INFO" if outcome.rules else "DEBUG", f"request {request}: {result} ({scores})")
        self._events.verdict(request, outcome)

    def _log(self, level: str, text: str) -> None:
        if not self._first:
            return
        from loguru import logger

        # The server's log drops records of other packages.
        named: Any = logger.patch(lambda r: r.update(name="text_generation_server.steerbridge"))
        named.log(level, text)
