"""A driver for any runtime that opens models as Steerbridge's commands do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from steerbridge.data import Example
from steerbridge.package import SteeringPackage
from steerbridge.runtime import LoadedModel
from steerbridge.testing import vision
from steerbridge.testing.driver import Ability, Files, How, Reply
from steerbridge.testing.model import CONTEXT


class _Model:
    def __init__(self, model: LoadedModel, package: SteeringPackage | None) -> None:
        self._model, self._package = model, package

    def ask(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:  # noqa: ARG002
        examples = [Example(vision.text(prompt), False) for prompt in prompts]
        answers = self._model.generate(examples, self._package, max_new_tokens=new)
        return [Reply(answer.tokens, answer.outcome) for answer in answers]

    def break_hook(self) -> None:
        raise NotImplementedError


class OpenerDriver:
    """Tries a runtime through its opener: `open_model(path)` and `LoadedModel.generate`.

    What an opener cannot be asked for (beams, drafts, cancelled answers) is absent. A runtime of
    which users do such things has a driver of its own.

    Args:
        name: how results are listed.
        opener: what the runtime's entry point names.
        file: which file of the tiny model it opens: `transformers` (a folder) or `gguf`.
        batch: rows that it evaluates at once.
        options: passed to the opener.
    """

    against: Literal["real", "simulator"] = "real"
    abilities = frozenset({Ability.BATCH, Ability.CONVERSATION, Ability.TEMPLATE, Ability.RESTART})
    tolerance = 1e-4
    margin = 1e-3
    tells_the_end = True
    kept_open = 0

    def __init__(
        self,
        name: str,
        opener: Callable[..., LoadedModel],
        *,
        file: Literal["transformers", "gguf"] = "transformers",
        batch: int = 16,
        context: int = CONTEXT,
        **options: Any,
    ) -> None:
        self.name, self._opener, self._file, self._options = name, opener, file, options
        self.batch, self.context = batch, context

    @contextmanager
    def open(self, files: Files, package: SteeringPackage | None) -> Iterator[_Model]:
        path: Path = getattr(files, self._file)
        yield _Model(self._opener(path, **self._options), package)
