"""The kit's drivers for unmodified programs under `steerbridge run`.

llama-server, a Python script and a script for node run as their users run them; verdicts are read
from the log of `run`.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from asked_programs import (
    SLOTS,
    Answer,
    Program,
    ProgramFailed,
    Start,
    llama_server,
    node_script,
    python_script,
)
from helpers import CLI
from steerbridge.errors import SteerbridgeError, SteeringFailed
from steerbridge.package import SteeringPackage
from steerbridge.reference import Verdict
from steerbridge.runtime import Outcome
from steerbridge.testing.driver import Ability, Files, How, Reply
from steerbridge.testing.model import CONTEXT

WAIT: Final = 3.0  # seconds for a verdict in the log
SETTLE: Final = 0.1  # seconds until what a program did before it was ready is in the log
_REFUSALS: Final = ("refused", "failed", "stopped")


class Log:
    """The events of one program in the log of `steerbridge run`; each verdict is taken once.

    Args:
        context: number of the context whose verdicts count; that of a draft model has others.
    """

    def __init__(self, path: Path, package: SteeringPackage, context: int) -> None:
        self._path, self._context = path, context
        self._probes = {probe.id: probe for probe in package.spec.probes}
        readings = [probe.token_reading for probe in package.spec.probes]
        self._answers = any(r is not None and r.scope != "prompt" for r in readings)
        self._taken = self._refused = self._warm_up = 0

    def ready(self) -> None:
        """The program is: verdicts until now are of its warm-up."""
        time.sleep(SETTLE)
        self._warm_up = len(self._events("verdict"))

    def verdicts(self, count: int) -> list[Mapping[str, Any]]:
        """The next verdicts on requests, once there are so many.

        Raises:
            AssertionError: they do not come, or more than those have come.
        """
        until = time.monotonic() + WAIT
        if self._answers:
            time.sleep(SETTLE)  # whether something came behind a verdict is not known
        while len(events := self._main()[self._taken :]) < count:
            assert time.monotonic() < until, "no verdict in the log"
            time.sleep(0.01)
        self._taken += count
        assert len(events) == count, f"{len(events)} verdicts on {count} requests: {events}"
        return events

    def refusal(self) -> str:
        """Why the last request was refused; empty if the log does not say that it was."""
        until = time.monotonic() + 1
        while len(events := self._events(*_REFUSALS)) == self._refused:
            if time.monotonic() > until:
                return ""
            time.sleep(0.01)
        self._refused = len(events)
        return str(events[-1]["reason"])

    def outcome(self, event: Mapping[str, Any]) -> Outcome:
        """A verdict event as an outcome."""
        verdicts = tuple(self._verdict(entry) for entry in event["probes"])
        return Outcome(verdicts, tuple(event["fired"]))

    def _verdict(self, entry: Mapping[str, Any]) -> Verdict:
        comparator = self._probes[entry["probe"]].comparator
        missing = "its score is not finite" if entry["score"] is None else ""
        return Verdict(
            entry["probe"],
            math.nan if entry["score"] is None else entry["score"],
            entry["threshold"],
            comparator,
            entry["fired"],
            entry.get("unjudged", missing if entry["fired"] else ""),
            entry.get("fired_in", ""),
            entry.get("row"),
        )

    def _main(self) -> list[Mapping[str, Any]]:
        """Verdicts on requests."""
        told: list[Mapping[str, Any]] = []
        for event in self._events("verdict", "answer"):
            if event["event"] == "verdict":
                told.append(event)
                continue
            place = (event["context"], event["sequence"])
            same = [i for i, e in enumerate(told) if (e["context"], e["sequence"]) == place]
            told[same[-1]] = event
        return [event for event in told[self._warm_up :] if event["context"] == self._context]

    def _events(self, *kinds: str) -> list[Mapping[str, Any]]:
        text = self._path.read_text("utf-8") if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        return [e for e in map(json.loads, whole.splitlines()) if e["event"] in kinds]


# ---------------------------------------------------------------- driver


class Running:
    """A model in a program. One that drafts, or keeps several conversations, is started when that
    is asked for, in place of the last one."""

    def __init__(
        self, driver: RunDriver, files: Files, package: SteeringPackage | None, folder: Path
    ) -> None:
        self._driver, self._files, self._package, self._folder = driver, files, package, folder
        self._stack, self._starts = ExitStack(), 0
        self._kind: tuple[str, int] = ("", 1)
        self._start(*self._kind)

    def ask(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:
        before = self._kind[1] if self._kind[0] == how.drafts else 1
        sequences = SLOTS if how.threads or how.sequence else before
        if (how.drafts, sequences) != self._kind:
            self._start(how.drafts, sequences)
        if how.threads:
            return self._at_once(prompts, new, how)
        replies = []
        for prompt in prompts:
            answers = self._answers(prompt, new, how, how.sequence)
            event = self._log.verdicts(1)[0] if self._log else None
            replies += [self._reply(answer, event) for answer in answers]
        return replies

    def _at_once(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:
        """Each prompt from a client of its own, on a sequence of its own."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            jobs = [pool.submit(self._answers, p, new, how, i) for i, p in enumerate(prompts)]
            answers = [job.result()[0] for job in jobs]
        events = self._log.verdicts(len(prompts)) if self._log else []
        by_sequence = {event["sequence"]: event for event in events}
        assert len(by_sequence) == len(events), "two verdicts on one sequence"
        return [self._reply(answer, by_sequence.get(i)) for i, answer in enumerate(answers)]

    def _answers(self, prompt: str, new: int, how: How, sequence: int) -> list[Answer]:
        try:
            return self._program.answers(prompt, new, how, sequence)
        except ProgramFailed as error:
            if not error.tokens:
                self._refused(error)
            raise

    def _refused(self, error: ProgramFailed) -> None:
        """Raise SteeringFailed if the log of `run`, or its exit code, says that it refused."""
        ends = [line for line in str(error).splitlines() if line.startswith("exit code 78")]
        if self._log and (reason := self._log.refusal() or "".join(ends)):
            raise SteeringFailed(f"{reason} ({str(error)[:80]!r})") from error

    def _reply(self, answer: Answer, event: Mapping[str, Any] | None) -> Reply:
        outcome = self._log.outcome(event) if self._log and event else None
        return Reply(answer.tokens, outcome, answer.logits)

    def _start(self, drafts: Any, sequences: int) -> None:
        self._stack.close()
        self._kind, self._starts = (drafts, sequences), self._starts + 1
        self._log, before = None, list[str]()
        if self._package is not None:
            guard = self._package.save(self._folder / "guard.gguf")
            path = self._folder / f"{self._starts}.jsonl"
            context = self._driver.main_context if drafts == "model" else 0
            self._log = Log(path, self._package, context)
            before = [*CLI, "run", "--package", str(guard), "--log", str(path), "--"]
        start = Start(
            before,
            self._files.gguf,
            self._files.mmproj,
            self._driver.draft.gguf,
            self._folder / f"{self._starts}.txt",
            self._driver.batch,
            drafts,
            sequences,
        )
        try:
            self._program = self._stack.enter_context(self._driver.program(start))
        except ProgramFailed as error:
            self._refused(error)
            raise _start_error(str(error)) from error
        if self._log:
            self._log.ready()

    def break_hook(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._stack.close()


def _start_error(output: str) -> Exception:
    """The error with which `steerbridge run` refused to start a program, if it was that."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if "error: " in last:
        return SteerbridgeError(last[last.index("error: ") + 7 :])
    return RuntimeError(output)


@dataclass(frozen=True)
class RunDriver:
    """A kind of program under `steerbridge run`, on the CPU, in F32.

    Args:
        draft: the model that drafts.
        main_context: number of the model's context if another drafts; the first to run is 0.
    """

    name: str
    program: Callable[[Start], AbstractContextManager[Program]]
    draft: Files
    abilities: frozenset[Ability]
    against: Literal["real", "simulator"] = "real"
    batch: int = 16
    context: int = CONTEXT
    tolerance: float = 1e-4
    margin: float = 1e-3
    tells_the_end: bool = False
    kept_open: int = 10
    main_context: int = 0

    @contextmanager
    def open(self, files: Files, package: SteeringPackage | None) -> Iterator[Running]:
        with tempfile.TemporaryDirectory(prefix="steerbridge-conformance-") as folder:
            running = Running(self, files, package, Path(folder))
            with contextlib.closing(running):
                yield running


_EVERY: Final = frozenset(
    {
        Ability.CONVERSATION,
        Ability.CANCEL,
        Ability.STREAM,
        Ability.SAMPLING,
        Ability.NGRAM_DRAFTS,
        Ability.TEMPLATE,
        Ability.RESTART,
    }
)
_SEES: Final = frozenset({Ability.PICTURES})
_CLIENTS: Final = frozenset({Ability.SEQUENCES, Ability.THREADS, Ability.MODEL_DRAFTS})


def llama_server_driver(draft: Files) -> RunDriver:
    """llama-server, built from the sources that llama-cpp-python ships."""
    abilities = _EVERY | _CLIENTS | _SEES | {Ability.SAMPLES}
    return RunDriver("llama-server", llama_server, draft, abilities)


def python_script_driver(draft: Files) -> RunDriver:
    """A script that uses llama-cpp-python. Most prompts fit into one of its batches, as with its
    default of 512: it asks for logits at the end of every batch."""
    abilities = _EVERY | _SEES | {Ability.LOGITS}
    return RunDriver("python-script", python_script, draft, abilities, batch=96)


def node_script_driver(draft: Files) -> RunDriver:
    """A script that uses node-llama-cpp with npm's prebuilt libraries."""
    return RunDriver("node-llama-cpp", node_script, draft, _EVERY | _CLIENTS, main_context=1)
