"""Reports events: lines in the server's own log, and one JSON line per event.

Events are those of `steerbridge run` (docs/run.md), written to STEERBRIDGE_EVENTS, a file or a
listening socket. Every rank of a sharded model says that it is steered, with the word of this run;
all decide the same, so only rank 0 reports verdicts.
"""

from __future__ import annotations

import json
import math
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any

from steerbridge.fingerprint import ModelFacts
from steerbridge.runtime import Outcome


class Reporter:
    """Reports the events of one model."""

    def __init__(self, model: Any, known: ModelFacts) -> None:
        self._known, self._first = known, getattr(model, "rank", 0) == 0
        self._dtype = str(model.dtype).removeprefix("torch.")
        where = os.environ.get("STEERBRIDGE_EVENTS", "")
        self._sink = _open(where) if where else None

    def active(self, calibrated: bool) -> None:
        """The package is attached; no request has been answered yet."""
        self._log("INFO", f"Steerbridge steers {self._known.name} ({self._dtype})")
        self._event(
            "active",
            model=self._known.name,
            architecture=self._known.model_type,
            n_embd=self._known.hidden_size,
            n_layer=self._known.num_layers,
            calibrated=calibrated,
            nonce=os.environ.get("STEERBRIDGE_NONCE", ""),
        )

    def verdict(self, request: int, outcome: Outcome) -> None:
        """A prompt was decided."""
        if not self._first:
            return
        probes = [
            {
                "probe": v.probe,
                "score": v.score if math.isfinite(v.score) else None,
                "threshold": v.threshold,
                "fired": v.fired,
                **({"unjudged": v.unjudged} if v.unjudged else {}),
                **({"fired_in": v.fired_in} if v.fired_in else {}),
                **({} if v.row is None else {"row": v.row}),
            }
            for v in outcome.verdicts
        ]
        scores = ", ".join(f"{v.probe} {v.score:.4f}" for v in outcome.verdicts)
        result = f"fired {', '.join(outcome.rules)}" if outcome.rules else "not fired"
        self._log("INFO" if outcome.rules else "DEBUG", f"request {request}: {result} ({scores})")
        self._event("verdict", request=request, probes=probes, fired=list(outcome.rules))

    def _log(self, level: str, text: str) -> None:
        if not self._first:
            return
        from loguru import logger

        # The server's log drops records of other packages.
        named: Any = logger.patch(lambda r: r.update(name="text_generation_server.steerbridge"))
        named.log(level, text)

    def _event(self, kind: str, **fields: Any) -> None:
        if self._sink is None:
            return
        head = {"event": kind, "pid": os.getpid(), "time": time.time()}
        line = (json.dumps({**head, **fields}) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._sink, line) :]
        except OSError as error:
            self._sink = None
            self._log("ERROR", f"Steerbridge stops writing events: {error}")


def _open(where: str) -> int:
    """A file descriptor that stays open for the life of the process."""
    path = Path(where)
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(where)
        return connection.detach()
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
