"""`SteeredLlama` and `steer`: `llama_cpp.Llama` with a steering package inside."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from steerbridge.errors import UnsupportedFeature
from steerbridge.package import SteeringPackage, load
from steerbridge_llama_cpp.media import check_parts, is_media_handler, watched
from steerbridge_llama_cpp.native import RUNTIME
from steerbridge_llama_cpp.session import OnOutcome, Session

_GENERATE = inspect.signature(llama_cpp.Llama.generate)


def steer(
    llama: llama_cpp.Llama,
    package: SteeringPackage,
    *,
    ignore: Collection[str] = (),
    on_outcome: OnOutcome | None = None,
) -> Session:
    """Steer every request of `llama`, until `remove` or the end of a `with`.

    The Llama gets a new context, so its KV cache starts empty, and settings that were made on
    the old context behind its back (a control vector, say) must be made again.

    Args:
        llama: an open model; text models, any quantisation and backend.
        package: checked against the model; thresholds calibrated for its quantisation under
            the runtime name `llama.cpp` are used if the package holds any.
        ignore: names of base-model fields that may differ (see `fingerprint.CHECKED`).
        on_outcome: called with the outcome of each request when its prompt has ended.

    Raises:
        ModelMismatch: the package was made for another model.
        UnsupportedFeature: a site that llama.cpp does not show, or it is steered already.
    """
    session = Session(llama, package, ignore, on_outcome)
    session.apply()
    return session


def _next(generator: Any, sent: Any) -> int | None:
    """The generator's next token; None at its end."""
    try:
        return int(generator.send(sent))
    except StopIteration:
        return None


class _Steering:
    """The methods of `Llama` that a session must know of; mixed in before the class itself."""

    steering_session: Session

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """See `Llama.generate`; each call is one request."""
        session = self.steering_session
        bound = _GENERATE.bind(self, tokens, *args, **kwargs).arguments
        del bound["self"]
        with session.request(tokens, bound.get("reset", True)) as running:
            bound["tokens"] = running.tokens
            with contextlib.closing(super().generate(**bound)) as inner:  # type: ignore[misc]
                sent = None
                while (token := _next(inner, sent)) is not None:
                    sent = yield token
                    session.check(running)

    def eval(self, tokens: Sequence[int]) -> None:
        """See `Llama.eval`; on an empty cache the tokens are a prompt."""
        self.steering_session.before_eval(len(tokens))
        super().eval(tokens)  # type: ignore[misc]

    def reset(self) -> None:
        """See `Llama.reset`."""
        if self.steering_session.context.failed:
            self.steering_session.recover()
        super().reset()  # type: ignore[misc]

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """See `Llama.embed`; nothing is generated, so nothing is steered."""
        with self.steering_session.paused():
            return super().embed(*args, **kwargs)  # type: ignore[misc]

    def save_state(self) -> Any:
        """See `Llama.save_state`.

        Raises:
            SteeredCache: the KV cache holds rows that were steered at a layer.
        """
        self.steering_session.refuse_steered_cache()
        return super().save_state()  # type: ignore[misc]

    def load_state(self, state: Any) -> None:
        """See `Llama.load_state`; what follows must be a request of its own (`generate`)."""
        super().load_state(state)  # type: ignore[misc]
        self.steering_session.loaded()

    def set_cache(self, cache: Any) -> None:
        """See `Llama.set_cache`.

        Raises:
            UnsupportedFeature: the package steers at layers, so saved states could be steered.
        """
        if cache is not None:
            self.steering_session.refuse_state_cache()
        super().set_cache(cache)  # type: ignore[misc]

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """See `Llama.create_completion`; the result, or each chunk, has a field `steering`."""
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
        if not is_media_handler(handler):
            return self._tagged(create(*args, **kwargs))
        if self.cache is not None:  # type: ignore[attr-defined]
            raise UnsupportedFeature(
                RUNTIME, "images with a cache of saved states", "set_cache(None)"
            )
        with watched(handler, self.steering_session):
            return self._tagged(create(*args, **kwargs))

    def _tagged(self, result: Any) -> Any:
        return self._tag(result) if isinstance(result, dict) else self._tag_each(result)

    def _tag_each(self, chunks: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            yield self._tag(chunk)

    def _tag(self, answer: dict[str, Any]) -> dict[str, Any]:
        outcomes = self.steering_session.outcomes
        answer["steering"] = outcomes[0].as_json() if outcomes else None
        return answer


class SteeredLlama(_Steering, llama_cpp.Llama):
    """`llama_cpp.Llama` with a package attached from the start.

    Args:
        model_path: a GGUF file; this and all other options are those of `Llama`.
        package: a package, or the path of one.
        ignore, on_outcome: see `steer`, which this is the short form of.

    Raises: as `steer`, and what `Llama` and `steerbridge.load` raise.
    """

    def __init__(
        self,
        model_path: str,
        *,
        package: SteeringPackage | str | Path,
        ignore: Collection[str] = (),
        on_outcome: OnOutcome | None = None,
        **options: Any,
    ) -> None:
        loaded = package if isinstance(package, SteeringPackage) else load(package)
        super().__init__(model_path, **options)
        steer(self, loaded, ignore=ignore, on_outcome=on_outcome)


def steered_class(base: type) -> type:
    """The subclass of a `Llama` class whose objects steer; itself if they do already."""
    if issubclass(base, _Steering):
        return base
    return type(f"Steered{base.__name__}", (_Steering, base), {"__module__": __name__})


def plain_class(steered: type) -> type:
    """The nearest base class of a steered one whose objects do not steer."""
    return next(c for c in steered.__mro__ if not issubclass(c, _Steering))
