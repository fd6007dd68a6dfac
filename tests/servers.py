"""Servers of the tests and benchmarks: started on a free loopback port, waited for, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    pid: int


def free_port() -> int:
    """A port on the loopback interface that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[object],
    output: Path,
    *,
    ready: str = "/health",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """A server from its command, to which `--host` and `--port` are added.

    Ended as a user would end it (SIGTERM, then waited for). What it prints goes to `output`.

    Args:
        ready: a path that answers 200 once it is.
        environment: variables to add.

    Raises:
        RuntimeError: it ended instead; with the end of what it printed.
    """
    port = free_port()
    address = ["--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [*map(str, command), *address],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            while not _answers(url + ready):
                if process.poll() is not None:
                    raise RuntimeError(output.read_text()[-3000:])
                time.sleep(0.05)
            yield Running(url, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                # Its signal handler takes a lock that the interrupted thread may hold.
                if not any("llama-server" in str(word) for word in command):
                    raise


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False
