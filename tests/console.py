"""Console lines of the documentation: found in its pages, and run as a reader would run them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import servers

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(?P<before>[^\n]*)\n+```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_SERVER = re.compile(r"steerbridge (serve|run .* llama-server) ")
_REASON = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and why its lines are not run, if they are not."""

    page: str
    kind: str
    text: str
    reason: str = ""

    @property
    def lines(self) -> list[str]:
        """Commands, without comments; a line that ends in a backslash goes on."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        commands = [re.sub(r"\s+# .*|^# .*", "", line).strip() for line in joined.splitlines()]
        return [command.removeprefix("$ ") for command in commands if command]


def pages() -> list[Path]:
    """Every page of the repository."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path, *kinds: str) -> list[Block]:
    """The blocks of these kinds in a page, in order."""
    listed = []
    for match in _BLOCK.finditer(path.read_text("utf-8")):
        if match["kind"] in kinds:
            reason = _REASON.search(match["before"])
            name = str(path.relative_to(ROOT))
            listed.append(Block(name, match["kind"], match["text"], reason[1] if reason else ""))
    return listed


@dataclass
class Shell:
    """Runs console lines in a folder, those of servers in the background.

    Args:
        folder: the working directory.
        path: folders to put before PATH.
    """

    folder: Path
    path: tuple[Path, ...] = ()
    output: str = field(default="", init=False)

    def run(self, block: Block) -> str:
        """Run the lines of a block: what they print. A line that fails raises.

        A server runs until the next one starts, or the block ends.
        """
        start = len(self.output)
        named = re.findall(r"\b(8080|9100)\b", block.text)
        ports = {port: str(servers.free_port()) for port in named}
        with contextlib.ExitStack() as running:
            for line in block.lines:
                for port, free in ports.items():
                    line = line.replace(port, free)
                if _SERVER.match(line):
                    running.close()  # the next one may want the same port
                    running.enter_context(self._server(line))
                else:
                    self._run(line)
        return self.output[start:]

    @property
    def environment(self) -> dict[str, str]:
        folders = [*map(str, self.path), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {**os.environ, "PATH": os.pathsep.join(folders)}

    def _run(self, line: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        self.output += done.stdout

    @contextlib.contextmanager
    def _server(self, line: str) -> Iterator[None]:
        [port] = re.findall(r"--port (\d+)", line)
        log = self.folder / "server.txt"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                cwd=self.folder,
                env=self.environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
            try:
                while not _healthy(f"http://127.0.0.1:{port}/health"):
                    assert process.poll() is None, f"{line}\n{log.read_text()[-2000:]}"
                    time.sleep(0.1)
                yield
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
                self.output += log.read_text(errors="replace")


def _healthy(url: str) -> bool:
    with contextlib.suppress(OSError, urllib.error.URLError):
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    return False
