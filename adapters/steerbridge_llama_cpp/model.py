"""The `llama.cpp` runtime: open a GGUF model, answer prompts, capture hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from numpy.typing import NDArray

from steerbridge.data import Example
from steerbridge.errors import DataError, Problem, UnsupportedFeature
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Generation, Progress
from steerbridge.spec import SPEC_VERSION, LinearProbe, Reading, SteeringSpec
from steerbridge.tensors import Tensor
from steerbridge_llama_cpp.facts import facts, quantisation
from steerbridge_llama_cpp.llama import steer
from steerbridge_llama_cpp.native import RUNTIME

READINGS_PER_PROBE: Final = 64  # the format's limit


def open_model(model: str | Path, *, n_ctx: int = 4096, **options: Any) -> LlamaCppModel:
    """Open a GGUF file.

    Args:
        n_ctx: longest prompt with its answer, in tokens; 0: as long as the model was made for.
        options: passed on to `llama_cpp.Llama`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(model)
    if not path.is_file():
        raise FileNotFoundError(path)
    settings = {"verbose": False, **options}
    return LlamaCppModel(llama_cpp.Llama(str(path), n_ctx=n_ctx, **settings))


class LlamaCppModel:
    """A `llama_cpp.Llama` as a runtime (see `steerbridge.runtime`). Requests run one by one."""

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self.llama: Any = llama
        self._render = _chat_formatter(llama)

    @property
    def facts(self) -> ModelFacts:
        return facts(self.llama._model)

    @property
    def quantisation(self) -> str:
        return quantisation(self.llama._model)

    def render(self, prompt: Example) -> list[int]:
        """Token ids of a prompt: the chat template with its generation prompt, if there is one."""
        if prompt.images:
            raise UnsupportedFeature(RUNTIME, "prompts with images")
        if self._render is None:
            return list(self.llama.tokenize(prompt.text.encode(), special=False))
        text = self._render(messages=[{"role": "user", "content": prompt.text}])
        return list(
            self.llama.tokenize(text.prompt.encode(), add_bos=not text.added_special, special=True)
        )

    def _rows(self, prompts: Sequence[Example], room: int) -> list[list[int]]:
        rows = [self.render(p) for p in prompts]
        longest = max(map(len, rows), default=0)
        if longest + room > self.llama.n_ctx():
            raise DataError(
                Problem("prompt", f"{self.llama.n_ctx() - room} tokens at most", str(longest))
            )
        return rows

    # -------------------------------------------------------- answers

    def generate(
        self,
        prompts: Sequence[Example],
        package: SteeringPackage | None,
        *,
        max_new_tokens: int,
        ignore: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[Generation]:
        """Greedy answers, in the order of the prompts.

        Raises:
            DataError: a prompt does not fit the context.
        """
        rows = self._rows(prompts, max_new_tokens)
        attached = nullcontext() if package is None else steer(self.llama, package, ignore=ignore)
        answers = []
        with attached as session:
            for tokens in rows:
                answer, finish = self._answer(tokens, max_new_tokens)
                outcome = None if session is None else session.outcomes[0]
                text = self.llama.detokenize(answer[: -1 if finish == "stop" else None])
                answers.append(
                    Generation(text.decode("utf-8", "replace"), tuple(answer), finish, outcome)
                )
                if progress:
                    progress(len(answers), len(rows))
        return answers

    def _answer(self, prompt: list[int], limit: int) -> tuple[list[int], str]:
        """Greedy tokens, the end of the turn included, and why they end."""
        self.llama.reset()  # the same batches, whatever came before
        answer: list[int] = []
        for token in self.llama.generate(prompt, temp=0.0):
            answer.append(token)
            if llama_cpp.llama_vocab_is_eog(self.llama._model.vocab, token):
                return answer, "stop"
            if len(answer) == limit:
                break
        return answer, "length"

    # -------------------------------------------------------- capture

    def capture(
        self,
        prompts: Sequence[Example],
        readings: Sequence[Reading],
        out: NDArray[np.float32],
        progress: Progress | None = None,
    ) -> None:
        """Fill out[i, k] with reading k of prompt i ([N, K, D]).

        The readings are those of a package without rules, so they are taken by the very code
        that takes them when it steers.
        """
        rows = self._rows(prompts, 0)
        package = _reader(self.facts, readings)
        with steer(self.llama, package) as session:
            for i, tokens in enumerate(rows):
                self.llama.reset()
                self.llama.eval(tokens)
                found = [session.context.native.readings(0, p.id) for p in package.spec.probes]
                out[i] = np.concatenate(found)
                if progress:
                    progress(i + 1, len(rows))


def _reader(known: ModelFacts, readings: Sequence[Reading]) -> SteeringPackage:
    """A package that reads and does nothing: probes with zero weights and no rules."""
    groups = list(_groups(readings, READINGS_PER_PROBE))
    zeros = np.zeros(READINGS_PER_PROBE * known.hidden_size, np.float32)
    probes = tuple(
        LinearProbe(
            id=f"p{i}",
            type="linear",
            readings=group,
            weight=f"w{i}",
            bias=0.0,
            link="identity",
            comparator=">",
            threshold=0.0,
        )
        for i, group in enumerate(groups)
    )
    spec = SteeringSpec(
        spec_version=SPEC_VERSION,
        name="capture",
        base_model=known.info(),
        probes=probes,
        interventions=(),
        rules=(),
    )
    tensors = {
        f"w{i}": Tensor.of(zeros[: len(group) * known.hidden_size])
        for i, group in enumerate(groups)
    }
    return SteeringPackage(spec, tensors)


def _groups(readings: Sequence[Reading], size: int) -> Iterator[tuple[Reading, ...]]:
    for start in range(0, len(readings), size):
        yield tuple(readings[start : start + size])


def _chat_formatter(llama: Any) -> Any:
    """The model's own chat template, rendered as `Llama.create_chat_completion` does."""
    template = llama.metadata.get("tokenizer.chat_template")
    if template is None:
        return None

    def text(token: int) -> str:
        return str(llama._model.token_get_text(token)) if token != -1 else ""

    return Jinja2ChatFormatter(
        template=template, eos_token=text(llama.token_eos()), bos_token=text(llama.token_bos())
    )
