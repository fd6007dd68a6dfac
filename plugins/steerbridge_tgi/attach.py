"""Attach a package to the model of a `TextGenerationService`: checks, hooks, and wrappers that
record which rows a pass holds. Only these objects are changed, no class of the server.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from steerbridge import imports
from steerbridge.errors import UnsupportedFeature
from steerbridge.package import SteeringPackage, load
from steerbridge.plan import Stop
from steerbridge.spec import HeadMatrix, ImageMean, PromptEnd, Reading, Say, TokenReading
from steerbridge_tgi import rows
from steerbridge_tgi.gates import Arguments, Gates
from steerbridge_tgi.reporter import Reporter
from steerbridge_tgi.rows import Part
from steerbridge_tgi.sites import RUNTIME, facts, locate, stream, takes_residual, text_config
from steerbridge_torch import quantisation

_PADDED: Final = "CausalLM"
_FLAT: Final = "FlashCausalLM"
# These lay out batches in a way that `rows` does not support, or do not run at all.
_REFUSED: Final = ("Mamba", "Seq2SeqLM", "IdeficsCausalLM", "TransformersFlashVlmCausalLM")
_STATIC_ROWS: Final = 1024  # of an eager pass; larger passes do not use the static buffer
_RPCS: Final = ("Prefill", "Decode", "FilterBatch", "ClearCache")


def attach(service: Any, package: str) -> Gates:
    """Steer every request of a service; called before its warm-up.

    Raises:
        ModelMismatch: the package was made for another model.
        UnsupportedFeature: the model's class, or a setting of the server.
    """
    model = service.model
    loaded = load(package)
    known = facts(model)
    loaded.check(known, imports.ignored())
    kind = quantisation(model.dtype, text_config(model))
    steered = loaded.calibrated(RUNTIME, kind)
    layout = _layout(model)
    _check(steered, model, layout)
    size = max(_STATIC_ROWS, _graph_rows())
    gates = Gates(steered, torch.device(model.device), size, _share(model))
    _hook(gates, model)
    reporter = Reporter(model, known)
    (_wrap_padded if layout == _PADDED else _wrap_flat)(gates, model, reporter)
    _wrap_warmup(gates, model)
    _wrap_rpcs(gates, service)
    reporter.active(calibrated=loaded.spec.is_calibrated(RUNTIME, kind))
    return gates


# ---------------------------------------------------------------- checks


def _layout(model: Any) -> str:
    names = [kind.__name__ for kind in type(model).__mro__]
    refused = [name for name in _REFUSED if name in names]
    layouts = [name for name in (_FLAT, _PADDED) if name in names]
    if refused or not layouts:
        raise UnsupportedFeature(RUNTIME, f"models of the class {names[0]}")
    return layouts[0]


def _check(package: SteeringPackage, model: Any, layout: str) -> None:
    """Refuse a package that this server cannot apply to every request.

    Raises:
        UnsupportedFeature: with the setting to change, if there is one.
    """
    spec = package.spec
    cached = layout == _FLAT and _flag("PREFIX_CACHING")
    for probe in spec.probes:
        for reading in probe.readings:
            _check_reading(spec, probe.id, reading, model, layout, cached)
        if probe.token_reading is not None:
            _check_rows(probe.id, probe.token_reading, model, cached)
    for x in spec.interventions:
        if isinstance(x, Say) and x.reasoning is not None:
            raise UnsupportedFeature(RUNTIME, f"{x.id}: a sentence behind a block of reasoning")
    layers = [x.id for x in spec.interventions if not isinstance(x, HeadMatrix | Say)]
    if layers and cached:
        raise UnsupportedFeature(
            RUNTIME,
            f"{layers[0]}: writes before the head would stay in the prefix cache",
            "PREFIX_CACHING=0",
        )
    adapters = os.environ.get("LORA_ADAPTERS") or getattr(model, "loaded_adapters", None)
    if adapters:
        raise UnsupportedFeature(
            RUNTIME,
            "LoRA adapters, of which each request may choose one: they move what probes read",
            "merge the adapter into the model, and train the package for that",
        )
    speculates = bool(getattr(model, "speculate", 0)) or bool(_speculation())
    if "VlmCausalLM" in [kind.__name__ for kind in type(model).__mro__] and speculates:
        raise UnsupportedFeature(RUNTIME, "speculation for models with images")


def _check_rows(probe: str, reading: TokenReading, model: Any, cached: bool) -> None:
    if reading.scope != "prompt":
        raise UnsupportedFeature(
            RUNTIME, f"{probe}: {reading}: rows of answers, in graphs that were captured"
        )
    if cached:
        raise UnsupportedFeature(
            RUNTIME, f"{probe}: {reading} needs rows that a cached prefix skips", "PREFIX_CACHING=0"
        )
    if reading.rows != "all" and type(model).__name__ == "MllamaCausalLM":
        raise UnsupportedFeature(RUNTIME, f"{probe}: {reading}: images are not rows in this model")


def _check_reading(
    spec: Any, probe: str, reading: Reading, model: Any, layout: str, cached: bool
) -> None:
    position = reading.position
    last = isinstance(position, PromptEnd) and position.offset == 0
    if cached and not last:
        raise UnsupportedFeature(
            RUNTIME, f"{probe}: {reading} needs rows that a cached prefix skips", "PREFIX_CACHING=0"
        )
    if spec.depth(reading.site) > spec.base_model.num_layers and not last and layout == _FLAT:
        raise UnsupportedFeature(RUNTIME, f"{probe}: {reading}: the head gets only the last rows")
    if isinstance(position, ImageMean) and type(model).__name__ == "MllamaCausalLM":
        raise UnsupportedFeature(RUNTIME, f"{probe}: {reading}: images are not rows in this model")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


def _speculation() -> int:
    from text_generation_server.utils.speculate import get_speculate

    speculated: int = get_speculate()
    return speculated


def _graph_rows() -> int:
    """Rows of the largest pass that may be captured as a CUDA graph."""
    from text_generation_server.models import globals as settings

    sizes = getattr(settings, "CUDA_GRAPHS", None) or [0]
    return int(max(sizes)) * (1 + _speculation())


def _share(model: Any) -> Callable[[Tensor], Tensor]:
    """Broadcast from rank 0, so that rounding cannot make ranks decide differently."""
    import torch.distributed

    if not torch.distributed.is_initialized() or model.world_size == 1:
        return lambda values: values

    def share(values: Tensor) -> Tensor:
        values = values.contiguous()
        torch.distributed.broadcast(values, 0, group=model.process_group)
        return values

    return share


# ---------------------------------------------------------------- hooks and wrappers


def _hook(gates: Gates, model: Any) -> None:
    sites = locate(model)
    watched = {stop.depth: stop for stop in gates.plan.stops}
    watched.pop(gates.plan.logits_depth, None)  # what `forward` returns
    # The head is always watched: logits that did not pass it were not guarded.
    head = gates.plan.head_depth
    watched.setdefault(head, Stop(head))
    for depth, stop in watched.items():
        module = sites.at_depth(depth)
        # Before all other hooks: those of a sharded module transform its input.
        module.register_forward_pre_hook(
            functools.partial(_at_site, gates, stop, takes_residual(module)),
            prepend=True,
            with_kwargs=True,
        )


def _at_site(
    gates: Gates,
    stop: Stop,
    takes: bool,
    module: Any,  # noqa: ARG001 - as torch calls it
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Arguments | None:
    return gates.visit(stop, stream(args, kwargs, takes))


@contextmanager
def _passing(
    gates: Gates,
    model: Any,
    reporter: Reporter,
    parts: Sequence[Part],
    size: int,
    head_rows: int,
    images: Tensor | None,
) -> Iterator[None]:
    """One forward pass, from its announcement to its verdicts."""
    gates.begin(parts, size, head_rows, images)
    try:
        yield
        replayed = bool(getattr(model, "cuda_graphs", None))
        for request, verdict in gates.end(replayed):
            reporter.verdict(request, verdict)
    finally:
        gates.drop()


def _wrap_padded(gates: Gates, model: Any, reporter: Reporter) -> None:
    original = model.generate_token

    @functools.wraps(original)
    def generate_token(batch: Any) -> Any:
        if gates.idle:
            return original(batch)
        # It runs the forward pass first, then samples.
        model.forward = functools.partial(forward, batch)
        try:
            return _noting_lengths(gates, model, batch, original(batch))
        finally:
            del model.forward

    original_forward = model.forward

    def forward(batch: Any, *args: Any, **kwargs: Any) -> Any:
        size = batch.input_ids.numel()
        with _passing(gates, model, reporter, rows.padded(batch), size, size, None):
            logits, *more = original_forward(*args, **kwargs)
            said = gates.said(logits.reshape(size, -1))
            return said.view(logits.shape), *more

    model.generate_token = generate_token


def _wrap_flat(gates: Gates, model: Any, reporter: Reporter) -> None:
    original, images = model.forward, _Images(model)

    @functools.wraps(original)
    def forward(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if gates.idle:
            return original(batch, *args, **kwargs)
        parts = rows.flattened(batch)
        size = sum(part.count for part in parts)
        with _passing(gates, model, reporter, parts, size, parts[-1].head.stop, images.taken()):
            logits, *more = original(batch, *args, **kwargs)
            return gates.said(logits), *more

    generates = model.generate_token

    @functools.wraps(generates)
    def generate_token(batch: Any) -> Any:
        return _noting_lengths(gates, model, batch, generates(batch))

    model.forward, model.generate_token = forward, generate_token


def _noting_lengths(gates: Gates, model: Any, batch: Any, result: Any) -> Any:
    """What `generate_token` returned; requests that ended for length may go on as others.

    The result names only the requests that this rank tells the router of. Each rank must know all.
    """
    each = zip(batch.requests, batch.stopping_criterias, batch.all_input_ids, strict=True)
    for request, criteria, ids in each:
        count = criteria.current_tokens
        if count and count >= criteria.max_new_tokens:  # the server's own condition
            whole = ids[:, 0] if isinstance(ids, torch.Tensor) else ids
            start = len(whole) - count
            text, _, _ = model.decode_token(whole, start - 1, start, skip_special_tokens=True)
            gates.ended_for_length(request.id, text, count)
    return result


class _Images:
    """Which rows of the next pass are an image's: recorded where the model inserts them."""

    def __init__(self, model: Any) -> None:
        self._rows: Tensor | None = None
        original = getattr(model, "get_inputs_embeds", None)
        if original is None:
            return
        config = model.model.config
        names = ("image_token_id", "image_token_index")
        token = next(
            (getattr(config, n) for n in names if getattr(config, n, None) is not None), None
        )
        if token is None:
            raise UnsupportedFeature(RUNTIME, f"{type(model).__name__} names no token for images")

        @functools.wraps(original)
        def get_inputs_embeds(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            embeds = args[0] if args else kwargs.get("vision_embeds")
            self._rows = None if embeds is None else input_ids == token
            return original(input_ids, *args, **kwargs)

        model.get_inputs_embeds = get_inputs_embeds

    def taken(self) -> Tensor | None:
        image_rows, self._rows = self._rows, None
        return image_rows


def _wrap_warmup(gates: Gates, model: Any) -> None:
    original = model.warmup

    @functools.wraps(original)
    def warmup(*args: Any, **kwargs: Any) -> Any:
        gates.idle = True
        try:
            return original(*args, **kwargs)
        finally:
            gates.idle = False

    model.warmup = warmup


def _wrap_rpcs(gates: Gates, service: Any) -> None:
    """After each call, forget requests of no cached batch: they ended or were cancelled."""

    def wrapped(original: Any) -> Any:
        @functools.wraps(original)
        async def call(request: Any, context: Any) -> Any:
            try:
                return await original(request, context)
            finally:
                batches = service.cache.cache.values()
                gates.keep([r.id for batch in batches for r in batch.requests])

        return call

    for name in _RPCS:
        setattr(service, name, wrapped(getattr(service, name)))
