"""`steer`: attach a steering package to a transformers model.

Request lifecycle: `generate` (or `Session.request`) opens `Requests` for a batch; a pre-hook on the
model records which columns a forward pass covers; hooks on the planned sites read, decide and
write; a post-hook on the model checks the ledger before logits are returned. No class is patched:
only this model object is changed, and `Session.remove` undoes it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from steerbridge.errors import (
    DataError,
    HookLost,
    Problem,
    RowMappingLost,
    SteeredCache,
    UnsupportedFeature,
)
from steerbridge.fingerprint import check_said
from steerbridge.package import SteeringPackage
from steerbridge.plan import Stop, plan
from steerbridge.runtime import Attachment, Outcome
from steerbridge.spec import ImageMean
from steerbridge_hf import passes
from steerbridge_hf.observed import OBSERVED, Call
from steerbridge_hf.request import Requests, Step
from steerbridge_hf.sites import RUNTIME, facts, learned_positions, locate, media_tokens
from steerbridge_torch import Ledger, RowLogits, Weights, quantisation, weights_sha256

_OWNER: Final = "_steerbridge_session"  # on the model: which session steers it
_STEERED: Final = "_steerbridge_steered"  # on a cache: its states were rewritten (kept by copies)
_BATCHING: Final = ("generate_batch", "init_continuous_batching")
_BARE: Final = "`with session.request(attention_mask):` around the calls of one batch of prompts"

OnOutcome = Callable[[tuple[Outcome, ...]], None]


def steer(
    model: Any,
    package: SteeringPackage,
    *,
    tokenizer: Any = None,
    ignore: Collection[str] = (),
    on_outcome: OnOutcome | None = None,
) -> Session:
    """Steer every request of `model` with `package`, until `remove` or the end of a `with`.

    Args:
        model: a decoder (or vision-language) model with `generate`, any dtype and device.
        package: checked against the model; thresholds calibrated for this model's dtype
            under the runtime name `hf` are used if the package holds any.
        tokenizer: if given, vocabulary and chat template are checked too.
        ignore: names of base-model fields that may differ (see `fingerprint.CHECKED`).
        on_outcome: called with the outcomes of each finished batch, one per prompt.

    Raises:
        ModelMismatch: the package was made for another model.
        UnsupportedFeature: the model's parts cannot be located, or it is steered already.
    """
    session = Session(model, package, tokenizer, ignore, on_outcome)
    session.apply()
    return session


class Session(Attachment):
    """A package attached to a model. `apply` and `remove` are exact inverses, and idempotent."""

    def __init__(
        self,
        model: Any,
        package: SteeringPackage,
        tokenizer: Any = None,
        ignore: Collection[str] = (),
        on_outcome: OnOutcome | None = None,
    ) -> None:
        self._sites = locate(model)
        known = facts(self._sites.model, tokenizer)
        self._unchecked = package.check(known, ignore)
        if tokenizer is not None:
            text_of = functools.partial(tokenizer.decode, skip_special_tokens=True)
            check_said(package.spec, text_of, ignore)
        self._package = package.calibrated(
            RUNTIME,
            quantisation(self._sites.model.dtype, self._sites.model.config),
            lambda: weights_sha256(model),
        )
        self._on_outcome = on_outcome
        self._plan = plan(self._package.spec)
        # The head is always watched: logits that did not pass it were not guarded.
        planned = {stop.depth: stop for stop in self._plan.stops}
        planned.setdefault(self._plan.head_depth, Stop(self._plan.head_depth))
        self._depths = frozenset(planned)
        planned.pop(self._plan.logits_depth, None)  # the model's own results
        self._stops = planned
        self._weights = Weights(self._package, self._sites.model.device)
        self._logits = {
            i: RowLogits(probe, self._weights)
            for i, probe in enumerate(self._package.spec.probes)
            if probe.token_reading is not None
        }
        self._handles: list[Any] = []
        self._replaced: dict[str, Any] = {}
        self._here = _Here()  # each thread generates for its own requests
        self._signature = inspect.signature(self._sites.model.forward)
        self._media = media_tokens(self._sites.model.config)
        self._positions = learned_positions(self._sites.model)
        if not self._media and hasattr(self._sites.model.config, "vision_config"):
            self._refuse_image_means()

    def _refuse_image_means(self) -> None:
        """Refuse readings of image rows: the model does not say which rows are an image's."""
        for probe in self._package.spec.probes:
            for reading in probe.readings:
                if isinstance(reading.position, ImageMean):
                    name = type(self._sites.model).__name__
                    raise UnsupportedFeature(
                        RUNTIME, f"{probe.id}: {reading}: {name} names no token for images"
                    )

    @property
    def package(self) -> SteeringPackage:
        return self._package

    @property
    def unchecked(self) -> tuple[str, ...]:
        return self._unchecked

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Of this thread's last batch: one for each prompt."""
        last = self._here.last
        return () if last is None else last.outcomes()

    @property
    def current(self) -> Outcome | None:
        """See `Attachment`. Each thread generates for requests of its own."""
        requests = self._here.requests
        return requests.outcomes()[0] if requests is not None and requests.decided() else None

    # -------------------------------------------------------- attach and detach

    def apply(self) -> None:
        """Attach the hooks. Does nothing when they are attached.

        Raises:
            UnsupportedFeature: a site cannot be watched, as a pass of a few tokens shows.
        """
        model = self._sites.model
        owner = model.__dict__.get(_OWNER)
        if owner is self:
            return
        if owner is not None:
            raise UnsupportedFeature(RUNTIME, "the model is steered already", "remove() first")
        missing = [name for name in OBSERVED if not hasattr(model, name)]
        if missing:
            raise UnsupportedFeature(RUNTIME, f"a generate() without {missing[0]}")
        prepares: Any = model._prepare_cache_for_generation
        self._prepared_with = inspect.signature(prepares)
        passes.rehearse(self._sites, self._stops)
        _drop_compiled_code()
        hook: Any = torch.compiler.disable
        self._handles = [
            model.register_forward_pre_hook(hook(self._before_forward), with_kwargs=True),
            model.register_forward_hook(hook(self._after_forward), with_kwargs=True),
            *(
                self._sites.watch(depth, functools.partial(self._at_site, stop))
                for depth, stop in self._stops.items()
            ),
        ]
        object.__setattr__(model, _OWNER, self)
        wrappers = {"generate": self._generate}
        wrappers |= dict.fromkeys(_BATCHING, self._refuse_continuous_batching)
        wrappers |= {name: functools.partial(self._observe, name) for name in OBSERVED}
        for name, wrapper in wrappers.items():
            if (original := getattr(model, name, None)) is not None:
                if name in model.__dict__:  # another library's wrapper: restored by remove()
                    self._replaced[name] = original
                wrapped = functools.wraps(original)(functools.partial(wrapper, original))
                object.__setattr__(model, name, wrapped)

    def remove(self) -> None:
        """Detach; the model is as it was before `apply`. Does nothing when detached."""
        model = self._sites.model
        if model.__dict__.get(_OWNER) is not self:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name in (_OWNER, "generate", *_BATCHING, *OBSERVED):
            model.__dict__.pop(name, None)
        model.__dict__.update(self._replaced)
        self._replaced = {}
        _drop_compiled_code()

    # -------------------------------------------------------- requests

    @contextmanager
    def request(self, attention_mask: Tensor, input_ids: Tensor | None = None) -> Iterator[None]:
        """Within this context, forward calls of the model are one batch of requests.

            with session.request(batch["attention_mask"]):
                ...  # a loop of model(...) calls, with a cache or without
            print(session.outcomes)

        Passes go on from one another: a prompt may come in chunks, rows behind it may be taken back
        (`cache.crop`). Another batch is another context.

        Args:
            attention_mask: [B, P] of the prompts, cached tokens included; padding is 0.
            input_ids: [B, P] of the prompts, if they are known before the passes give them.

        Raises:
            RowMappingLost: in a pass that does not add up; or the context ended before the prompt.
            UnsupportedFeature: inside another request of this thread.
        """
        mask = attention_mask.detach().cpu().bool()
        ids = None if input_ids is None else input_ids.detach().cpu()
        if mask.dim() != 2:
            raise UnsupportedFeature(RUNTIME, f"attention_mask of {mask.dim()} dimensions")
        with self._here.opened():
            requests = self._requests(mask, ids, drafts=False)
            self._here.requests, self._here.bare = requests, passes.Bare()
            yield
            if not requests.decided():
                raise RowMappingLost("the request ended before its prompt was evaluated")
            requests.finish(requests.watched + 1, None, 0)
            self._finish(requests)

    def _requests(self, mask: Tensor, ids: Tensor | None, **more: Any) -> Requests:
        return Requests(
            self._package,
            self._plan,
            self._weights,
            mask,
            ids,
            media=self._media,
            logits=self._logits,
            **more,
        )

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._here.opened():
            self._here.call = Call()
            result = original(*args, **kwargs)
            requests = self._here.requests
            if requests is None or not requests.decided():
                raise HookLost("generation ended without a verdict: the hooks did not run")
            self._here.call.finish(result)
            self._finish(requests)
        return result

    def _observe(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Have the running call told what one of transformers' methods is given or returns."""
        call = self._here.call
        if call is None:
            return original(*args, **kwargs)
        if name == "_prepare_cache_for_generation":
            given = self._prepared_with.bind(*args, **kwargs).arguments
            before = passes.length(passes.cache_among(given["model_kwargs"].values()))
            result = original(*args, **kwargs)
            call.prepared(
                given["generation_config"], given["model_kwargs"], given["generation_mode"]
            )
            self._open(call, before or 0)
            return result
        if name == "prepare_inputs_for_generation":
            call.next_pass(args[0] if args else kwargs["input_ids"])
        result = original(*args, **kwargs)
        if name == "_expand_inputs_for_generation":
            ids, model_kwargs = result
            call.expanded(ids, model_kwargs, kwargs.get("expand_size", 1))
        elif name == "_get_logits_processor":
            return call.guarded(result)
        elif name == "_get_stopping_criteria":
            return call.guarded_criteria(result)
        return result

    def _open(self, call: Call, cached: int) -> None:
        assert call.mask is not None
        call.requests = self._here.requests = self._requests(
            call.mask,
            call.ids,
            given=cached,
            copies=call.copies,
            drafts=call.assisted,
            beams=call.beams,
        )

    def _refuse_continuous_batching(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedFeature(
            RUNTIME, "continuous batching packs requests into one row", "use generate()"
        )

    def _finish(self, requests: Requests) -> None:
        self._here.last = requests
        if self._on_outcome is not None:
            self._on_outcome(requests.outcomes())

    # -------------------------------------------------------- one forward pass

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        here, given = self._here, kwargs
        if args:
            given = self._signature.bind_partial(*args, **kwargs).arguments
        here.step = None
        requests = here.requests
        if requests is None:
            raise UnsupportedFeature(RUNTIME, "a forward call outside generate()", _BARE)
        accessors: Any = self._sites.model
        if accessors.get_output_embeddings() is not self._sites.head:
            raise HookLost("the output embedding was replaced after steer(); steer the model again")
        step = passes.step_of(given, requests)
        if self._positions is not None and step.stop > self._positions:
            room = f"{self._positions} tokens at most"
            raise DataError(Problem("prompt and answer", room, f"{step.stop} tokens"))
        cache = passes.cache_among(given.values())
        if not requests.begun and step.start and getattr(cache, _STEERED, False):
            raise SteeredCache(
                "the KV cache holds hidden states that were steered for an earlier request; "
                "start from an unsteered cache"
            )
        if here.bare is not None:
            here.bare.check(cache, requests)
        requests.begin(step)
        here.step, here.ledger = step, Ledger(self._depths)

    def _at_site(self, stop: Stop, module: nn.Module, h: Tensor) -> Tensor | None:
        step, requests = self._here.step, self._here.requests
        if step is None or requests is None:
            raise RowMappingLost(
                f"{type(module).__name__} ran outside a forward pass of the steered model"
            )
        self._here.ledger.report(stop.depth)
        columns = step.head if stop.depth == self._plan.head_depth else step.columns
        if h.dim() != 3 or h.shape[:2] != (requests.rows, len(columns)):
            raise RowMappingLost(
                f"{type(module).__name__} got {tuple(h.shape)}, expected {requests.rows} rows of "
                f"{len(columns)} columns"
            )
        changed = requests.visit(stop, h, step, columns)
        return None if changed is h else changed

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        step, requests = self._here.step, self._here.requests
        self._here.step = None
        if step is None or requests is None:
            raise HookLost("the hook that announces forward passes is gone")
        if self._plan.logits_depth in self._depths:
            output = passes.with_logits(output, lambda logits: requests.said(logits, step))
            self._here.ledger.report(self._plan.logits_depth)
        self._here.ledger.check()
        requests.end(step)
        self._note_cache(requests, step, output)
        return output

    def _note_cache(self, requests: Requests, step: Step, output: Any) -> None:
        cache = passes.cache_among(output if isinstance(output, tuple) else output.values())
        if cache is None:
            return
        if requests.acts_on_layers():
            setattr(cache, _STEERED, True)
        elif step.start == 0 and hasattr(cache, _STEERED):  # it was emptied, and filled anew
            delattr(cache, _STEERED)
        if self._here.bare is not None:
            self._here.bare.note(cache, requests)


class _Here(threading.local):
    """What a thread is doing with the model."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.requests: Requests | None = None
        self.bare: passes.Bare | None = None
        self.step: Step | None = None
        self.ledger = Ledger(())
        self.last: Requests | None = None  # whose outcomes are read when asked for

    @contextmanager
    def opened(self) -> Iterator[None]:
        """One batch of requests; nothing of it outlives the context.

        Raises:
            UnsupportedFeature: this thread is inside another one.
        """
        if self.call is not None or self.requests is not None:
            raise UnsupportedFeature(RUNTIME, "a request inside another one of the same model")
        try:
            yield
        finally:
            self.call = self.requests = self.bare = self.step = None


def _drop_compiled_code() -> None:
    """Have torch.compile trace again: code traced earlier has the wrong set of hooks."""
    if "torch._dynamo" in sys.modules:  # nothing was compiled before it is imported
        torch.compiler.reset()
