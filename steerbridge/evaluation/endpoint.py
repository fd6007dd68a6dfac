"""Answers from an OpenAI-compatible server: llama-server, TGI, vLLM, `steerbridge serve`.

A server that steers and says so (field `steering` of the response) gives verdicts; of any other
one only the answers are known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Final
from urllib.parse import urlsplit

from steerbridge import data
from steerbridge.data import Example
from steerbridge.errors import EndpointFailed, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.registry import requires
from steerbridge.runtime import Generation, Outcome, Progress

RETRIES: Final = 6  # with growing pauses, or as long as `Retry-After` says
REFUSED: Final = "refused"  # how an answer ended that the server refused apart from its text

# Whose variable holds the key: a key goes to one address, never to all.
KEY: Final = "STEERBRIDGE_API_KEY"
BASELINE_KEY: Final = "STEERBRIDGE_BASELINE_API_KEY"
JUDGE_KEY: Final = "STEERBRIDGE_JUDGE_API_KEY"


class Client:
    """An address of the OpenAI interface. Greedy answers, several requests at once.

    Args:
        url: of the server or of its `/v1`.
        model: its name there; "": the first one that the server lists.
        concurrency: requests at once.
        key: the variable with the key that is sent there, if it is set.

    Raises:
        RuntimeMissing: the package `openai` is not installed (extra `eval`).
        EndpointFailed: from calls, where the server cannot be reached or answers with an error.
    """

    def __init__(self, url: str, model: str = "", *, concurrency: int = 4, key: str = KEY) -> None:
        with requires("eval"):
            import openai
        self.url = url.rstrip("/") + ("" if urlsplit(url).path.strip("/") else "/v1")
        self._errors = openai.OpenAIError
        self._api = openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get(key, "none"),
            max_retries=RETRIES,
            timeout=600.0,
        )
        self._model, self._concurrency = model, concurrency

    @classmethod
    def named(cls, address: str, concurrency: int, key: str = KEY) -> Client:
        """A client from one word: an address, with the name of a model behind `#` or not."""
        url, _, model = address.partition("#")
        return cls(url, model, concurrency=concurrency, key=key)

    def generate(
        self,
        prompts: Sequence[Example],
        package: SteeringPackage | None,
        *,
        max_new_tokens: int,
        ignore: Sequence[str] = (),  # noqa: ARG002 - as every runtime takes it
        progress: Progress | None = None,
    ) -> list[Generation]:
        """Greedy answers, in the order of the prompts.

        Raises:
            UnsupportedFeature: a package; the server steers by itself. A prompt without a chat, or
                with the beginning of its answer.
        """
        if package is not None:
            raise UnsupportedFeature("http", "a package: the server steers, or does not")
        if any(prompt.raw or prompt.prefill for prompt in prompts):
            raise UnsupportedFeature("http", "prompts that are no chat, and beginnings of answers")
        asked = [prompt.messages(_content(prompt)) for prompt in prompts]
        return self.chats(asked, max_new_tokens=max_new_tokens, progress=progress)

    def chats(
        self,
        chats: Sequence[Sequence[Any]],
        *,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> list[Generation]:
        """One greedy answer for each list of messages."""
        self._model = self._model or self._calling(lambda: self._api.models.list().data[0].id)
        answers: dict[int, Generation] = {}
        with ThreadPoolExecutor(self._concurrency) as pool:
            running = {
                pool.submit(self._answer, messages, max_new_tokens): i
                for i, messages in enumerate(chats)
            }
            try:
                for done in as_completed(running):
                    answers[running[done]] = done.result()
                    if progress:
                        progress("generate", len(answers), len(chats))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [answers[i] for i in range(len(chats))]

    def _answer(self, messages: Sequence[Any], limit: int) -> Generation:
        reply = self._calling(
            lambda: self._api.chat.completions.create(
                model=self._model, messages=list(messages), temperature=0, max_tokens=limit
            )
        )
        try:
            choice = reply.choices[0]
            refusal = choice.message.refusal
            steering = (reply.model_extra or {}).get("steering")
            outcome = None if steering is None else Outcome.from_json(steering)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise EndpointFailed(self.url, _strange(error)) from error
        finish = "length" if choice.finish_reason == "length" else "stop"
        if refusal or choice.finish_reason == "content_filter":
            finish = REFUSED
        return Generation(choice.message.content or refusal or "", (), finish, outcome)

    def _calling(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self._errors as error:
            raise EndpointFailed(self.url, str(error)) from error
        except (IndexError, AttributeError, TypeError, ValueError) as error:
            raise EndpointFailed(self.url, _strange(error)) from error


def _strange(error: Exception) -> str:
    return f"expected an answer of OpenAI's interface, found something else ({error!r})"


def _content(prompt: Example) -> Any:
    if not prompt.images:
        return prompt.text
    pictures = [{"type": "image_url", "image_url": {"url": data.as_url(p)}} for p in prompt.images]
    return [*pictures, {"type": "text", "text": prompt.text}]
