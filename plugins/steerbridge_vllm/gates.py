"""State of each request, and what one pass of a batch reads, decides and rewrites.

State is keyed by request: batches are reordered between passes, and an answer that was preempted is
evaluated again. What is read of rows lies in `tables`, by their place in the KV cache; a prompt is
judged in the pass that holds its last row. Only that waits for the device, and a pass with a probe
that reads answers.

Shapes: N rows of a pass, L of them whose logits are sampled from, D hidden size, P rows of a
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerbridge import reference
from steerbridge.errors import HookLost, RowMappingLost
from steerbridge.package import SteeringPackage
from steerbridge.plan import Act, Stop, plan
from steerbridge.reference import Verdict
from steerbridge.runtime import Outcome
from steerbridge.spec import ImageMean, PromptEnd, Reading
from steerbridge_torch import Ledger, RowLogits, Weights, kernels
from steerbridge_vllm.followed import Followed
from steerbridge_vllm.rows import Part
from steerbridge_vllm.tables import Mean, Places, Tables

Share = Callable[[Tensor], Tensor]  # rank 0's values, on every rank
Images = Callable[[str, int], NDArray[np.bool_]]  # rows [P] of a request's prompt
Mine = Callable[[str], bool]  # whether a request has the package
Key = tuple[int, int]  # (probe, reading)


@dataclass(slots=True)
class State:
    """One request.

    Attributes:
        images: which rows [P] of its prompt are an image's.
        mine: it has the package; what is read of the rows of others serves whoever shares them.
        seen: the position up to which its rows were taken.
        pending: states of guesses, which count once they are accepted: from which position on.
        begins: the first row that a rule changes, by rule.
    """

    prompt: int
    images: NDArray[np.bool_]
    mine: bool
    seen: int = 0
    read: dict[Key, Tensor] = field(default_factory=dict)
    pending: dict[Mean, tuple[int, Tensor]] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    followed: dict[int, Followed] = field(default_factory=dict)
    begins: dict[int, int] = field(default_factory=dict)
    strengths: dict[int, float] = field(default_factory=dict)
    decided: bool = False
    told: Outcome | None = None


@dataclass
class Pass:
    """A pass in progress."""

    parts: Sequence[Part]
    states: Sequence[State]
    ledger: Ledger
    totals: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of row logits
    sampled: bool = False  # the logits were computed

    @cached_property
    def size(self) -> int:
        """N."""
        return sum(part.count for part in self.parts)

    @cached_property
    def ending(self) -> list[tuple[Part, State]]:
        """The requests whose prompts end in it."""
        each = zip(self.parts, self.states, strict=True)
        return [(p, s) for p, s in each if s.mine and not s.decided and p.stop >= p.prompt]

    @cached_property
    def steered(self) -> bool:
        """Whether a rule may change a row."""
        return bool(self.ending) or any(state.begins for state in self.states)


class Gates:
    """The requests of one worker.

    Args:
        package: with the thresholds of this runtime.
        device: where the model is.
        share: gives every rank of a sharded model the values of rank 0.
        images: rows of a request's images.
        cached: whether prompts may begin with what other requests have computed.
        mine: which requests have this package.
    """

    def __init__(
        self,
        package: SteeringPackage,
        device: torch.device,
        share: Share,
        images: Images,
        *,
        cached: bool,
        mine: Mine,
    ) -> None:
        spec = package.spec
        self.plan = plan(spec)
        self._package, self._device = package, device
        self._share, self._images, self._cached, self._mine = share, images, cached, mine
        self._weights = Weights(package, device)
        self._logits = {
            i: RowLogits(probe, self._weights)
            for i, probe in enumerate(spec.probes)
            if probe.token_reading is not None
        }
        reads = {i: spec.probes[i].token_reading for i in self._logits}
        self._following = [i for i, r in reads.items() if r is not None and r.scope != "prompt"]
        self._stops = {stop.depth: stop for stop in self.plan.stops}
        self._means = {
            key: Mean(stop.depth, isinstance(self._reading(key).position, ImageMean))
            for stop in self.plan.stops
            for key in stop.readings
            if not isinstance(self._reading(key).position, PromptEnd)
        }
        self.tables: Tables | None = None
        self._requests: dict[str, State] = {}
        self._now: Pass | None = None

    @property
    def depths(self) -> list[int]:
        """Of the sites before the head that must be visited."""
        return sorted(depth for depth in self._stops if depth < self.plan.head_depth)

    @property
    def keeps_rows(self) -> bool:
        """Whether something is kept of every row."""
        return bool(self._logits or self._means)

    def allocate(self, blocks: int, size: int) -> None:
        """Make room for what is kept of every row of a KV cache."""
        width = self._package.spec.base_model.hidden_size
        means = set(self._means.values())
        self.tables = Tables(blocks, size, width, self._logits, means, self._device)

    def _reading(self, key: Key) -> Reading:
        reading: Reading = self._package.spec.probes[key[0]].readings[key[1]]
        return reading

    # -------------------------------------------------------- a pass

    @property
    def samples(self) -> bool:
        """Whether the next logits are those that the pass in progress is sampled from."""
        return self._now is not None and not self._now.sampled

    def begin(self, parts: Sequence[Part]) -> None:
        """A pass over these rows starts.

        Raises:
            RowMappingLost: rows of an answer without a verdict, or that do not go on from the
                request's others.
        """
        states = [self._entered(part) for part in parts]
        self._now = Pass(parts, states, Ledger([*self.depths, self.plan.head_depth]))

    def _entered(self, part: Part) -> State:
        state = self._requests.get(part.request)
        if state is None:
            mine = self._mine(part.request)
            state = State(part.prompt, self._images(part.request, part.prompt), mine)
            if mine:
                state.begins = dict.fromkeys(self.plan.unconditional, part.prompt - 1)
            self._strengthen(state)
            self._requests[part.request] = state
        size = self.tables.size if self.tables else 1
        if part.prompt != state.prompt:
            raise RowMappingLost(f"request {part.request}: its prompt changed its length")
        if part.position > state.seen and part.position % size:
            raise RowMappingLost(
                f"request {part.request}: expected row {state.seen} of its sequence, "
                f"found {part.position}"
            )
        if state.mine and not state.decided and part.position >= part.prompt:
            raise RowMappingLost(f"request {part.request}: an answer without a verdict")
        state.seen = part.stop
        return state

    def visit(self, depth: int, hidden: Tensor, residual: Tensor | None) -> None:
        """See `ops.Visitor`. Rows behind those of the pass are padding.

        Raises:
            HookLost: rows that belong to no pass.
        """
        now = self._now
        if now is None:
            raise HookLost("the model runs outside a pass that was announced")
        now.ledger.report(depth)
        stop = self._stops[depth]
        hidden = hidden[: now.size]
        residual = None if residual is None else residual[: now.size]
        if len(hidden) != now.size:
            raise RowMappingLost(f"expected {now.size} rows in the pass, found {len(hidden)}")
        if stop.readings or stop.rows:
            self._read(now, stop, hidden if residual is None else hidden + residual)
        self._decide(now, stop)
        if stop.acts and now.steered:
            self._act(now, stop, hidden, residual)

    def finish(self, hidden: Tensor) -> None:
        """The model returned the states [N, D] that the head gets: read and decide the rest.

        Raises:
            HookLost: a site was not visited, so nothing may be sampled.
        """
        now = self._now
        assert now is not None
        head = self.plan.head_depth
        now.ledger.report(head)
        now.ledger.check()
        for depth in (head, self.plan.logits_depth):
            if (stop := self._stops.get(depth)) is not None:
                if stop.readings:
                    self._read(now, stop, hidden[: now.size])
                self._decide(now, stop)
        for part, state in now.ending:
            missing = set(range(len(self._package.spec.probes))) - state.verdicts.keys()
            if missing:
                raise HookLost(f"request {part.request}: probes {sorted(missing)} did not judge")
            state.decided = True

    def end(self, accepted: Mapping[str, int]) -> dict[str, Outcome]:
        """The pass was sampled from: outcomes that are new or changed, by request.

        Args:
            accepted: guesses that were taken, by request.
        """
        now, self._now = self._now, None
        assert now is not None
        if not now.sampled:
            raise HookLost("tokens were sampled from logits that were not seen")
        told = {}
        for part, state in zip(now.parts, now.states, strict=True):
            if not state.decided or (state.told is not None and not state.followed):
                continue
            if state.followed:
                kept = part.certain + accepted.get(part.request, 0)
                state.seen = min(state.seen, kept)
                for probe, followed in state.followed.items():
                    followed.cut(kept)
                    state.verdicts[probe] = followed.verdict()
                self._begin(state)
            outcome = self._outcome(state)
            if outcome != state.told:
                state.told = told[part.request] = outcome
        return told

    def drop(self) -> None:
        """Forget the pass in progress: it failed, or nothing is sampled from it."""
        self._now = None

    def forget(self, requests: Iterable[str]) -> None:
        """These requests ended."""
        for request in requests:
            self._requests.pop(request, None)

    @property
    def live(self) -> int:
        """How many requests are known."""
        return len(self._requests)

    # -------------------------------------------------------- reading

    def _read(self, now: Pass, stop: Stop, rows: Tensor) -> None:
        for key in stop.readings:
            if key in self._means:
                continue
            offset = self._reading(key).position.offset  # type: ignore[union-attr]
            for part, state in zip(now.parts, now.states, strict=True):
                at = part.prompt - 1 + offset - part.position
                if not state.decided and 0 <= at < part.count:
                    state.read[key] = rows[part.first + at].float()
        for mean in {self._means[key] for key in stop.readings if key in self._means}:
            self._sum(now, mean, rows)
        for probe, site in stop.rows:
            part_, sound = self._logits[probe].part(site, rows[None])
            if probe in now.totals:
                total, before = now.totals[probe]
                part_, sound = total + part_, before & sound
            now.totals[probe] = part_, sound
        for probe in stop.probes:
            if probe in self._logits:
                total, sound = now.totals.pop(probe)
                logits, finite = self._logits[probe].logits(total)
                self._keep(now, probe, logits[0], (sound & finite)[0])

    def _wanted(self, part: Part, stop: int) -> range:
        """Positions of a part's rows that must be kept, up to one of them."""
        until = stop if self._cached or self._following else min(stop, part.prompt)
        return range(part.position, max(part.position, until))

    def _keep(self, now: Pass, probe: int, logits_N: Tensor, sound_N: Tensor) -> None:
        """Keep the logits of rows, and follow the answers of those that are decided."""
        tables = self.tables
        assert tables is not None
        rows, slots = [], []
        for part in now.parts:
            wanted = self._wanted(part, part.stop)
            rows.append(np.arange(part.first, part.first + len(wanted)))
            slots.append(tables.slots(part.blocks, wanted.start, wanted.stop))
        at = tables.tensor(np.concatenate(rows))
        where = tables.tensor(np.concatenate(slots))
        tables.write(probe, where, logits_N[at], sound_N[at])
        if probe not in self._following or not any(s.followed for s in now.states):
            return
        told = self._share(torch.where(sound_N, logits_N, math.nan)).cpu().numpy()
        for part, state in zip(now.parts, now.states, strict=True):
            if probe in state.followed:
                new = told[part.first : part.first + part.count]
                counted = self._counted(probe, state, part.position, part.stop)
                state.followed[probe].add(part.position, new, np.isfinite(new), counted)
                state.verdicts[probe] = state.followed[probe].verdict()

    def _counted(self, probe: int, state: State, start: int, stop: int) -> NDArray[np.bool_]:
        """Which rows of a sequence are of the kind that a probe reads."""
        reading = self._package.spec.probes[probe].token_reading
        assert reading is not None
        images = np.zeros(stop, np.bool_)
        images[: min(stop, state.prompt)] = state.images[:stop]
        return reference.counted(reading, stop, images)[start:]

    def _sum(self, now: Pass, mean: Mean, rows_ND: Tensor) -> None:
        """Sum states into their blocks: those of rows that are certain, and of guesses of an
        earlier pass that were accepted."""
        tables = self.tables
        assert tables is not None
        index, blocks, fresh, before = [], [], [], []
        for part, state in zip(now.parts, now.states, strict=True):
            earlier, states = state.pending.pop(mean, (part.position, rows_ND[:0]))
            if earlier > part.position:  # it was preempted, and goes on from further back
                earlier, states = part.position, rows_ND[:0]
            at = np.arange(earlier, self._wanted(part, part.certain).stop)
            at = at[(at >= part.position) | (at < earlier + len(states))]
            if mean.images:
                inside = np.zeros(len(at), np.bool_)
                known = at < state.prompt
                inside[known] = state.images[at[known]]
            else:
                inside = np.ones(len(at), np.bool_)
            blocks.append(part.blocks[at // tables.size].astype(np.int64))
            fresh.append(blocks[-1][at % tables.size == 0])
            blocks[-1] = blocks[-1][inside]
            accepted = int((at < part.position).sum())
            before.append(states[:accepted][torch.from_numpy(inside[:accepted])])
            index.append(part.first + at[inside & (at >= part.position)] - part.position)
            if part.drafts and self._cached:
                first = part.first + part.count - part.drafts
                state.pending[mean] = part.certain, rows_ND[first : first + part.drafts].clone()
        # In the order of `blocks`: accepted guesses of a request, then its rows of this pass.
        parts = [
            torch.cat([old, rows_ND[tables.tensor(new)]])
            for old, new in zip(before, index, strict=True)
        ]
        places = Places(tables.tensor(np.concatenate(blocks)), tables.tensor(np.concatenate(fresh)))
        tables.add(mean, places, torch.cat(parts))

    # -------------------------------------------------------- deciding

    def _decide(self, now: Pass, stop: Stop) -> None:
        """Judge the prompts that end in the pass by probes whose last site this was."""
        if now.ending:
            for probe in stop.probes:
                judge = self._judge_rows if probe in self._logits else self._judge
                judge(probe, now.ending)
        followed = [s for s in now.states if s.followed] if stop.rules else []
        if stop.rules:
            for state in [*(s for _, s in now.ending), *followed]:
                self._begin(state, stop.rules)

    def _judge(self, index: int, ending: Sequence[tuple[Part, State]]) -> None:
        """What a probe with pooled readings says of prompts."""
        probe = self._package.spec.probes[index]
        short = [
            min(part.prompt - 1 + _offset(reading) for reading in probe.readings) < 0
            for part, _ in ending
        ]
        inputs = [
            torch.cat([self._value(index, k, part, state) for k in range(len(probe.readings))])
            for part, state in ending
        ]
        missing = torch.tensor([not state.images.any() for _, state in ending])
        x_EI = torch.stack(inputs)
        scores, finite = kernels.judge(probe, self._weights, x_EI, missing.to(x_EI.device))
        told = self._share(torch.stack([scores.float(), finite.float()])).cpu()
        for e, (_, state) in enumerate(ending):
            if short[e] or not told[1, e]:
                reason = reference.TOO_SHORT if short[e] else reference.NOT_FINITE
                state.verdicts[index] = reference.unjudged(probe, reason)
            else:
                state.verdicts[index] = reference.verdict(probe, float(told[0, e]))

    def _value(self, probe: int, reading: int, part: Part, state: State) -> Tensor:
        """A reading [D] of a prompt; not a number where the prompt is too short for it."""
        key = self.plan.source[probe, reading]
        if key not in self._means:
            if key in state.read:
                return state.read[key]
            if part.prompt - 1 + _offset(self._reading(key)) >= 0:
                raise RowMappingLost(
                    f"request {part.request}: {self._reading(key)} lies in a cached prefix"
                )
            width = self._package.spec.base_model.hidden_size
            return torch.full((width,), math.nan, device=self._device)
        tables, mean = self.tables, self._means[key]
        assert tables is not None
        count = int(state.images.sum()) if mean.images else part.prompt
        blocks = part.blocks[: -(-part.prompt // tables.size)]
        return (tables.total(mean, blocks) / max(1, count)).float()

    def _judge_rows(self, index: int, ending: Sequence[tuple[Part, State]]) -> None:
        """What a probe with a token reading says of prompts."""
        tables, probe = self.tables, self._package.spec.probes[index]
        assert tables is not None
        slots = [tables.slots(part.blocks, 0, part.prompt) for part, _ in ending]
        told = self._share(tables.logits(index, np.concatenate(slots))).cpu().numpy()
        stops = np.cumsum([len(s) for s in slots])
        for (part, state), stop in zip(ending, stops.tolist(), strict=True):
            logits = told[stop - part.prompt : stop]
            counted = self._counted(index, state, 0, part.prompt)
            sound = np.isfinite(logits)
            if index in self._following:
                state.followed[index] = Followed(probe, logits, sound, counted)
                state.verdicts[index] = state.followed[index].verdict()
            else:
                end = part.prompt - 1
                state.verdicts[index] = reference.judge_rows(probe, logits, sound, counted, end)

    def _begin(self, state: State, rules: Iterable[int] | None = None) -> None:
        """Where rules begin, by what their probes say now."""
        spec = self._package.spec
        named = {spec.probes[i].id: verdict for i, verdict in state.verdicts.items()}
        for index in range(len(spec.rules)) if rules is None else rules:
            if index in self.plan.unconditional:
                continue
            row = reference.begins(spec.rules[index], named, state.prompt - 1)
            if row is None:
                state.begins.pop(index, None)
            elif state.begins.get(index) != row:
                state.begins[index] = row
                state.strengths[index] = reference.strength(spec.rules[index], named)

    def _strengthen(self, state: State) -> None:
        """Strengths of rules without a condition."""
        for index in state.begins:
            state.strengths[index] = reference.strength(self._package.spec.rules[index], {})

    def _outcome(self, state: State) -> Outcome:
        spec = self._package.spec
        verdicts = tuple(state.verdicts[i] for i in range(len(spec.probes)))
        return Outcome(verdicts, tuple(r.id for i, r in enumerate(spec.rules) if i in state.begins))

    # -------------------------------------------------------- acting

    def _act(self, now: Pass, stop: Stop, hidden: Tensor, residual: Tensor | None) -> None:
        """Rewrite rows in place; the others stay as they are, in both parts of the stream."""
        rows = hidden if residual is None else hidden + residual
        changed, touched = rows, np.zeros(now.size, np.bool_)
        for act in stop.acts:
            values = np.zeros(now.size, np.float32)
            for part, state in zip(now.parts, now.states, strict=True):
                first = self._first(act, state, part)
                values[part.first + first : part.first + part.count] = (
                    state.strengths[act.rule] if first < part.count else 0
                )
            if values.any():
                changed = self._applied(act, changed, values)
                touched |= values != 0
        if not touched.any():
            return
        chosen = torch.from_numpy(touched).to(rows.device)[:, None]
        hidden.copy_(torch.where(chosen, changed, hidden))
        if residual is not None:
            residual.masked_fill_(chosen, 0)

    def _first(self, act: Act, state: State, part: Part) -> int:
        """How many rows of a part come before the first that an act changes."""
        if act.rule not in state.begins:
            return part.count
        everywhere = self._package.spec.interventions[act.intervention].position == "all_positions"
        begin = 0 if everywhere else state.begins[act.rule]
        return min(max(0, begin - part.position), part.count)

    def _applied(self, act: Act, rows: Tensor, values: NDArray[np.float32]) -> Tensor:
        intervention = self._package.spec.interventions[act.intervention]
        strength = torch.from_numpy(values).to(rows.device)
        new = kernels.apply(intervention, act.target, self._weights, rows[:, None], strength)
        return torch.where(strength[:, None] != 0, new[:, 0], rows)

    def _sampled_rows(self, now: Pass) -> Iterator[tuple[State, int]]:
        """The request and the position of each of the L rows."""
        for part, state in zip(now.parts, now.states, strict=True):
            for row in range(part.stop - part.drafts - 1, part.stop):
                yield state, row

    def at_head(self, rows_LD: Tensor) -> Tensor:
        """The states that the head gets, those of requests that a head matrix steers rewritten.

        Raises:
            RowMappingLost: they are not as many as the batch samples from.
        """
        now = self._now
        if now is None or now.sampled:
            return rows_LD
        now.sampled = True
        size = sum(1 + part.drafts for part in now.parts)
        if len(rows_LD) != size:
            raise RowMappingLost(f"expected {size} rows at the head, found {len(rows_LD)}")
        stop = self._stops.get(self.plan.head_depth)
        if stop is None or not now.steered:
            return rows_LD
        changed = rows_LD
        for act in stop.acts:
            values = np.array(
                [
                    state.strengths[act.rule] if row >= state.begins.get(act.rule, math.inf) else 0
                    for state, row in self._sampled_rows(now)
                ],
                np.float32,
            )
            if values.any():
                changed = self._applied(act, changed, values)
        return changed

    def said(self) -> dict[int, int]:
        """Tokens that must be said, by row of the L."""
        now = self._now
        stop = self._stops.get(self.plan.logits_depth)
        if now is None or stop is None or not now.steered:
            return {}
        found = {}
        for index, (state, row) in enumerate(self._sampled_rows(now)):
            for act in stop.acts:
                begin = state.begins.get(act.rule, math.inf)
                if row >= begin:
                    say: Any = self._package.spec.interventions[act.intervention]
                    script = say.tokens if begin >= state.prompt else (*say.header, *say.tokens)
                    found[index] = script[min(row - int(begin), len(script) - 1)]
                    break
        return found


def _offset(reading: Reading) -> int:
    """How far behind the prompt's last row a reading lies; 0 for a mean."""
    return reading.position.offset if isinstance(reading.position, PromptEnd) else 0
