"""The kit's driver for the vLLM plugin: the real engine on a CPU, in an environment of its own
(`make setup-vllm`).
"""

from __future__ import annotations

import atexit
import json
import math
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.errors import DataError, Problem, SteerbridgeError, SteeringFailed
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge.testing.driver import Ability, Files, How, Reply
from steerbridge.testing.model import TinyModel

ROOT: Final = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT: Final = ROOT / ".venv-vllm"
PYTHON: Final = ENVIRONMENT / "bin" / "python"
ROWS: Final = 64  # of one pass
BLOCK: Final = 32
DRAFTS: Final = 2
SETTINGS: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
SERVED: Final = {k: v for k, v in SETTINGS.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
# Several ranks have a thread each, wherever it runs.
RANKS: Final = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# The second model runner's kernels are Triton's.
SECOND: Final = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": f"{ROOT / 'tests' / 'vllm' / 'interpreted'}:{ENVIRONMENT / 'triton'}",
}


class Zygote:
    """vLLM, imported once.

    Args:
        guarded: whether Steerbridge waits for its modules.
        more: variables of its environment.
    """

    def __init__(self, folder: Path, guarded: bool, more: Mapping[str, str]) -> None:
        self._path = folder / f"zygote-{int(guarded)}"
        environment = {**os.environ, **SETTINGS, **more}
        environment.pop("STEERBRIDGE_PACKAGE", None)
        if guarded:
            environment["STEERBRIDGE_PACKAGE"] = "set for each model"
        self._log = (folder / f"log-{int(guarded)}.txt").open("w")
        self._process = subprocess.Popen(
            [PYTHON, ROOT / "tests" / "vllm" / "zygote.py", self._path],
            env=environment,
            stdout=self._log,
            stderr=self._log,
        )

    def connected(self) -> socket.socket:
        """A process of its own."""
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(str(self._path))
            except OSError:
                if self._process.poll() is not None:
                    raise RuntimeError(f"vLLM ended: {self._log.name}") from None
                time.sleep(0.1)
            else:
                return connection

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        self._log.close()


class Engine:
    """One engine with a package, or without one."""

    def __init__(self, zygote: Zygote, stack: ExitStack, **options: Any) -> None:
        connection = stack.enter_context(zygote.connected())
        self._lines = stack.enter_context(connection.makefile("rw", encoding="utf-8"))
        self.told(options)

    def told(self, question: Any) -> Any:
        """The reply to a question."""
        self._lines.write(json.dumps(question) + "\n")
        self._lines.flush()
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the engine's process ended")
        reply = json.loads(line)
        if "error" not in reply:
            return reply["reply"]
        if "SteeringFailed" in reply["kinds"]:
            raise SteeringFailed(reply["error"])
        if "SteerbridgeError" in reply["kinds"]:
            raise SteerbridgeError(reply["error"])
        if {"ValueError", "VLLMClientError"} & {*reply["kinds"]}:
            raise DataError(Problem("request", "one that vLLM takes", reply["error"]))
        raise RuntimeError(reply["error"])


class Running:
    """An engine, and another that drafts, opened when it is first asked for."""

    def __init__(self, opened: Callable[[int], Engine]) -> None:
        self._opened = opened
        self._plain = opened(0)

    @cached_property
    def _drafting(self) -> Engine:
        return self._opened(DRAFTS)

    def ask(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:
        engine = self._drafting if how.drafts else self._plain
        replies = engine.told(
            {
                "prompts": [TinyModel.encode(prompt) for prompt in prompts],
                "new": new,
                "temperature": how.temperature,
                "samples": how.samples,
                "until": how.cancel_after,
            }
        )
        return [_reply(reply) for reply in replies]

    def break_hook(self) -> None:
        self._plain.told("break")


def _reply(told: Any) -> Reply:
    outcome = None if told["outcome"] is None else Outcome.from_json(told["outcome"])
    logits = np.array([math.nan if x is None else x for x in told["logits"]], np.float32)
    return Reply(tuple(told["tokens"]), outcome, logits)


class VllmDriver:
    """vLLM with blocks of 32 rows and passes of 64.

    Args:
        compiled: captured as graphs, divided where the package is called.
        second: by the second model runner, whose kernels are interpreted.
        ranks: processes that each hold a part of every matrix.
    """

    against = "real"
    abilities = frozenset(
        {
            Ability.BATCH,
            Ability.CONVERSATION,
            Ability.CANCEL,
            Ability.SAMPLING,
            Ability.SAMPLES,
            Ability.NGRAM_DRAFTS,
            Ability.LOGITS,
            Ability.BREAK,
            Ability.RESTART,
        }
    )
    batch = ROWS
    context = 1024
    tolerance = 1e-3
    margin = 5e-3
    tells_the_end = True
    kept_open = 4

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        compiled: bool = False,
        second: bool = False,
        ranks: int = 1,
    ) -> None:
        self.name, self._compiled, self._ranks = name, compiled, ranks
        if ranks > 1:  # each has a cache; hooks are broken in one process
            self.kept_open = 2
            self.abilities -= {Ability.BREAK}
        folder.mkdir(exist_ok=True)
        more = {**(SECOND if second else {}), **(RANKS if ranks > 1 else {})}
        self._zygotes = {on: Zygote(folder, on, more) for on in (False, True)}
        atexit.register(self.close)

    def close(self) -> None:
        """End vLLM."""
        for zygote in self._zygotes.values():
            zygote.close()

    @contextmanager
    def open(self, files: Files, package: SteeringPackage | None) -> Iterator[Running]:
        with ExitStack() as stack:
            path = None
            if package is not None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                path = str(package.save(folder / "guard.gguf"))

            def opened(drafts: int) -> Engine:
                return Engine(
                    self._zygotes[package is not None],
                    stack,
                    model=str(files.transformers),
                    package=path,
                    drafts=drafts,
                    max_model_len=self.context,
                    max_num_batched_tokens=ROWS,
                    max_num_seqs=8,
                    block_size=BLOCK,
                    enforce_eager=not self._compiled,
                    tensor_parallel_size=self._ranks,
                    enable_prefix_caching=not _on_layers(package),
                )

            yield Running(opened)


def _on_layers(package: SteeringPackage | None) -> bool:
    """Whether a package writes where keys and values are made from."""
    acts = () if package is None else package.spec.interventions
    return any(x.type in ("add_vector", "project_out") for x in acts)
