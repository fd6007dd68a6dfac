"""The methods of a steered `Llama`, mixed in before its own class."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import llama_cpp

from steerbridge.errors import UnsupportedFeature
from steerbridge.runtime import Attachment
from steerbridge_llama_cpp._tracker import RequestTracker
from steerbridge_llama_cpp.media import check_parts, is_media_handler, watched
from steerbridge_llama_cpp.native import RUNTIME

_GENERATE = inspect.signature(llama_cpp.Llama.generate)


def _next(generator: Any, sent: Any) -> int | None:
    """The generator's next token; None at its end."""
    try:
        return int(generator.send(sent))
    except StopIteration:
        return None


class Steering:
    """The methods of `Llama` that the request tracker must know of; mixed in before the class.

    Threads take turns: llama.cpp's context is used by one at a time. Of two answers that threads
    take token by token, the first ends with an error, as both would use one cache.
    """

    steering_session: Attachment
    _steering_tracker: RequestTracker

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """See `Llama.generate`; each call is one request."""
        tracker = self._steering_tracker
        bound = _GENERATE.bind(self, tokens, *args, **kwargs).arguments
        del bound["self"]
        with contextlib.ExitStack() as stack:
            with tracker.turn:
                request = tracker.request(tokens, bound.get("reset", True))
                running = stack.enter_context(request)
                bound["tokens"] = running.tokens
                inner = stack.enter_context(contextlib.closing(super().generate(**bound)))  # type: ignore[misc]
            sent = None
            while True:
                with tracker.turn:
                    tracker.check(running)
                    token = _next(inner, sent)
                if token is None:
                    return
                sent = yield token

    def eval(self, tokens: Sequence[int]) -> None:
        """See `Llama.eval`; on an empty cache the tokens are a prompt."""
        with self._steering_tracker.turn:
            self._steering_tracker.before_eval(len(tokens))
            super().eval(tokens)  # type: ignore[misc]

    def reset(self) -> None:
        """See `Llama.reset`."""
        with self._steering_tracker.turn:
            if self._steering_tracker.context.failed:
                self._steering_tracker.recover()
            super().reset()  # type: ignore[misc]

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """See `Llama.embed`; nothing is generated, so nothing is steered."""
        with self._steering_tracker.turn, self._steering_tracker.paused():
            return super().embed(*args, **kwargs)  # type: ignore[misc]

    def save_state(self) -> Any:
        """See `Llama.save_state`.

        Raises:
            SteeredCache: the KV cache holds rows that were steered at a layer.
        """
        with self._steering_tracker.turn:
            self._steering_tracker.refuse_steered_cache()
            return super().save_state()  # type: ignore[misc]

    def load_state(self, state: Any) -> None:
        """See `Llama.load_state`; what follows must be a request of its own (`generate`)."""
        with self._steering_tracker.turn:
            super().load_state(state)  # type: ignore[misc]
            self._steering_tracker.loaded()

    def set_cache(self, cache: Any) -> None:
        """See `Llama.set_cache`.

        Raises:
            UnsupportedFeature: the package steers at layers, so saved states could be steered.
        """
        if cache is not None:
            self._steering_tracker.refuse_state_cache()
        super().set_cache(cache)  # type: ignore[misc]

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """See `Llama.create_completion`; the result, or each chunk, has a field `steering`."""
        with self._steering_tracker.turn:  # a stream takes it token by token
            return self._tagged(super().create_completion(*args, **kwargs))  # type: ignore[misc]

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """See `Llama.create_chat_completion`; with the field `steering` too.

        Images need a chat handler for them (`MTMDChatHandler` or one like it).

        Raises:
            UnsupportedFeature: a part of a message that would not reach the model; an image
                with a cache of saved states.
        """
        messages, handler = args[0] if args else kwargs.get("messages", []), self.chat_handler  # type: ignore[attr-defined]
        check_parts(messages, handler)
        create = super().create_chat_completion  # type: ignore[misc]
        with self._steering_tracker.turn:
            if not is_media_handler(handler):
                return self._tagged(create(*args, **kwargs))
            if self.cache is not None:  # type: ignore[attr-defined]
                raise UnsupportedFeature(
                    RUNTIME, "images with a cache of saved states", "set_cache(None)"
                )
            with watched(handler, self._steering_tracker):
                return self._tagged(create(*args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a copy (`copy`, `pickle`) would be made without its package.

        Raises:
            UnsupportedFeature: always.
        """
        raise UnsupportedFeature(
            RUNTIME, "copying or pickling a steered Llama", "open the model again and steer it"
        )

    def _tagged(self, result: Any) -> Any:
        return self._tag(result) if isinstance(result, dict) else self._tag_each(result)

    def _tag_each(self, chunks: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            yield self._tag(chunk)

    def _tag(self, answer: dict[str, Any]) -> dict[str, Any]:
        outcomes = self.steering_session.outcomes
        answer["steering"] = outcomes[0].to_json() if outcomes else None
        return answer


def steered_class(base: type) -> type:
    """The subclass of a `Llama` class whose objects steer; itself if they do already."""
    if issubclass(base, Steering):
        return base
    return type(f"Steered{base.__name__}", (Steering, base), {"__module__": __name__})


def unsteered_class(steered: type) -> type:
    """The nearest base class of a steered one whose objects do not steer."""
    return next(c for c in steered.__mro__ if not issubclass(c, Steering))
