"""What one forward call of a transformers model covers, and a rehearsal of one at attach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from steerbridge.errors import HookLost, RowMappingLost, UnsupportedFeature
from steerbridge.plan import Stop
from steerbridge_hf.request import Requests, Step
from steerbridge_hf.sites import RUNTIME, Sites, ordinary_tokens

_TOKENS: Final = 3  # of the rehearsal
# Arguments by which kernels take several prompts for one row.
_PACKED: Final = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")


def cache_among(values: Iterable[Any]) -> Any:
    """The KV cache among arguments or outputs, recognised by its method `get_seq_length`.

    Not by its name: transformers 5.24 renamed `past_key_values` to `cache`, and if a cache is
    missed, every token is taken for a prompt.
    """
    return next((v for v in values if hasattr(v, "get_seq_length")), None)


def length(cache: Any) -> int | None:
    """Columns that a cache holds; None if it cannot say (recurrent states)."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, IndexError, TypeError, ValueError):
        return None


def step_of(given: Mapping[str, Any], requests: Requests) -> Step:
    """The columns that a forward call covers.

    Raises:
        RowMappingLost: its arguments do not say, or hold several prompts in one row.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    if tokens is None:
        raise RowMappingLost("a forward pass without input_ids or inputs_embeds")
    rows, width = tokens.shape[:2]
    if rows != requests.rows:
        raise RowMappingLost(f"{rows} rows in a pass, {requests.rows} in the request")
    cache = cache_among(given.values())
    known = length(cache)
    recurrent = known is None or (cache is None and _has_state(given))
    start = requests.watched if recurrent else known
    assert start is not None
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != start + width:
        raise RowMappingLost(
            f"an attention mask over {mask.shape[1]} columns in a pass that ends at column "
            f"{start + width}"
        )
    evaluates = start < requests.prompt or not requests.decided()
    live = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and requests.tokens.reads_answers:
        live = mask[:, start:].detach().cpu().bool()
    if evaluates:
        _refuse_packed(given, requests, start, width)
    columns = torch.arange(start, start + width)
    return Step(
        start,
        width,
        ids.detach().cpu() if ids is not None and (evaluates or requests.speech.listens) else None,
        columns,
        _kept(given.get("logits_to_keep", 0), columns),
        cached=start > 0,
        live=live,
    )


def _has_state(given: Mapping[str, Any]) -> bool:
    """True for arguments that hold states of a recurrent model, which do not count tokens."""
    names = ("cache_params", "state", "past_key_values", "cache")
    return any(given.get(name) is not None for name in names)


def _refuse_packed(given: Mapping[str, Any], requests: Requests, start: int, width: int) -> None:
    """Several prompts in one row have one prompt end too few."""
    packed = [name for name in _PACKED if given.get(name) is not None]
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        stop = min(start + width, requests.prompt)
        real = requests.mask[:, start:stop]
        at = positions[:, : stop - start].detach().cpu().expand(len(real), -1)
        back = at.diff(dim=1) < 0
        # Few do, so the mask is seldom asked.
        known = at.shape == real.shape and bool(back.any())
        if known and bool((back & real[:, 1:] & real[:, :-1]).any()):
            packed.append("position_ids that begin again")
    if packed:
        raise RowMappingLost(f"several prompts packed into one row ({packed[0]})")


def _kept(logits_to_keep: int | Tensor, columns: Tensor) -> Tensor:
    """Columns of a pass that reach the head, as `slice_logits_to_keep` of transformers does."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1:
            raise RowMappingLost("logits_to_keep per row: columns of the head are not known")
        return columns[logits_to_keep.cpu()]
    return columns[-logits_to_keep:] if logits_to_keep else columns


