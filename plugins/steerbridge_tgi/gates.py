"""State of each request, and what one forward pass reads, decides and rewrites.

State is keyed by request id: batches are concatenated, filtered and reordered between passes. A
prompt may be evaluated in several passes; it is decided in the one that holds its last token,
before the head gets that row. In later passes the strengths come from a static buffer, one for
each rule and row, which the graph that TGI captured reads when it is replayed.

Shapes: N rows of a pass, D hidden size, E requests whose prompt ends in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerbridge import reference
from steerbridge.errors import HookLost, RowMappingLost
from steerbridge.package import SteeringPackage
from steerbridge.plan import Stop, plan
from steerbridge.runtime import Outcome
from steerbridge.spec import ImageMean, PromptEnd, Reading
from steerbridge_tgi.continued import Continued, Verdict, text_of
from steerbridge_tgi.rows import HEALTH, Part
from steerbridge_tgi.sites import Stream
from steerbridge_tgi.tokens import PromptRows
from steerbridge_torch import NEVER, Judged, Ledger, RowLogits, begins, kernels, strengths

Share = Callable[[Tensor], Tensor]  # rank 0's values, on every rank
Key = tuple[int, int]  # (probe, reading)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(slots=True)
class State:
    """One request. `strengths` holds the rules that fired, and those without a condition. `before`
    was decided of the request that it continues."""

    rows: int  # of its prompt seen so far, cached ones included
    strengths: dict[int, float]
    text: bytes
    before: Verdict | None
    read: dict[Key, Tensor] = field(default_factory=dict)  # a row [D], or a sum of rows
    images: Tensor | int = 0  # how many of its rows were an image's
    scores: PromptRows = field(default_factory=PromptRows)
    outcome: Outcome | None = None


@dataclass(slots=True)
class Pass:
    """A forward pass in progress. `rows` is N, `head_rows` those of them that reach the head;
    `images` [N] are the rows of images."""

    parts: tuple[Part, ...]
    rows: int
    head_rows: int
    images: Tensor | None
    ledger: Ledger
    totals: dict[int, Any] = field(default_factory=dict)  # of probes that read every row
    judged: dict[int, Judged] = field(default_factory=dict)  # [E]
    held: dict[int, Tensor] = field(default_factory=dict)  # [E]

    @property
    def ends(self) -> Tensor:
        """Rows [E] of the prompts' ends."""
        return torch.tensor([(part.prompt or 0) - 1 for part in self.ending])

    @property
    def prompts(self) -> bool:
        """True if it holds rows of a prompt."""
        return any(part.prompt is not None for part in self.parts)

    @property
    def ending(self) -> list[Part]:
        """The E parts that end their prompts."""
        return [part for part in self.parts if part.ends]


