"""Model runners of vLLM, whose passes are announced to the gates: which rows a pass holds, and what
is sampled from it. Methods of one runner and of its model are replaced, of no class.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from steerbridge import reference
from steerbridge.errors import UnsupportedFeature
from steerbridge.runtime import Outcome
from steerbridge_vllm import given, ops, rows, transport
from steerbridge_vllm.several import Several
from steerbridge_vllm.sites import RUNTIME


class Told(Protocol):
    """Where verdicts are written."""

    def verdict(self, request: str, outcome: Outcome) -> None:
        """A request was decided, or its verdict changed."""
        ...


class Announced:
    """What both generations have in common.

    Args:
        told: where verdicts are written; None: another rank writes them.
    """

    wrapped: ClassVar[tuple[str, ...]] = ("initialize_kv_cache", "execute_model", "sample_tokens")

    def __init__(self, gates: Several, runner: Any, told: Told | None) -> None:
        self._gates, self._runner, self._told = gates, runner, told
        self._group = 0
        self._said: dict[int, int] = {}  # tokens that must be said, by row that is sampled from
        self._real: dict[str, Any] = {name: getattr(runner, name) for name in self.wrapped}
        self._real_compute_logits = runner.get_model().compute_logits

    def install(self) -> None:
        """Put the wrappers in place."""
        for name in self.wrapped:
            setattr(self._runner, name, getattr(self, "_" + name.lstrip("_")))
        self._runner.get_model().compute_logits = self._compute_logits
        if (caches := getattr(self._runner, "kv_cache_config", None)) is not None:
            self._allocate(caches)

    def remove(self) -> None:
        """Take the wrappers away."""
        for name in self.wrapped:
            delattr(self._runner, name)
        del self._runner.get_model().compute_logits

    def _block_size(self, groups: Sequence[Any]) -> int:
        """Rows of a block, as the numbers of a part's blocks count them."""
        size: int = groups[self._group].kv_cache_spec.block_size
        return size

    def _accepted(self, output: Any) -> Mapping[str, int]:
        """Guesses that were taken, by request."""
        raise NotImplementedError

    def _initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._real["initialize_kv_cache"](kv_cache_config, *args, **kwargs)
        self._allocate(kv_cache_config)
        return result

    def _allocate(self, caches: Any) -> None:
        """Make room for what is kept of every row in the KV caches."""
        if not self._gates.keeps_rows:
            return
        groups = caches.kv_cache_groups
        self._group = _full_attention(groups)
        size = self._block_size(groups)
        rows_ = caches.num_blocks * groups[self._group].kv_cache_spec.block_size
        self._gates.allocate(rows_ // size, size)

    def _compute_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        sampled = self._gates.samples
        logits = self._real_compute_logits(self._gates.at_head(hidden), *args, **kwargs)
        if sampled:
            self._said = self._gates.said()
        if sampled and self._said and logits is not None:
            at = torch.tensor(list(self._said), device=logits.device)
            words = torch.tensor(list(self._said.values()), device=logits.device)
            logits[at] = reference.UNSAID
            logits[at, words] = 0
        return logits

    def _execute_model(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        with self._pass(scheduled):
            return self._real["execute_model"](scheduled, *args, **kwargs)

    @contextmanager
    def _pass(self, scheduled: Any) -> Iterator[None]:
        """A pass that is forgotten if it fails."""
        self._gates.forget(scheduled.finished_req_ids)
        for new in scheduled.scheduled_new_reqs:
            self._gates.choose(new.req_id, given.name_in(new.sampling_params))
        try:
            yield
        except BaseException:
            self._gates.drop()
            raise

    def _sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        sampled = self._runner.execute_model_state is not None
        output = self._real["sample_tokens"](*args, **kwargs)
        if not sampled:
            return output
        told = self._gates.end(self._accepted(output) if self._runner.speculative_config else {})
        if self._told is not None:
            for request, outcome in told.items():
                self._told.verdict(request, outcome)
        content = {
            request: {**outcome.to_json(), "package": self._gates.name_of(request)}
            for request, outcome in told.items()
        }
        return transport.attached(output, content)


class First(Announced):
    """The first generation."""

    wrapped = (*Announced.wrapped, "_prepare_inputs", "_model_forward", "_sample")

    def _block_size(self, groups: Sequence[Any]) -> int:  # noqa: ARG002 - those of the tables
        size: int = self._runner.input_batch.block_table.block_tables[self._group].block_size
        return size

    def _prepare_inputs(self, scheduled: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._real["_prepare_inputs"](scheduled, counts, *args, **kwargs)
        self._gates.begin(rows.of_first(self._runner, scheduled, counts, self._group))
        return result

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        with ops.visiting(self._gates):
            result = self._real["_model_forward"](*args, **kwargs)
        self._gates.finish(result[0] if isinstance(result, tuple) else result)
        return result

    def _sample(self, logits: Tensor, guesses: Any, *args: Any, **kwargs: Any) -> Any:
        output = self._real["_sample"](logits, guesses, *args, **kwargs)
        if not self._said:
            return output
        sampled = output.sampled_token_ids
        if guesses is None:
            _say(sampled, self._said)
            return output
        drafts = guesses.draft_token_ids.split(list(guesses.num_draft_tokens))
        for request, line in _lines(sampled.tolist(), [d.tolist() for d in drafts], self._said):
            line += [transport.NOTHING] * (sampled.shape[1] - len(line))
            sampled[request] = torch.tensor(line, dtype=sampled.dtype, device=sampled.device)
        return output

    def _accepted(self, output: Any) -> Mapping[str, int]:
        tokens = output.sampled_token_ids
        return {r: max(0, len(tokens[i]) - 1) for r, i in output.req_id_to_index.items()}


class Second(Announced):
    """The second generation: tokens and counts stay on the device, and blocks are numbered by the
    scheduler's word alone."""

    wrapped = (*Announced.wrapped, "prepare_inputs", "sample")

    def __init__(self, gates: Several, runner: Any, told: Told | None) -> None:
        super().__init__(gates, runner, told)
        if runner.batch_sharder is not None:
            raise UnsupportedFeature(RUNTIME, "sampling that is divided over the ranks")
        if runner.model_state.num_new_sampled_tokens_per_step != 1:
            raise UnsupportedFeature(RUNTIME, "a model that samples several tokens at once")
        self._blocks = rows.Blocks()
        self._taken: list[int] = []

    def _initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self._runner.adaptive_verification is not None:
            raise UnsupportedFeature(RUNTIME, "guesses whose number is chosen on the device")
        return result

    def _execute_model(
        self,
        scheduled: Any,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        real = self._real["execute_model"]
        if dummy_run:  # a trial, or another rank's turn
            return real(scheduled, intermediate_tensors, dummy_run, *args, **kwargs)
        self._blocks.take(scheduled)
        with self._pass(scheduled):
            with ops.visiting(self._gates):
                result = real(scheduled, intermediate_tensors, dummy_run, *args, **kwargs)
            if (state := self._runner.execute_model_state) is not None:
                self._gates.finish(state.hidden_states)
        return result

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._real["prepare_inputs"](*args, **kwargs)
        lengths = self._runner.req_states.prompt_len.np
        self._gates.begin(rows.of_second(batch, lengths, self._blocks, self._group))
        return batch

    def _sample(self, hidden: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Any:
        output, counts, rejected = self._real["sample"](hidden, batch, *args, **kwargs)
        sampled, guesses = output.sampled_token_ids, batch.num_draft_tokens_per_req
        if self._said and not batch.num_draft_tokens:
            _say(sampled, self._said)
        elif self._said:
            given = batch.input_ids[batch.logits_indices].tolist()
            ends = batch.cu_num_logits_np.tolist()
            drafts = [given[a + 1 : b] for a, b in itertools.pairwise(ends)]
            kept = [row[:n] for row, n in zip(sampled.tolist(), counts.tolist(), strict=True)]
            for request, line in _lines(kept, drafts, self._said):
                if kept[request]:  # else a part of a prompt, from which nothing is sampled
                    sampled[request, : len(line)] = torch.tensor(line).to(sampled)
                    counts[request] = len(line)
                    rejected[request] = int(guesses[request]) + 1 - len(line)
        if self._runner.speculative_config is not None:
            self._taken = counts.tolist()
        return output, counts, rejected

    def _accepted(self, output: Any) -> Mapping[str, int]:
        requests = output.model_runner_output.req_ids
        return {r: max(0, n - 1) for r, n in zip(requests, self._taken, strict=True)}


def _full_attention(groups: Sequence[Any]) -> int:
    """The group of KV caches that holds every row of a sequence.

    Raises:
        UnsupportedFeature: there is none.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    for index, group in enumerate(groups):
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            return index
    raise UnsupportedFeature(RUNTIME, "a model without full attention: no cache has every row")


def _say(sampled: Tensor, said: Mapping[int, int]) -> None:
    """Write the tokens that must be said over those that were sampled [B, 1]."""
    at = torch.tensor(list(said), device=sampled.device)
    sampled[at, 0] = torch.tensor(list(said.values()), device=sampled.device).to(sampled.dtype)


def _lines(
    sampled: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]], said: Mapping[int, int]
) -> Iterator[tuple[int, list[int]]]:
    """The answers of requests in which tokens must be said, up to the first guess that is another
    token."""
    row = 0
    for request, (tokens, guessed) in enumerate(zip(sampled, drafts, strict=True)):
        wanted = [said.get(row + k) for k in range(len(guessed) + 1)]
        row += len(wanted)
        if all(word is None for word in wanted):
            continue
        line: list[int] = []
        for k, word in enumerate(wanted):
            found = tokens[k] if k < len(tokens) else transport.NOTHING
            line.append(found if word is None else word)
            if line[-1] == transport.NOTHING:
                line.pop()
                break
            if k < len(guessed) and line[-1] != guessed[k]:
                break
        yield request, line
