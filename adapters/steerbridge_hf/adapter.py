"""`steer`: attach a steering package to a transformers model.

Request lifecycle: `generate` (or a bare forward call) opens `Requests` for its batch; a
pre-hook on the model records which columns a forward pass covers; hooks on the planned sites
read, decide and write; a post-hook on the model refuses to return logits of a request that
was not decided. No class is patched: only this model object is changed, and `Session.remove`
undoes it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from steerbridge.errors import (
    HookLost,
    RowMappingLost,
    SteeredCache,
    UnsupportedFeature,
)
from steerbridge.package import SteeringPackage
from steerbridge.plan import Stop, plan
from steerbridge.runtime import Attachment, Outcome
from steerbridge.spec import ImageMean
from steerbridge_hf.kernels import Weights
from steerbridge_hf.request import Requests, Step
from steerbridge_hf.sites import RUNTIME, facts, image_token, locate

_OWNER = "_steerbridge_session"  # on the model: which session steers it
_STEERED = "_steerbridge_steered"  # on a KV cache: its states were rewritten (kept by copies)

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
        self._package = package.calibrated(RUNTIME, quantisation(self._sites.model))
        self._outcomes: tuple[Outcome, ...] = ()
        self._on_outcome = on_outcome
        self._plan = plan(self._package.spec)
        self._weights = Weights(self._package)
        self._handles: list[Any] = []
        self._replaced: dict[str, Any] = {}
        self._here = threading.local()  # each thread generates for its own requests
        # The requests whose rows a KV cache holds, for caches filled by bare forward calls.
        self._caches: WeakKeyDictionary[Any, Requests] = WeakKeyDictionary()
        self._signature = inspect.signature(self._sites.model.forward)
        self._image_token = image_token(self._sites.model.config)
        if self._image_token is None and hasattr(self._sites.model.config, "vision_config"):
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
        return self._outcomes

    @property
    def current(self) -> Outcome | None:
        """See `Attachment`. Each thread generates for requests of its own."""
        requests: Requests | None = getattr(self._here, "requests", None)
        return requests.outcomes()[0] if requests is not None and requests.decided() else None

    # -------------------------------------------------------- attach and detach

    def apply(self) -> None:
        """Attach the hooks. Does nothing when they are attached."""
        model = self._sites.model
        owner = model.__dict__.get(_OWNER)
        if owner is self:
            return
        if owner is not None:
            raise UnsupportedFeature(RUNTIME, "the model is steered already", "remove() first")
        _drop_compiled_code()
        hook: Any = torch.compiler.disable
        self._handles = [
            model.register_forward_pre_hook(hook(self._before_forward), with_kwargs=True),
            model.register_forward_hook(hook(self._after_forward), with_kwargs=True),
        ]
        for stop in self._plan.stops:
            self._handles.append(
                self._sites.at_depth(stop.depth).register_forward_pre_hook(
                    hook(functools.partial(self._at_site, stop)), with_kwargs=True
                )
            )
        if not any(s.depth == self._plan.head_depth for s in self._plan.stops):
            # The head is always watched: logits that did not pass it were not guarded.
            watch = Stop(self._plan.head_depth, (), (), (), ())
            self._handles.append(
                self._sites.head.register_forward_pre_hook(
                    hook(functools.partial(self._at_site, watch)), with_kwargs=True
                )
            )
        object.__setattr__(model, _OWNER, self)
        for name, wrapper in (
            ("generate", self._generate),
            ("generate_batch", self._refuse_continuous_batching),
            ("init_continuous_batching", self._refuse_continuous_batching),
        ):
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
        for name in (_OWNER, "generate", "generate_batch", "init_continuous_batching"):
            model.__dict__.pop(name, None)
        model.__dict__.update(self._replaced)
        self._replaced = {}
        _drop_compiled_code()

    # -------------------------------------------------------- generate

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        arguments = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
        self._refuse_modes(arguments)
        if getattr(self._here, "requests", None) is not None:
            raise UnsupportedFeature(RUNTIME, "generate() inside generate() of one model")
        requests = self._open(arguments)
        self._guard(requests, arguments)
        self._here.requests = requests
        try:
            result = original(**arguments)
        finally:
            self._here.requests = None
        self._finish(requests)
        return result

    def _guard(self, requests: Requests, arguments: dict[str, Any]) -> None:
        """Add the check that every token comes from a watched forward pass."""
        ids = arguments.get("inputs", arguments.get("input_ids"))
        given = 0 if ids is None else ids.shape[1]
        if self._assisted(arguments):
            # Candidates pass the logits processors before any forward pass of this model.
            criteria = StoppingCriteriaList([_StopGuard(requests, given)])
            criteria.extend(arguments.get("stopping_criteria") or [])
            arguments["stopping_criteria"] = criteria
        else:
            processors = LogitsProcessorList([_Guard(requests, given)])
            processors.extend(arguments.get("logits_processor") or [])
            arguments["logits_processor"] = processors

    def _assisted(self, arguments: dict[str, Any]) -> bool:
        config = arguments.get("generation_config") or self._sites.model.generation_config
        lookup = arguments.get("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens)
        return lookup is not None or arguments.get("assistant_model") is not None

    def _open(self, arguments: dict[str, Any]) -> Requests:
        """Requests of a call of `generate`; fills in the attention mask it implies."""
        ids = arguments.get("inputs")
        ids = arguments.get("input_ids") if ids is None else ids
        embeds = arguments.get("inputs_embeds")
        prompt = ids if embeds is None else embeds
        if prompt is None or prompt.shape[1] == 0:
            raise UnsupportedFeature(RUNTIME, "generate() without a prompt")
        mask = arguments.get("attention_mask")
        cache = _cache_among(arguments.values())
        if mask is None:
            if _length(cache):
                raise UnsupportedFeature(
                    RUNTIME,
                    "a KV cache without attention_mask: the prompt's length is unknown",
                    "pass attention_mask over cached and new tokens",
                )
            mask = self._implied_mask(prompt, arguments)
            arguments["attention_mask"] = mask
        if mask.dim() != 2:
            raise UnsupportedFeature(RUNTIME, f"attention_mask of {mask.dim()} dimensions")
        self._refuse_steered(cache)
        return self._requests(mask, None if embeds is not None else ids)

    def _implied_mask(self, prompt: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The mask `generate` infers when it gets none (generation/utils.py of transformers)."""
        ones = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        config = arguments.get("generation_config") or self._sites.model.generation_config
        pad = arguments.get("pad_token_id", config.pad_token_id)
        eos = arguments.get("eos_token_id", config.eos_token_id)
        stops = eos if isinstance(eos, list | tuple) else [eos]
        if pad is None or pad in stops or prompt.dim() != 2 or prompt.is_floating_point():
            return ones
        return prompt.ne(pad).long()

    def _requests(self, mask: Tensor, ids: Tensor | None) -> Requests:
        images = None
        if ids is not None and self._image_token is not None and ids.shape == mask.shape:
            images = (ids == self._image_token).cpu()
        elif ids is not None and self._image_token is None:
            images = torch.zeros(mask.shape, dtype=torch.bool)
        return Requests(
            self._package, self._plan, self._weights, mask.detach().cpu().bool(), images
        )

    def _refuse_modes(self, arguments: dict[str, Any]) -> None:
        config = arguments.get("generation_config") or self._sites.model.generation_config
        for name, idle in (("guidance_scale", 1), ("assistant_early_exit", None)):
            value = arguments.get(name, getattr(config, name, None))
            if value is not None and value != idle:
                # Both run extra forward passes of this model that belong to no request.
                raise UnsupportedFeature(RUNTIME, f"{name}={value}")

    def _refuse_continuous_batching(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedFeature(
            RUNTIME, "continuous batching packs requests into one row", "use generate()"
        )

    def _refuse_steered(self, cache: Any) -> None:
        if _length(cache) and getattr(cache, _STEERED, False):
            raise SteeredCache(
                "the KV cache holds hidden states that were steered for an earlier request; "
                "start from an unsteered cache"
            )

    def _finish(self, requests: Requests) -> None:
        if not requests.decided():
            raise HookLost("generation ended without a verdict: the hooks did not run")
        self._outcomes = requests.outcomes()
        if self._on_outcome is not None:
            self._on_outcome(self._outcomes)

    # -------------------------------------------------------- one forward pass

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise RowMappingLost("a forward pass without input_ids or inputs_embeds")
        cache = _cache_among(given.values())
        rows, width = tokens.shape[:2]
        start = _length(cache)
        requests = getattr(self._here, "requests", None)
        self._here.direct = requests is None
        if requests is None:
            requests = self._requests_of_call(given, tokens, cache)
        requests.expand_to(rows)
        step = Step(start, width, _kept(given.get("logits_to_keep", 0), width))
        requests.begin(step)
        self._here.step, self._here.current = step, requests
        self._here.head_seen = False

    def _requests_of_call(self, given: dict[str, Any], tokens: Tensor, cache: Any) -> Requests:
        """Requests of a bare call `model(...)`: a new batch, or one more token of a known one."""
        mask = given.get("attention_mask")
        if start := _length(cache):
            known = self._caches.get(cache)
            if known is None or tokens.shape[1] != 1:
                raise RowMappingLost(
                    f"a forward call of {tokens.shape[1]} tokens on a cache of {start} tokens "
                    "belongs to no known request; use generate()"
                )
            return known
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.long)
        if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
            raise RowMappingLost("the attention mask of a forward call must be [rows, tokens]")
        return self._requests(mask, given.get("input_ids"))

    def _at_site(
        self, stop: Stop, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        step: Step | None = getattr(self._here, "step", None)
        if step is None:
            raise RowMappingLost(
                f"{type(module).__name__} ran outside a forward pass of the steered model"
            )
        requests: Requests = self._here.current
        h = args[0] if args else kwargs["hidden_states"]
        columns = step.columns
        if stop.depth == self._plan.head_depth:
            self._here.head_seen = True
            columns = columns[step.kept]
        rows = len(requests.mask)
        if h.dim() != 3 or h.shape[:2] != (rows, len(columns)):
            raise RowMappingLost(
                f"{type(module).__name__} got {tuple(h.shape)}, expected {rows} rows of "
                f"{len(columns)} columns"
            )
        changed = requests.visit(stop, h, step, columns)
        if changed is h:
            return None
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed}

    def _after_forward(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        step: Step = self._here.step
        requests: Requests = self._here.current
        self._here.step = None
        if not self._here.head_seen:
            raise HookLost("the output embedding was not reached through the steered module")
        requests.watched = step.stop
        if step.stop >= requests.prompt and not requests.decided():
            raise HookLost("the prompt ended without a verdict: a probe's site never ran")
        cache = _cache_among(output if isinstance(output, tuple) else output.values())
        if cache is not None:
            if self._here.direct:
                self._caches[cache] = requests
            if requests.acts_on_layers():
                setattr(cache, _STEERED, True)
        if self._here.direct and step.start < requests.prompt <= step.stop:
            self._finish(requests)


class _Guard:
    """A logits processor that stops generation when a forward pass was not watched.

    It detects compiled code that was traced before `apply` and so runs without hooks. The logits
    of column c come from a pass that covered c, so c + 1 columns must have been seen (assisted
    decoding asks for several columns of one pass).
    """

    def __init__(self, requests: Requests, given: int) -> None:
        self._requests = requests
        self._before = requests.prompt - given  # columns that `input_ids` does not show

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.check(self._before + input_ids.shape[1])
        return scores

    def check(self, columns: int) -> None:
        """Raise HookLost unless this many columns were watched and every verdict is known."""
        if self._requests.watched < columns or not self._requests.decided():
            raise HookLost(
                "a forward pass ran without the steering hooks; if the model was compiled "
                "before steer(), call torch.compiler.reset() and steer before compiling"
            )


class _StopGuard(_Guard, StoppingCriteria):
    """The same check after a token was chosen, for assisted decoding."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.check(self._before + input_ids.shape[1] - 1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _drop_compiled_code() -> None:
    """Have torch.compile trace again: code traced earlier has the wrong set of hooks."""
    if "torch._dynamo" in sys.modules:  # nothing was compiled before it is imported
        torch.compiler.reset()


def quantisation(model: Any) -> str:
    """Name of the model's arithmetic as used in `calibrations` (F32, BF16, F16)."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return names.get(model.dtype, str(model.dtype))


def _cache_among(values: Iterable[Any]) -> Any:
    """The KV cache among arguments or outputs, recognised by its method `get_seq_length`.

    Not by its name: transformers 5.24 renamed `past_key_values` to `cache`, and if a cache is
    missed, every token is taken for a prompt.
    """
    return next((v for v in values if hasattr(v, "get_seq_length")), None)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _kept(logits_to_keep: int | Tensor, width: int) -> Tensor:
    """Columns of a pass that reach the head, as `slice_logits_to_keep` of transformers does."""
    every = torch.arange(width)
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1:
            raise RowMappingLost("logits_to_keep per row: columns of the head are not known")
        return every[logits_to_keep.cpu()]
    return every[-logits_to_keep:] if logits_to_keep else every