class Gates:
    """The requests of one shard.

    Args:
        package: with the thresholds of this runtime.
        device: where the model is.
        rows: of the largest pass that a captured graph may replay.
        share: gives every rank of a sharded model the scores of rank 0.
    """

    def __init__(
        self, package: SteeringPackage, device: torch.device, rows: int, share: Share
    ) -> None:
        self.plan = plan(package.spec)
        self._package, self._share = package, share
        self._weights = kernels.Weights(package)
        for name in package.tensors:
            self._weights(name, device)  # no copies are allowed during graph capture
        self._logits = {
            i: RowLogits(probe, self._weights)
            for i, probe in enumerate(package.spec.probes)
            if probe.token_reading is not None
        }
        self._static = torch.zeros(len(package.spec.rules), rows, device=device)
        self._steers = False  # some strength in the static buffer is not 0
        self._requests: dict[int, State] = {}
        self._continued = Continued()
        self._now: Pass | None = None
        self.idle = False
        """True while the server warms up: passes belong to no request."""

    # -------------------------------------------------------- passes

    def begin(
        self, parts: Sequence[Part], rows: int, head_rows: int, images: Tensor | None = None
    ) -> None:
        """A forward pass of `rows` rows starts, of which `head_rows` reach the output embedding.

        Raises:
            RowMappingLost: rows of a request without a verdict, or not the request's next rows.
        """
        stops = {stop.depth for stop in self.plan.stops} - {self.plan.logits_depth}
        ledger = Ledger(stops | {self.plan.head_depth})
        own = tuple(part for part in parts if part.request != HEALTH)
        now = Pass(own, rows, head_rows, images, ledger)
        for part in now.parts:
            self._enter(part)
            if images is not None and part.prompt is not None:
                count = images[part.first : part.first + part.count].sum()
                self._requests[part.request].images += count
        for rule in self.plan.unconditional:
            now.held[rule] = torch.ones(len(now.ending), dtype=torch.bool)
        self._fill(now)
        self._now = now

    def _enter(self, part: Part) -> None:
        state = self._requests.get(part.request)
        if part.prompt is None:
            if state is None or state.outcome is None:
                raise RowMappingLost(f"request {part.request}: an answer without a verdict")
            return
        if state is None or state.outcome is not None:
            text = text_of(part.source)
            before = self._continued.find(text, part.prompt)
            if part.position and before is None:
                self._check_cached(part)
            strengths = dict(before.strengths) if before else self._unconditional()
            state = State(part.position, strengths, text, before)
            self._requests[part.request] = state
        if state.rows != part.position:
            raise RowMappingLost(
                f"request {part.request}: expected row {state.rows} of its prompt, "
                f"found {part.position}"
            )
        state.rows += part.count

    def _unconditional(self) -> dict[int, float]:
        spec = self._package.spec
        return {rule: float(strengths(spec, rule, {}, 1)[0]) for rule in self.plan.unconditional}

    def _check_cached(self, part: Part) -> None:
        assert part.prompt is not None
        for probe in self._package.spec.probes:
            if probe.token_reading is not None:
                raise RowMappingLost(
                    f"request {part.request}: {probe.id} reads the rows of a cached prefix of "
                    f"{part.position} tokens"
                )
            for reading in probe.readings:
                position = reading.position
                end = position.offset if isinstance(position, PromptEnd) else -part.prompt
                if part.prompt - 1 + end < part.position:
                    raise RowMappingLost(
                        f"request {part.request}: {reading} lies in a cached prefix of "
                        f"{part.position} tokens"
                    )

    def _fill(self, now: Pass) -> None:
        """Fill the static buffer for a pass of answers only: a graph may be replayed with it."""
        steers = not now.prompts and any(self._strengths_of(p) for p in now.parts)
        if self._steers or steers:
            self._static.zero_()
        self._steers = steers
        if steers and now.rows <= self._static.shape[1]:
            values = torch.zeros(self._static.shape[0], now.rows)
            for part in now.parts:
                for rule, strength in self._strengths_of(part).items():
                    values[rule, part.first : part.first + part.count] = strength
            self._static[:, : now.rows] = values.to(self._static.device)

    def _strengths_of(self, part: Part) -> Mapping[int, float]:
        return self._requests[part.request].strengths

    def end(self, replayed: bool) -> list[tuple[int, Outcome]]:
        """End the pass and return the verdicts on its prompts, by request.

        Args:
            replayed: a captured graph may have run in place of the hooks.

        Raises:
            HookLost: the hooks did not run, so nothing may be sampled.
        """
        now, self._now = self._now, None
        assert now is not None
        if now.parts and not (replayed and now.ledger.untouched and not now.prompts):
            now.ledger.check()
        verdicts = []
        for e, part in enumerate(now.ending):
            state = self._requests[part.request]
            judged = self._outcome(now, e, state.rows - 1)
            state.outcome, state.read = state.before.outcome if state.before else judged, {}
            verdicts.append((part.request, state.outcome))
        return verdicts

    def _outcome(self, now: Pass, e: int, end: int) -> Outcome:
        spec = self._package.spec
        verdicts = (now.judged[i].verdict(p, e, end) for i, p in enumerate(spec.probes))
        held = (rule.id for i, rule in enumerate(spec.rules) if bool(now.held[i][e]))
        return Outcome(tuple(verdicts), tuple(held))

    def ended_for_length(self, request: int, answer: str, tokens: int) -> None:
        """The router may ask for the rest of an answer of so many tokens as a new request."""
        state = self._requests.get(request)
        if state is not None and state.outcome is not None:
            prompt = state.before.prompt if state.before else state.rows
            strengths = dict(state.strengths)
            verdict = Verdict(prompt, state.rows + tokens, state.outcome, strengths)
            self._continued.add(state.text + answer.encode("utf-8", "surrogatepass"), verdict)

    def drop(self) -> None:
        """Forget the pass in progress: it failed."""
        self._now = None

    def keep(self, requests: Collection[int]) -> None:
        """Forget every request but these."""
        for gone in self._requests.keys() - set(requests):
            del self._requests[gone]

    # -------------------------------------------------------- one site

    def visit(self, stop: Stop, stream: Stream) -> Arguments | None:
        """Read, score, decide and act at one site; new arguments if anything is rewritten.

        Raises:
            HookLost: rows that belong to no pass.
            RowMappingLost: the rows do not match those of the batch.
        """
        now = self._now
        if now is None:
            if not self.idle:
                raise HookLost("the model runs outside a pass that was announced")
            return self._act(stop, stream, None)
        now.ledger.report(stop.depth)
        if stop.depth == self.plan.head_depth and stream.count != now.head_rows:
            raise RowMappingLost(f"expected {now.head_rows} rows at the head, found {stream.count}")
        if now.ending or (now.prompts and (stop.readings or stop.rows)):
            self._decide(now, stop, stream)
        if stop.acts and any(self._strengths_of(p) for p in now.parts):
            return self._act(stop, stream, now)
        return None

    def _decide(self, now: Pass, stop: Stop, stream: Stream) -> None:
        if stop.readings:
            rows = stream.rows()
            at_head = stop.depth == self.plan.head_depth
            if not at_head and len(rows) != now.rows:
                raise RowMappingLost(f"expected {now.rows} rows in the pass, found {len(rows)}")
            for part in now.parts:
                if part.prompt is not None:
                    for key in stop.readings:
                        self._read(now, part, key, rows, at_head)
        if stop.rows and now.prompts:
            self._read_rows(now, stop, stream)
        if not now.ending:
            return
        spec = self._package.spec
        for probe in stop.probes:
            judge = self._judge_rows if probe in self._logits else self._judge
            now.judged[probe] = judge(now, probe)
        for rule in stop.rules:
            fired = {probe: judged.fired for probe, judged in now.judged.items()}
            now.held[rule] = held = begins(spec, rule, fired, now.ends) < NEVER
            scores = {probe: judged.scores for probe, judged in now.judged.items()}
            strength = strengths(spec, rule, scores, len(now.ending))
            for e, part in enumerate(now.ending):
                state = self._requests[part.request]
                if held[e] and state.before is None:
                    state.strengths[rule] = float(strength[e])

    def _read_rows(self, now: Pass, stop: Stop, stream: Stream) -> None:
        """Token readings: all rows of the pass at one site, then those of prompts one by one."""
        rows = stream.rows()
        if len(rows) != now.rows:
            raise RowMappingLost(f"expected {now.rows} rows in the pass, found {len(rows)}")
        for probe, site in stop.rows:
            more, sound = self._logits[probe].part(site, rows[None])
            total, before = now.totals.get(probe, (0, True))
            now.totals[probe] = total + more, before & sound
        for probe in stop.probes:
            if probe not in self._logits:
                continue
            total, sound = now.totals.pop(probe)
            logits, finite = self._logits[probe].logits(total)
            for part in now.parts:
                if part.prompt is not None:
                    state = self._requests[part.request]
                    state.scores.add(
                        probe,
                        self._package.spec.probes[probe],
                        part,
                        logits[0],
                        (sound & finite)[0],
                        now.images,
                    )

    def _judge_rows(self, now: Pass, index: int) -> Judged:
        """What a probe with a token reading says of the E prompts."""
        known = [self._requests[part.request].scores.known(index) for part in now.ending]
        shared = self._share(torch.tensor(known, dtype=torch.float64, device=self._static.device))
        scores, sound, fired = shared.cpu().unbind(dim=1)
        reasons = tuple("" if good else reference.NOT_FINITE for good in sound.tolist())
        return Judged(scores, fired.long(), reasons, fired.long())

    def _read(self, now: Pass, part: Part, key: Key, rows: Tensor, at_head: bool) -> None:
        assert part.prompt is not None
        position = self._reading(key).position
        state = self._requests[part.request]
        if isinstance(position, PromptEnd):
            at = part.prompt - 1 + position.offset - part.position
            if 0 <= at < part.count:
                row = part.head.start if at_head else part.first + at
                state.read[key] = rows[row].float()
            return
        own = rows[part.first : part.first + part.count].double()
        if isinstance(position, ImageMean):
            if now.images is None:
                return
            own = own * now.images[part.first : part.first + part.count, None]
        state.read[key] = state.read.get(key, 0) + own.sum(dim=0)

    def _reading(self, key: Key) -> Reading:
        reading: Reading = self._package.spec.probes[key[0]].readings[key[1]]
        return reading

    def _judge(self, now: Pass, index: int) -> Judged:
        """What a probe says of the E prompts; one that is shorter than a reading is unjudged."""
        probe = self._package.spec.probes[index]
        states = [self._requests[part.request] for part in now.ending]
        inputs, reasons = [], []
        for part, state in zip(now.ending, states, strict=True):
            parts = [
                self._value(state, part, index, at, reading)
                for at, reading in enumerate(probe.readings)
            ]
            inputs.append(torch.cat(parts))
            reasons.append(self._reason(probe, part))
        missing = torch.tensor([not int(state.images) for state in states])
        x_EI = torch.stack(inputs)
        scores, finite = kernels.judge(probe, self._weights, x_EI, missing.to(x_EI.device))
        shared = self._share(torch.stack([scores, finite.to(scores.dtype)]))
        return Judged.of(probe, shared[0], shared[1] > 0, now.ends, reasons)

    def _reason(self, probe: Any, part: Part) -> str:
        assert part.prompt is not None
        offsets = [r.position.offset for r in probe.readings if isinstance(r.position, PromptEnd)]
        return reference.TOO_SHORT if part.prompt - 1 + min(offsets, default=0) < 0 else ""

    def _value(self, state: State, part: Part, probe: int, at: int, reading: Reading) -> Tensor:
        assert part.prompt is not None
        read = state.read.get(self.plan.source[probe, at])
        if isinstance(reading.position, PromptEnd):
            return self._row(math.nan) if read is None else read
        if isinstance(reading.position, ImageMean):
            images = int(state.images)
            return self._row(0.0) if read is None or not images else (read / images).float()
        assert read is not None
        return (read / part.prompt).float()

    def _row(self, value: float) -> Tensor:
        width = self._package.spec.base_model.hidden_size
        return torch.full((width,), value, device=self._static.device)

    # -------------------------------------------------------- acts

    def said(self, logits: Tensor) -> Tensor:
        """The logits [H, V] of a pass, those of rows that `say` acts on forced."""
        now, spec = self._now, self._package.spec
        stops = [stop for stop in self.plan.stops if stop.depth == self.plan.logits_depth]
        if now is None or not stops:
            return logits
        rows, tokens = list[int](), list[int]()
        for part in now.parts:
            held = () if part.goes_on else self._strengths_of(part)
            acts = [spec.interventions[a.intervention] for a in stops[0].acts if a.rule in held]
            if not acts:
                continue
            state = self._requests[part.request]
            begin = (state.before.prompt if state.before else state.rows) - 1
            script = (*acts[0].header, *acts[0].tokens)  # type: ignore[union-attr]
            last = part.position + part.count
            for row, number in zip(part.head, range(last - len(part.head), last), strict=True):
                rows.append(row)
                tokens.append(script[min(max(0, number - begin), len(script) - 1)])
        if not rows:
            return logits
        at = torch.tensor(rows, device=logits.device)
        changed = logits.clone()
        changed[at] = reference.UNSAID
        changed[at, torch.tensor(tokens, device=logits.device)] = 0
        return changed

    def _act(self, stop: Stop, stream: Stream, now: Pass | None) -> Arguments | None:
        """Rewrite the rows of requests whose rule holds. Without a pass (graph capture), the
        strengths are read from the static buffer when the graph runs."""
        spec = self._package.spec
        rows = stream.rows()
        changed, touched = rows, torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for act in stop.acts:
            intervention = spec.interventions[act.intervention]
            strength = self._strengths(stop, act.rule, intervention, len(rows), now)
            if strength is None:
                continue
            new = kernels.apply(
                intervention, act.target, self._weights, changed[:, None], strength
            )[:, 0]
            chosen = strength != 0
            changed = torch.where(chosen[:, None], new, changed)
            touched = touched | chosen
        return None if changed is rows else stream.replaced(changed, touched)

    def _strengths(
        self, stop: Stop, rule: int, intervention: Any, rows: int, now: Pass | None
    ) -> Tensor | None:
        """One strength per row [N], 0 for rows that stay; None: all rows stay."""
        if now is None or not now.prompts:
            if rows <= self._static.shape[1]:
                return self._static[rule, :rows]
            if now is None:
                return None  # warm-up of a whole prompt
        values = torch.zeros(rows)
        for part, place in self._places(stop, intervention, now):
            strength = self._strengths_of(part).get(rule, 0.0)
            values[place.start : place.stop] = strength
        return values.to(self._static.device) if bool(values.any()) else None

    def _places(
        self, stop: Stop, intervention: Any, now: Pass | None
    ) -> Iterator[tuple[Part, range]]:
        """The rows that an intervention may rewrite at a site."""
        for part in now.parts if now else ():
            whole = range(part.first, part.first + part.count)
            if stop.depth == self.plan.head_depth:
                if not part.goes_on:
                    yield part, part.head
            elif part.prompt is None or intervention.position == "all_positions":
                yield part, whole
            elif before := self._requests[part.request].before:
                assert part.prompt is not None
                first = min(before.prompt, part.prompt) - 1  # it may have been truncated
                yield part, whole[max(0, first - part.position) :]
            elif part.ends:
                yield part, whole[-1:]
