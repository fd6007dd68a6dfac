"""What transformers prepares of a call of `generate`, as its own methods are given it.

The rules by which `generate` merges configurations, infers a mask or repeats prompts are its own;
they are not repeated here. `Call` is told what `_expand_inputs_for_generation` returns (token ids
and rows for each prompt), what `_prepare_cache_for_generation` is given (the merged configuration,
the mask, the cache and the mode) and what logits processors are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode

from steerbridge.errors import HookLost, RowMappingLost, UnsupportedFeature
from steerbridge_hf.request import Requests
from steerbridge_hf.sites import RUNTIME

OBSERVED: Final = (
    "_expand_inputs_for_generation",
    "_prepare_cache_for_generation",
    "_get_logits_processor",
    "_get_stopping_criteria",
    "prepare_inputs_for_generation",
)
_ASSISTED: Final = (GenerationMode.ASSISTED_GENERATION,)
_BEAMS: Final = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
# Each runs passes of this model that belong to no request, or changes the prompt behind its mask.
_REFUSED: Final = (
    ("guidance_scale", (None, 1)),
    ("assistant_early_exit", (None,)),
    ("token_healing", (None, False)),
)


class Call:
    """One call of `generate`."""

    def __init__(self) -> None:
        self.requests: Requests | None = None
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.copies = 1
        self.given = 0
        self.assisted = self.beams = False
        self._embeds: Tensor | None = None

    def expanded(self, ids: Tensor, kwargs: dict[str, Any], copies: int) -> None:
        """What `_expand_inputs_for_generation` returned."""
        self._embeds = kwargs.get("inputs_embeds")
        self.ids, self.copies = None if self._embeds is not None else ids, copies
        self.given = ids.shape[1]

    def prepared(self, config: Any, kwargs: dict[str, Any], mode: Any) -> None:
        """What `_prepare_cache_for_generation` was given.

        Raises:
            UnsupportedFeature: a way of generating that cannot be watched, or no prompt.
        """
        for name, idle in _REFUSED:
            if (value := getattr(config, name, None)) not in idle:
                raise UnsupportedFeature(RUNTIME, f"{name}={value}")
        self.assisted, self.beams = mode in _ASSISTED, mode in _BEAMS
        prompt = self._embeds if self._embeds is not None else self.ids
        if prompt is None or prompt.shape[1] == 0:
            raise UnsupportedFeature(RUNTIME, "generate() without a prompt")
        mask = kwargs.get("attention_mask")
        if mask is None:  # all of it is real; transformers 5.24 then keeps the length alone
            length = getattr(config, "_mask_length", None) or prompt.shape[1]
            mask = torch.ones(len(prompt), length, dtype=torch.bool)
        if mask.dim() != 2:
            raise UnsupportedFeature(RUNTIME, f"attention_mask of {mask.dim()} dimensions")
        self.mask = mask.detach().cpu().bool().expand(len(prompt), -1)
        if self.ids is not None:
            self.ids = self.ids.detach().cpu()
            hidden = self.mask.shape[1] - self.ids.shape[1]
            if hidden < 0:
                raise RowMappingLost("attention_mask is shorter than the prompt")
            if hidden:  # only the tokens behind a cache were given
                before = torch.full((len(self.ids), hidden), -1, dtype=self.ids.dtype)
                self.ids = torch.cat([before, self.ids], dim=1)

    def guarded(self, processors: Iterable[Any]) -> LogitsProcessorList:
        """The logits processors, behind the check that the pass was watched."""
        # Candidates of an assistant pass the processors before any pass of this model.
        guard = [] if self.assisted else [_Guard(self)]
        return LogitsProcessorList([*guard, *processors])

    def guarded_criteria(self, criteria: Iterable[Any]) -> StoppingCriteriaList:
        """The stopping criteria, behind the same check."""
        guard = [_StopGuard(self)] if self.assisted else []
        return _Ends(self, [*guard, *criteria])

    def next_pass(self, ids: Tensor) -> None:
        """The ids [B, T] of the rows up to the last that the next pass evaluates."""
        if self.requests is not None and self.beams and self.requests.tokens.reads_answers:
            self.requests.rearrange(ids.detach().cpu())

    def finish(self, result: Any) -> None:
        """What `generate` returned."""
        assert self.requests is not None
        sequences = result if isinstance(result, Tensor) else result.sequences
        skipped = self.requests.prompt - self.given
        self.requests.finish(skipped + sequences.shape[1], sequences, skipped)

    def check(self, tokens: int) -> None:
        """Raise HookLost unless every column before token number `tokens` was watched."""
        requests = self.requests
        columns = tokens if requests is None else requests.prompt - self.given + tokens
        if requests is None or requests.watched < columns or not requests.decided():
            raise HookLost(
                "a forward pass ran without the steering hooks; if the model was compiled "
                "before steer(), call torch.compiler.reset() and steer before compiling"
            )


class _Ends(StoppingCriteriaList):
    """Stopping criteria that tell which answers are complete: what follows is padding."""

    def __init__(self, call: Call, criteria: Iterable[Any]) -> None:
        super().__init__(criteria)
        self._call = call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        requests = self._call.requests
        if (
            requests is not None
            and requests.tokens.reads_answers
            and not self._call.beams
            and len(done) == requests.rows
        ):
            requests.ended |= done.cpu()
        return done


class _Guard(LogitsProcessor):
    """Stops generation when the pass that made these logits was not watched.

    It detects compiled code that was traced before `apply`, and hooks that were cleared: both run
    without hooks. The logits of column c come from a pass that covered c.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self._call.check(input_ids.shape[1])
        return scores


class _StopGuard(StoppingCriteria):
    """The same check after a token was chosen, for assisted decoding."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self._call.check(input_ids.shape[1] - 1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
