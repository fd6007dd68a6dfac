"""Guards for tests of unmodified programs, and what our adapter answers with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
from helpers import CLI
from steerbridge.data import Example
from steerbridge.runtime import Generation

NEW = 12  # tokens of an answer


@dataclass
class Guarded:
    """A model, prompts of both kinds, a guard that tells them apart, and the adapter's answers."""

    model: Path
    mmproj: Path | None
    prompts: list[Example]
    rendered: list[list[int]]
    guard: Path
    steered: list[Generation]

    @property
    def options(self) -> list[str]:
        """For a program: the model, and attention computed as llama-cpp-python does."""
        vision = ["--mmproj", str(self.mmproj)] if self.mmproj else []
        return ["-m", str(self.model), *vision, "-fa", "off"]

    def steer(self, log: Path) -> list[str]:
        """What comes before a program's command to steer it; events go to `log`."""
        return [*CLI, "run", "--package", str(self.guard), "--log", str(log), "--"]


def guarded(
    folder: Path,
    model: Path,
    prompts: Sequence[Example],
    readings: list[Mapping[str, Any]],
    mmproj: Path | None = None,
) -> Guarded:
    """A guard fitted to these very prompts, and the adapter's answers."""
    from steerbridge_llama_cpp import open_model

    opened = open_model(model, mmproj=mmproj, n_ctx=1024, n_threads=2)
    package, answers = helpers.fitted(opened, prompts, readings, NEW)
    path = package.save(folder / "guard.gguf")
    rendered = [opened.render(p) for p in prompts]
    opened.llama.close()
    return Guarded(Path(model), mmproj, prompts, rendered, path, answers)
