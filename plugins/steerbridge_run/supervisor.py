"""Runs the program and forwards the events of its preload: JSON log, metrics, notes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, Final, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SCORES: Final = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


class Metrics:
    """Prometheus counters of verdicts, refusals and failures."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self._contexts = Gauge("steerbridge_contexts", "Steered contexts opened", registry=own)
        self._verdicts = Counter(
            "steerbridge_verdicts", "Verdicts on prompts", ["fired"], registry=own
        )
        self._fired = Counter(
            "steerbridge_fired", "Requests in which a rule fired", ["fired_in"], registry=own
        )
        self._rules = Counter("steerbridge_rules_fired", "Rules fired", ["rule"], registry=own)
        self._ended = Counter(
            "steerbridge_stopped", "Requests not answered", ["event"], registry=own
        )
        self._scores = Histogram(
            "steerbridge_score", "Scores of probes", ["probe"], buckets=_SCORES, registry=own
        )

    def count(self, event: Mapping[str, Any]) -> None:
        """Count one event."""
        kind = event["event"]
        if kind == "active":
            self._contexts.inc()
        elif kind == "verdict":
            self._verdicts.labels(str(bool(event["fired"])).lower()).inc()
            if event["fired"]:
                self._fired.labels("prompt").inc()
            for rule in event["fired"]:
                self._rules.labels(rule).inc()
            for probe in event["probes"]:
                if probe["score"] is not None:
                    self._scores.labels(probe["probe"]).observe(probe["score"])
        elif kind == "answer":
            self._fired.labels("answer").inc()
        elif kind in ("refused", "failed", "stopped"):
            self._ended.labels(kind).inc()

    def serve(self, port: int) -> None:
        """Serve the metrics on the loopback address."""
        start_http_server(port, addr="127.0.0.1", registry=self.registry)


def open_log(where: str) -> TextIO:
    """A file to append to, or `unix:PATH`, a listening socket.

    Raises:
        OSError: it cannot be opened.
    """
    kind, colon, path = where.partition(":")
    if kind != "unix" or not colon:
        return Path(where).open("a", encoding="utf-8")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        return connection.makefile("w", encoding="utf-8")


class Supervisor:
    """Listens to the preloads of a program and its children.

    Args:
        address: path of the socket to create; `STEERBRIDGE_EVENTS` of the program.
        log: receives every event as a JSON line; None: no log.
        nonce: what a preload answers with.
    """

    def __init__(
        self, address: Path, log: TextIO | None, metrics: Metrics, nonce: str = ""
    ) -> None:
        self.active = 0
        self.stopped = ""
        """Why the processes were ended from outside, if they were."""
        self._nonce, self._answered, self._attached = nonce, set[int](), set[int]()
        self._log, self._metrics = log, metrics
        self._lock = threading.Lock()
        self._readers: list[threading.Thread] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(address))
        self._socket.listen()
        self._listener = threading.Thread(target=self._accept, daemon=True)
        self._listener.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # shut down
                return
            reader = threading.Thread(target=self._read, args=(connection,), daemon=True)
            self._readers.append(reader)
            reader.start()

    def _read(self, connection: socket.socket) -> None:
        with connection, connection.makefile("r", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # the program was killed while writing a line
        if event["event"] == "loaded":
            if event["nonce"] == self._nonce:
                self._answered.add(event["pid"])
            return
        with self._lock:
            if event["event"] == "active":
                self.active += 1
                if "nonce" in event:  # of the plugins for TGI and vLLM; it belongs in no log
                    if event.pop("nonce") == self._nonce:
                        self._attached.add(event["pid"])
                    line = json.dumps(event) + "\n"
                note(f"active in process {event['pid']}: {event['model']}")
            self._metrics.count(event)
            self._write(line)

    def answered(self, pid: int) -> bool:
        """Whether the preload of a process has said that it is there."""
        return pid in self._answered

    def attached(self) -> Set[int]:
        """The processes of TGI and vLLM that have said that the package is attached."""
        return frozenset(self._attached)

    def stop(self, reason: str) -> None:
        """Tell that the processes are ended from outside."""
        self.stopped = reason
        note(reason)
        event = {"event": "stopped", "pid": os.getpid(), "time": time.time(), "reason": reason}
        with self._lock:
            self._metrics.count(event)
            self._write(json.dumps(event) + "\n")

    def _write(self, line: str) -> None:
        """Close a log that fails: events must still be read, or the program would block."""
        if self._log is None:
            return
        try:
            self._log.write(line)
            self._log.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None
            note(f"the log is given up: {error}")

    def is_active(self, seconds: float) -> bool:
        """Whether a process has said that a model is guarded; waits so long for it."""
        end = time.monotonic() + seconds
        while not self.active and time.monotonic() < end:
            time.sleep(0.01)
        return self.active > 0

    def close(self, seconds: float = 2.0) -> None:
        """Read the events sent before the program ended."""
        self._socket.shutdown(socket.SHUT_RDWR)  # accept() still returns what has connected
        self._listener.join(seconds)
        self._socket.close()
        for reader in self._readers:
            reader.join(seconds)
        with self._lock:
            self._log = None  # a process that outlives the program may still send


def note(text: str) -> None:
    """Print a line to standard error, which the program shares."""
    print(f"steerbridge: {text}", file=sys.stderr, flush=True)


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the program to its end and return its exit code (128 + n for a signal n).

    Termination signals are forwarded to the program, which ends as it would without Steerbridge.
    """
    with ExitStack() as stack:
        child = subprocess.Popen(command, env=environment)

        def forward(number: int, _frame: FrameType | None) -> None:
            # The terminal has sent Ctrl-C to the program itself.
            if number != signal.SIGINT or not sys.stdin.isatty():
                child.send_signal(number)

        for number in _FORWARDED:
            stack.callback(signal.signal, number, signal.signal(number, forward))
        code = child.wait()
    return 128 - code if code < 0 else code
