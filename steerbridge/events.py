"""One JSON line an event, from inside another program: those of `steerbridge run` (docs/run.md)."""

from __future__ import annotations

import json
import math
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerbridge.fingerprint import ModelFacts
from steerbridge.runtime import Outcome


class Events:
    """Writes events to STEERBRIDGE_EVENTS, a file or a listening socket, if it is set.

    Args:
        failed: told once, why events are no longer written.
    """

    def __init__(self, failed: Callable[[str], None]) -> None:
        where = os.environ.get("STEERBRIDGE_EVENTS", "")
        self._sink = _open(where) if where else None
        self._failed = failed

    def active(self, known: ModelFacts, calibrated: bool) -> None:
        """The package is attached; no request has been answered yet."""
        self.write(
            "active",
            model=known.name,
            architecture=known.model_type,
            n_embd=known.hidden_size,
            n_layer=known.num_layers,
            calibrated=calibrated,
            nonce=os.environ.get("STEERBRIDGE_NONCE", ""),
        )

    def verdict(self, request: int | str, outcome: Outcome) -> None:
        """A prompt was decided."""
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
        self.write("verdict", request=request, probes=probes, fired=list(outcome.rules))

    def write(self, kind: str, **fields: Any) -> None:
        """Any event."""
        if self._sink is None:
            return
        head = {"event": kind, "pid": os.getpid(), "time": time.time()}
        line = (json.dumps({**head, **fields}) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._sink, line) :]
        except OSError as error:
            self._sink = None
            self._failed(f"Steerbridge stops writing events: {error}")


def _open(where: str) -> int:
    """A file descriptor that stays open for the life of the process."""
    path = Path(where)
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(where)
        return connection.detach()
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