def with_logits(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a model gives, with other logits.

    Raises:
        HookLost: it holds none.
    """
    if isinstance(output, tuple):
        at = next((i for i, v in enumerate(output) if isinstance(v, Tensor) and v.dim() == 3), None)
        if at is None:
            raise HookLost("the model gives no logits, which a rule has to force")
        return (*output[:at], change(output[at]), *output[at + 1 :])
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise HookLost("the model gives no logits, which a rule has to force")
    if (changed := change(logits)) is not logits:
        output["logits"] = changed
    return output


class Bare:
    """A loop of forward calls and its cache, whose rows must stay where they are.

    `reorder_cache` moves conversations between rows. It is seen by the keys of the prompts' last
    tokens, which say which prompt a row holds.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None

    def note(self, cache: Any, requests: Requests) -> None:
        """Remember the rows once the prompt has been evaluated."""
        if self._keys is None and requests.decided():
            self._keys = _keys(cache, requests)

    def check(self, cache: Any, requests: Requests) -> None:
        """Raise RowMappingLost if the rows of the cache have changed places."""
        if self._keys is None or (now := _keys(cache, requests)) is None:
            return
        if not torch.equal(self._keys, now):
            raise RowMappingLost(
                "the cache holds other rows than before; a request keeps its rows (for beams use "
                "generate())"
            )


def _keys(cache: Any, requests: Requests) -> Tensor | None:
    """Keys [B, heads, size] of each prompt's last token; None for a cache that holds none."""
    layers = getattr(cache, "layers", None) or []
    keys = getattr(layers[-1], "keys", None) if layers else None
    held = length(cache)
    if not isinstance(keys, Tensor) or keys.dim() != 4 or held is None:
        return None
    dropped = max(0, held - keys.shape[2])  # by a sliding window
    at = requests.ends - dropped
    if len(keys) != requests.rows or int(at.min()) < 0 or int(at.max()) >= keys.shape[2]:
        return None
    return keys[torch.arange(len(keys)), :, at].detach().clone()


# ---------------------------------------------------------------- rehearsal


def rehearse(sites: Sites, stops: Mapping[int, Stop]) -> None:
    """One pass of a few tokens: every planned site must be reached once, with all columns.

    Raises:
        UnsupportedFeature: it is not, or the model does not take such a pass.
    """
    seen: dict[int, list[tuple[int, ...]]] = {depth: [] for depth in stops}
    after = _After(sites) if len(sites.blocks) in stops else None
    handles = [sites.watch(depth, partial(_note, shapes)) for depth, shapes in seen.items()]
    handles += after.handles if after else []
    model: Any = sites.model
    try:
        with torch.random.fork_rng(enabled=model.training), torch.no_grad():
            # Not through a compiled call: it would be compiled for this pass.
            model._call_impl(input_ids=ordinary_tokens(model, _TOKENS), use_cache=True)
    except Exception as error:
        name = type(model).__name__
        raise UnsupportedFeature(
            RUNTIME, f"{name} does not take a pass of {_TOKENS} tokens: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for depth, shapes in seen.items():
        _check_shapes(model, sites, depth, shapes)
    if after:
        after.check(model)


def _note(shapes: list[tuple[int, ...]], module: nn.Module, h: Any) -> None:
    shapes.append(tuple(h.shape) if isinstance(h, Tensor) else ())


def _check_shapes(model: Any, sites: Sites, depth: int, shapes: list[tuple[int, ...]]) -> None:
    place = "head_input" if depth > len(sites.blocks) else f"layer_input[{depth}]"
    wanted = (1, _TOKENS, sites.config.hidden_size)
    if shapes != [wanted]:
        raise UnsupportedFeature(
            RUNTIME,
            f"{place} of {type(model).__name__}: a pass of {_TOKENS} tokens reaches it "
            f"{len(shapes)} times with shapes {shapes}, expected once with {wanted}",
        )


class _After:
    """Checks that what the last block gives is what the model goes on with."""

    def __init__(self, sites: Sites) -> None:
        self._output: Tensor | None = None
        self._used = False
        decoder: Any = sites.model
        others = [m for m in decoder.get_decoder().modules() if m not in set(sites.blocks)]
        self.handles = [sites.watch(len(sites.blocks), self._given)]
        self.handles += [
            module.register_forward_pre_hook(self._taken, with_kwargs=True) for module in others
        ]

    def _given(self, module: nn.Module, h: Tensor) -> None:
        self._output = h

    def _taken(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._output is not None and not self._used:
            taken = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            self._used = taken is self._output

    def check(self, model: Any) -> None:
        if not self._used:
            raise UnsupportedFeature(
                RUNTIME,
                f"the final norm of {type(model).__name__} takes something else than its last "
                "block gives",
            )
