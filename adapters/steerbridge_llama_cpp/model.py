"""The `llama.cpp` runtime: open a GGUF model, answer prompts, capture hidden states."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, MTMDChatHandler
from numpy.typing import NDArray

from steerbridge import capture
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem, UnsupportedFeature
from steerbridge.fingerprint import ModelFacts, file_sha256
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Generation, Progress, Trace
from steerbridge.serving import Question, chat_messages, template_errors
from steerbridge.spec import ImageMean, Reading
from steerbridge.stats import log_probability
from steerbridge_llama_cpp.cores import physical_cores
from steerbridge_llama_cpp.facts import facts, quantisation
from steerbridge_llama_cpp.llama import steer
from steerbridge_llama_cpp.media import MediaPrompts, is_media_handler
from steerbridge_llama_cpp.native import RUNTIME


def open_model(
    model: str | Path, *, mmproj: str | Path | None = None, n_ctx: int = 4096, **options: Any
) -> LlamaCppModel:
    """Open a GGUF file.

    Args:
        mmproj: the GGUF file of its vision tower, for prompts with images.
        n_ctx: longest prompt with its answer, in tokens; 0: the model's trained context length.
        options: passed on to `llama_cpp.Llama`. Threads: one for each core, unless said.

    Raises:
        FileNotFoundError: there is no such file.
        UnsupportedFeature: an option that `llama_cpp.Llama` does not take; it would ignore it.
    """
    parameters = inspect.signature(llama_cpp.Llama).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in options:
        if name not in known:
            raise UnsupportedFeature(RUNTIME, f"option {name}")
    for path in (model, mmproj):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(path)
    handler = None if mmproj is None else MTMDChatHandler(str(mmproj), verbose=False)
    settings = {"verbose": False, "n_threads": physical_cores(), **options}
    return LlamaCppModel(llama_cpp.Llama(str(model), n_ctx=n_ctx, chat_handler=handler, **settings))


class LlamaCppModel:
    """A `llama_cpp.Llama` as a runtime (see `steerbridge.runtime`). Requests run one by one.

    Prompts with images need a chat handler for images on the `Llama`.
    """

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self.llama: Any = llama
        self._render = _chat_formatter(llama)
        handler = self.llama.chat_handler
        self._media = MediaPrompts(llama, handler) if is_media_handler(handler) else None

    @property
    def runtime(self) -> str:
        return RUNTIME

    @property
    def facts(self) -> ModelFacts:
        return facts(self.llama._model)

    @property
    def quantisation(self) -> str:
        return quantisation(self.llama._model)

    @property
    def weights_sha256(self) -> str:
        return file_sha256(Path(self.llama.model_path))

    def render(self, prompt: Example) -> list[int]:
        """Token ids of a prompt: the chat template with its generation prompt, if there is one.

        Rows of an image are 0.

        Raises:
            UnsupportedFeature: a prompt with images, without a vision tower or with no template
                around it; a system message or earlier turns without a template.
        """
        if prompt.images:
            return self._images.tokens(self._text(prompt)[0], prompt.images)
        if not prompt.is_chat and (prompt.raw or self._render is None):
            text = prompt.text + prompt.prefill
            return list(self.llama.tokenize(text.encode(), special=False))
        text, begun = self._text(prompt)
        return list(self.llama.tokenize(text.encode(), add_bos=not begun, special=True))

    def _text(self, prompt: Example) -> tuple[str, bool]:
        """The rendered prompt, with a marker before its text for each image; whether it begins with
        the token that begins a sequence."""
        if prompt.raw:
            what = "pictures, system messages and turns without a template"
            raise UnsupportedFeature(RUNTIME, what)
        markers = self._images.marker * len(prompt.images) if prompt.images else ""
        text = self._rendered(prompt.messages(markers + prompt.text))
        return text.prompt + prompt.prefill, bool(text.added_special)

    def _rendered(self, messages: Sequence[dict[str, Any]]) -> Any:
        if self._render is None:
            raise UnsupportedFeature(
                RUNTIME, "chats, images and system messages: there is no chat template"
            )
        return self._render(messages=messages)

    @property
    def _images(self) -> MediaPrompts:
        if self._media is None:
            raise UnsupportedFeature(
                RUNTIME, "prompts with images without a vision tower", "mmproj"
            )
        return self._media

    def _evaluated(self, prompt: Example) -> list[int]:
        """A prompt's token ids, its rows evaluated on an empty cache if it has images."""
        if prompt.images:
            return self._images.evaluate(self._text(prompt)[0], prompt.images)
        self.llama.reset()  # the same batches whatever the cache held
        return self.render(prompt)

    def evaluated(self, question: Question) -> list[int]:
        """Token ids of a question, for `Llama.generate`.

        Without pictures nothing is evaluated yet, so that cached prefixes are used.

        Raises:
            UnsupportedFeature: pictures without a vision tower, a chat without a template.
            DataError: messages that the template does not take, a prompt that does not fit.
        """
        if question.pictures:
            return self._images.evaluate(self.written(question)[0], question.pictures)
        return self.tokens(question)

    def written(self, question: Question) -> tuple[str, bool]:
        """The text of a question, markers in it for pictures, and whether it begins with the
        token that the tokenizer would add."""
        if not question.messages:
            return question.prompt, False
        messages = [{**m, "content": self._flat(m["content"])} for m in chat_messages(question)]
        with template_errors():
            text = self._rendered(messages)
        return text.prompt + question.prefill, bool(text.added_special)

    def tokens(self, question: Question) -> list[int]:
        """Token ids of a question without pictures."""
        text, begun = self.written(question)
        return list(self.llama.tokenize(text.encode(), add_bos=not begun, special=True))

    def _flat(self, content: Any) -> str:
        """The text of a message, a marker for each image."""
        if isinstance(content, str):
            return content
        parts = (self._images.marker if p["type"] == "image" else p["text"] for p in content)
        return "".join(parts)

    def _check_room(self, tokens: Sequence[int], room: int) -> None:
        if len(tokens) + room > self.llama.n_ctx():
            raise DataError(
                Problem("prompt", f"{self.llama.n_ctx() - room} tokens at most", str(len(tokens)))
            )

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
        answers = []
        with self._attached(package, ignore) as session:
            for prompt in prompts:
                tokens = self._evaluated(prompt)
                self._check_room(tokens, max_new_tokens)
                answer, finish = self._answer(tokens, max_new_tokens)
                outcome = None if session is None else session.outcomes[0]
                text = self.text_of(answer[: -1 if finish == "stop" else None])
                answers.append(Generation(text, tuple(answer), finish, outcome))
                if progress:
                    progress("generate", len(answers), len(prompts))
        return answers

    def _attached(self, package: SteeringPackage | None, ignore: Sequence[str]) -> Any:
        return nullcontext() if package is None else steer(self.llama, package, ignore=ignore)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens; `Llama.detokenize` drops every token of more than 32 bytes."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token, possibly part of a character; empty for a special token, unless
        `special` asks for its name."""
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            vocab = self.llama._model.vocab
            length = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length  # the size it needs

    def ends_turn(self, token: int) -> bool:
        """Whether generation ends with this token."""
        return bool(llama_cpp.llama_vocab_is_eog(self.llama._model.vocab, token))

    def _answer(self, prompt: list[int], limit: int) -> tuple[list[int], str]:
        """Greedy tokens, the end of the turn included, and why they end."""
        answer: list[int] = []
        for token in self.llama.generate(prompt, temp=0.0):
            answer.append(token)
            if self.ends_turn(token):
                return answer, "stop"
            if len(answer) == limit:
                break
        return answer, "length"

    def log_likelihoods(
        self,
        prompts: Sequence[Example],
        answer: str,
        package: SteeringPackage | None,
        ignore: Sequence[str] = (),
    ) -> NDArray[np.float64]:
        """Log-probability [N, T] of each token of a forced answer (nats), probed and steered
        exactly as if it were generated.

        Raises:
            DataError: the answer has no tokens, or does not fit the context behind a prompt.
        """
        target = self.llama.tokenize(answer.encode(), add_bos=False, special=False)
        if not target:
            raise DataError(Problem("answer", "a text with tokens", repr(answer)))
        likelihoods = np.empty((len(prompts), len(target)))
        with self._attached(package, ignore):
            for i, prompt in enumerate(prompts):
                tokens = self._evaluated(prompt)
                self._check_room(tokens, len(target))
                if not prompt.images:
                    self.llama.eval(tokens)
                for t, token in enumerate(target):
                    likelihoods[i, t] = self.log_probability(token)
                    self.llama.eval([token])
        return likelihoods

    def log_probability(self, token: int) -> float:
        """Of a token, from the logits of the last row."""
        return log_probability(self.last_logits, token)

    @property
    def last_logits(self) -> Any:
        """The logits [V] of the last row."""
        return self.llama._ctx.get_logits_ith(-1)[: self.llama.n_vocab()]

    # -------------------------------------------------------- capture

    def capture(
        self,
        prompts: Sequence[Example],
        readings: Sequence[Reading],
        out: NDArray[np.float32],
        progress: Progress | None = None,
    ) -> None:
        """Fill out[i, k] with reading k of prompt i ([N, K, D]); NaN where there is no image.

        The readings are those of a package without rules, so the same code takes them as when
        steering.
        """
        package = capture.of_readings(self.facts, readings)
        of_image = [isinstance(r.position, ImageMean) for r in readings]
        with steer(self.llama, package):
            native = self.llama._ctx.native
            for i, prompt in enumerate(prompts):
                tokens = self._evaluated(prompt)
                self._check_room(tokens, 0)
                if not prompt.images:
                    self.llama.eval(tokens)
                out[i] = np.concatenate([native.readings(0, p.id) for p in package.spec.probes])
                if not prompt.images:
                    out[i, of_image] = np.nan
                if progress:
                    progress("capture", i + 1, len(prompts))

    def trace(self, prompt: Example, package: SteeringPackage) -> Trace:
        """See `LoadedModel`. The logits are those that the native hook computes."""
        if prompt.images:
            raise UnsupportedFeature(RUNTIME, "rows of a prompt with images")
        reader = capture.of_rows(package)
        tokens = self._evaluated(prompt)
        self._check_room(tokens, 0)
        pieces = tuple(self.piece(id, special=True).decode(errors="replace") for id in tokens)
        if not reader.spec.probes:
            return Trace(pieces, {})
        with steer(self.llama, reader):
            self.llama.eval(tokens)
            native = self.llama._ctx.native
            names = [probe.id for probe in reader.spec.probes]
            return Trace(pieces, {id: native.row_logits(0, id, len(tokens)) for id in names})


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
