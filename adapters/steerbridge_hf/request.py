"""State of the requests in one batch: prompt ends, readings, verdicts, strengths.

Columns count tokens of the padded batch from the left, cached ones included, so a forward pass
covers columns start..start+Q-1 whatever the cache holds. The ledger's second half is here: the
columns of passes go on from one another, and those of the prompt are its tokens, each once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerbridge import reference
from steerbridge.errors import RowMappingLost, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.plan import Plan, Stop, rule_probes
from steerbridge.runtime import Outcome
from steerbridge.spec import ImageMean, Position, PromptEnd, PromptMean, Reading
from steerbridge_hf.rows import NO_IMAGE_ROWS, Layout, TokenRows
from steerbridge_hf.said import Speech
from steerbridge_hf.sites import RUNTIME
from steerbridge_torch import NEVER, Judged, RowLogits, Weights, begins, kernels, strengths


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: which columns it covers, and which of them reach the head.

    Args:
        ids: token ids [B, Q] on the CPU; None if it was given embeddings.
        columns: [Q] all columns of this pass, on the CPU.
        head: those that the output embedding sees.
        cached: whether it goes on from a cache.
        live: [B, Q] rows that are somebody's, as far as a mask says; None: all.
    """

    start: int
    width: int
    ids: Tensor | None
    columns: Tensor
    head: Tensor
    cached: bool
    live: Tensor | None = None

    @property
    def stop(self) -> int:
        return self.start + self.width


class Rows(NamedTuple):
    """Where the states [B, Q, D] of a site hold the rows that a reading takes as they are."""

    rows: Tensor  # indices into B and Q
    columns: Tensor


class Column(NamedTuple):
    """The same where all prompts end at one column, as `generate` wants it: a slice, no index."""

    at: int  # index into Q


class Mean(NamedTuple):
    """Where the states [B, Q, D] of a site hold the rows that a reading averages."""

    width: int  # Q without what is behind the prompt
    padding: Tensor | None  # [B, width, 1] what is not averaged; None if nothing
    counts: Tensor | int  # [B, 1] rows of the whole mean; one number if they are equal


@dataclass(slots=True)
class Requests:
    """State of the B rows of one batch, from their first forward pass to their last.

    Args:
        mask: [B, P] bool, on the CPU: tokens of the prompt.
        ids: [B, P] of the prompt, on the CPU; None if it was given as embeddings.
        given: columns of the prompt that were in a cache before it began; None: as many as the
            cache of the first pass holds.
        copies: rows for each prompt (beams, several samples).
        media: ids of tokens that stand for rows of an image.
        drafts: whether tokens behind the prompt may be evaluated together with it, and be taken
            back.
        beams: whether rows change places.
        logits: of probes with token readings, by index.
    """

    package: SteeringPackage
    plan: Plan
    weights: Weights
    mask: Tensor
    ids: Tensor | None
    given: int | None = None
    copies: int = 1
    media: tuple[int, ...] = ()
    drafts: bool = False
    beams: bool = False
    logits: Mapping[int, RowLogits] = field(default_factory=dict)
    watched: int = 0  # columns up to here passed through every hook
    read: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # [B, D]
    short: dict[int, Tensor] = field(default_factory=dict)  # probe -> rows that are too short
    judged: dict[int, Judged] = field(default_factory=dict)
    strengths: dict[int, Tensor] = field(default_factory=dict)  # [B]; 0 where it did not fire
    begins: dict[int, Tensor] = field(default_factory=dict)  # [B] columns
    active: dict[int, Tensor] = field(default_factory=dict)  # rows with a rule that holds
    following: frozenset[int] = frozenset()  # rules that rows of answers may change
    ended: Tensor = field(init=False)  # [B] bool: answers that are complete
    survived: int = 0  # columns up to here are not taken back
    tokens: TokenRows = field(init=False)
    speech: Speech = field(init=False)
    layout: Layout = field(init=False)
    ends: Tensor = field(init=False)  # [B] column of each prompt's last token
    padded: bool = field(init=False)
    first_end: int = field(init=False)
    last_end: int = field(init=False)
    begun: bool = False
    _paths: Tensor | None = None  # [B, T] ids so far, of beams
    _of_paths: dict[tuple[int, ...], Outcome] = field(default_factory=dict)
    _told: tuple[Outcome, ...] | None = None
    _found: dict[tuple[Any, ...], Rows | Column | Mean] = field(
        default_factory=dict
    )  # of this pass

    def __post_init__(self) -> None:
        if not bool(self.mask.any(dim=1).all()):
            raise RowMappingLost("a row of the batch holds padding only: it has no prompt end")
        self.ended = torch.zeros(self.rows, dtype=torch.bool)
        self.tokens = TokenRows(self.package.spec, self.logits)
        self.speech = Speech(self.package.spec, self.plan)
        if self.tokens.reads_answers:
            rules = range(len(self.package.spec.rules))
            read = {rule: set(rule_probes(self.package.spec, rule)) for rule in rules}
            self.following = frozenset(rule for rule in rules if read[rule] & self.logits.keys())
        self._find_ends()
        for rule in self.plan.unconditional:
            self._decide(rule)

    def _find_ends(self) -> None:
        last = self.mask.shape[1] - 1
        self.padded = not bool(self.mask.all())
        if self.padded:
            self.ends = last - self.mask.flip(1).int().argmax(dim=1)
        else:
            self.ends = torch.full((self.rows,), last)
        ends = self.ends.tolist()
        self.first_end, self.last_end = min(ends), max(ends)
        for rule in self.begins:  # those without a condition
            self._decide(rule)

    @property
    def rows(self) -> int:
        """B."""
        return len(self.mask)

    @property
    def prompt(self) -> int:
        """Number of columns of the prompt."""
        return self.mask.shape[1]

    # -------------------------------------------------------- passes

    def begin(self, step: Step) -> None:
        """A pass begins: its columns must be the next ones.

        Raises:
            RowMappingLost: they are not, or not the prompt's.
            UnsupportedFeature: right padding with a prompt in chunks.
        """
        self._found, self._told = {}, None
        if not self.begun:
            self._reconcile(step)
            self.begun = True
            self.watched = step.start
            self._check_cached_prefix(step.start)
        self._check_columns(step)
        if step.start < self.prompt:
            known = not self.media or self.ids is not None
            self.layout = Layout(self.mask, self.ends, self._images() if known else None)
        if self.speech.listens:
            self.speech.hear(step.start, step.ids, self.prompt)
        inside = step.start < self.prompt and self.first_end < step.stop
        if inside and not self.decided() and not self.closes(step):
            raise UnsupportedFeature(
                RUNTIME, "right padding with a prompt evaluated in chunks", "pad on the left"
            )

    def _reconcile(self, step: Step) -> None:
        """Learn from the first pass what stands before the prompt: a prefix of keys and values
        (prefix tuning), or virtual tokens (prompt tuning), which are rows of the prompt."""
        given = step.start if self.given is None else self.given
        keys, virtual = step.start - given, 0
        if step.ids is None and self.ids is not None:
            virtual = step.width - (self.prompt - given)
        if keys < 0 or virtual < 0 or (virtual and given):
            raise RowMappingLost(
                f"the first pass covers {step.width} columns from {step.start} on; the prompt has "
                f"{self.prompt}, of which {given} are cached"
            )
        if not keys and not virtual:
            return
        before = torch.zeros(self.rows, keys + virtual, dtype=torch.bool)
        before[:, keys:] = True
        self.mask = torch.cat([before, self.mask], dim=1)
        if self.ids is not None:
            nothing = torch.full((self.rows, keys + virtual), -1, dtype=self.ids.dtype)
            self.ids = torch.cat([nothing, self.ids], dim=1)
        self._find_ends()

    def _check_columns(self, step: Step) -> None:
        # In a loop without a cache, only token ids show that the same prompt comes again.
        told = step.ids is not None or self.given is not None
        again = not step.cached and told and self.decided() and step.stop >= self.watched
        taken_back = self.prompt <= step.start < self.watched
        if step.start != self.watched and not again and not taken_back:
            raise RowMappingLost(
                f"a pass begins at column {step.start}, expected {self.watched}; a prompt of "
                f"{self.prompt} tokens is evaluated once, from its beginning to its end"
            )
        if step.ids is not None and step.start < self.prompt:
            self._check_ids(step)
        if step.stop > self.prompt and not self.decided() and not self.drafts:
            raise RowMappingLost(
                f"a pass ends at column {step.stop}, behind a prompt of {self.prompt} tokens "
                "without a verdict"
            )

    def _check_ids(self, step: Step) -> None:
        assert step.ids is not None
        part = slice(step.start, min(step.stop, self.prompt))
        found = step.ids[:, : part.stop - part.start]
        if self.ids is None:
            self.ids = torch.full(self.mask.shape, -1, dtype=found.dtype)
        known = self.ids[:, part]
        if torch.equal(known, found):
            return
        differs = (known != found) & (known >= 0) & self.mask[:, part]
        if bool(differs.any()):
            raise RowMappingLost("a pass evaluates other tokens than the prompt's")
        known.copy_(found)

    def end(self, step: Step) -> None:
        """A pass is over, and every stop was reached.

        Raises:
            RowMappingLost: the prompt is over, and was not decided.
        """
        self.watched = step.stop
        if step.stop >= self.prompt and not self.decided():
            raise RowMappingLost("the prompt ended without a verdict")
        self.survived = max(self.prompt, step.start if self.given is None else step.stop)
        if self.drafts:
            self.survived = max(self.prompt, step.start + 1)
        if self._paths is not None and self.decided():
            for row, path in enumerate(self._paths.tolist()):
                self._of_paths[tuple(path)] = self._outcome(row)

    def rearrange(self, ids: Tensor) -> None:
        """Beams: the token ids [B, T] of each row, up to the last that the next pass evaluates. A
        row goes on from any that had the ids before its last one.

        Raises:
            RowMappingLost: no row had.
        """
        if self._paths is not None:
            before = ids[:, : self._paths.shape[1]]
            same = (before[:, None] == self._paths[None]).all(dim=2)  # [B, B]
            own = torch.arange(self.rows) // self.copies
            same &= own[:, None] == own[None]
            if not bool(same.any(dim=1).all()):
                raise RowMappingLost("a beam goes on from a sequence that was not evaluated")
            stay = same.diagonal()
            parents = torch.where(stay, torch.arange(self.rows), same.int().argmax(dim=1))
            if not bool(stay.all()):
                self.tokens.reorder(parents)
                self.speech.reorder(parents)
        self._paths = ids

    def finish(self, columns: int, sequences: Tensor | None, skipped: int) -> None:
        """The answers are complete.

        Args:
            columns: of prompts and answers; nothing was evaluated behind the last token of these.
            sequences: [N, T] what beam search returned.
            skipped: columns of the prompt that are not in it.
        """
        self.survived = max(self.prompt, min(self.watched, columns - 1))
        if not self.beams or sequences is None:
            return
        each = len(sequences) * self.copies // self.rows  # returned for each prompt
        self._told = tuple(
            self._of_path(ids, skipped, i // each * self.copies)
            for i, ids in enumerate(sequences.tolist())
        )

    def _of_path(self, ids: list[int], skipped: int, row: int) -> Outcome:
        """The outcome of a sequence: that of the longest part of it that was evaluated."""
        if self._paths is None:
            return self._outcome(row)
        for stop in range(len(ids), self.prompt - skipped - 1, -1):
            if (found := self._of_paths.get(tuple(ids[:stop]))) is not None:
                return found
        raise RowMappingLost("generate() returned a sequence that was not evaluated")

    def closes(self, step: Step) -> bool:
        """True if this pass holds the prompt end of every row, and so completes every reading."""
        return step.start <= self.first_end and self.last_end < step.stop

    def _check_cached_prefix(self, start: int) -> None:
        if start and bool(self.mask[:, :start].any()):
            self.tokens.check_cached(start)
        checked: dict[Position, Tensor] = {}
        for index, probe in enumerate(self.package.spec.probes):
            for reading in probe.readings:
                position = reading.position
                offset = position.offset if isinstance(position, PromptEnd) else 0
                there = not offset or (not self.padded and self.first_end + offset >= 0)
                if there and not start:
                    continue  # every row that it needs will be evaluated
                if position not in checked:
                    checked[position] = self._check_reading(probe.id, reading, start)
                known = self.short.get(index, torch.zeros(self.rows, dtype=torch.bool))
                self.short[index] = known | checked[position]

    def _check_reading(self, probe: str, reading: Reading, start: int) -> Tensor:
        """Which rows [B] are too short for a reading."""
        if isinstance(reading.position, PromptEnd):
            wanted = self.ends + reading.position.offset
            real = (wanted >= 0) & self.mask.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
            if start and bool((real & (wanted < start)).any()):
                raise RowMappingLost(
                    f"{probe}: {reading} lies in the cached prefix of {start} tokens; "
                    "generate without a cache"
                )
            return ~real
        if bool(self.mask[:, :start].any()):
            raise RowMappingLost(
                f"{probe}: {reading} needs every row of the prompt, but {start} come "
                "from a cache; generate without one"
            )
        return torch.zeros(self.rows, dtype=torch.bool)

    # -------------------------------------------------------- walking the stops

    def visit(self, stop: Stop, h: Tensor, step: Step, columns: Tensor) -> Tensor:
        """Read, score, decide and act at one site; `columns` [Q] are those `h` holds."""
        if step.start < self.prompt and not self.decided():
            for probe, reading in stop.readings:
                self._read(probe, reading, h, step, columns)
            for probe in stop.probes if self.closes(step) else ():
                if probe not in self.logits:
                    self._judge(probe)
        if stop.rows and (step.start < self.prompt or self.tokens.reads_answers):
            self._take_rows(stop, h, step)
        if stop.rules:
            ends = self.closes(step)
            for rule in stop.rules:
                if ends or (rule in self.begins and rule in self.following):
                    self._decide(rule)
        return self._act(stop, h, columns) if stop.acts and self.active else h

    def _take_rows(self, stop: Stop, h: Tensor, step: Step) -> None:
        """Token readings: the pass's rows at one site, and the probes that are complete here."""
        layout = self.layout
        read = {
            probe: self.tokens.wanted(probe, step.start, step.stop, layout)
            for probe, _ in stop.rows
        }
        for probe, site in stop.rows:
            if read[probe]:
                self.tokens.take(probe, site, h)
        live = (~self.ended)[:, None].expand(-1, step.width)
        if step.live is not None:
            live = live & step.live
        for probe in stop.probes:
            reading = self.package.spec.probes[probe].token_reading
            if reading is not None and read[probe]:
                inside = layout.in_scope(reading, step.columns, live)
                at_end = step.columns[None] == self.ends[:, None]
                self.tokens.close(probe, step.start, inside, at_end)

    def _read(self, probe: int, index: int, h: Tensor, step: Step, columns: Tensor) -> None:
        position = self.package.spec.probes[probe].readings[index].position
        # Every site but the head holds the same columns.
        place = position, columns is step.head, h.device
        if place not in self._found:
            self._found[place] = self._find(position, step, columns, h.device)
        found = self._found[place]
        h, key = h.detach() if h.requires_grad else h, (probe, index)
        if isinstance(found, Column):
            self.read[key] = h[:, found.at].to(torch.float32, copy=True)
            return
        if isinstance(found, Rows):
            if key not in self.read:
                shape = (self.rows, h.shape[-1])
                self.read[key] = torch.full(shape, math.nan, dtype=torch.float32, device=h.device)
            self.read[key][found.rows] = h[found.rows, found.columns].float()
            return
        rows = h[:, : found.width]
        if found.padding is not None:
            # Chosen, not multiplied: padding that is not a number is nobody's.
            rows = rows.masked_fill(found.padding, 0.0)
        # float64 where the device supports it, so that the order of chunks has no effect
        wide = torch.float32 if h.device.type == "mps" else torch.float64
        total = rows.sum(dim=1, dtype=wide)
        self.read[key] = self.read[key] + total if key in self.read else total
        if self.closes(step):
            self.read[key] = (self.read[key] / found.counts).float()

    def _find(
        self, position: Position, step: Step, columns: Tensor, device: torch.device
    ) -> Rows | Column | Mean:
        """Where a site that holds these columns has the rows of a reading."""
        if isinstance(position, PromptEnd):
            at = self.last_end + position.offset - step.start
            if columns is step.columns and self.first_end == self.last_end and 0 <= at < step.width:
                return Column(at)
            here = columns[None] == (self.ends + position.offset)[:, None]  # [B, Q]
            rows, places = here.nonzero(as_tuple=True)
            return Rows(rows.to(device), places.to(device))
        if isinstance(position, PromptMean) and not self.padded and columns is step.columns:
            return Mean(min(step.stop, self.prompt) - step.start, None, self.prompt)
        mask = self._images() if isinstance(position, ImageMean) else self.mask
        part = mask[:, columns[columns < self.prompt]]
        padding = None if bool(part.all()) else ~part[..., None].to(device)
        counts = mask.sum(dim=1).clamp(min=1)[:, None].to(device)
        return Mean(part.shape[1], padding, counts)

    def _images(self) -> Tensor:
        """Rows [B, P] of images; none for a prompt without token ids."""
        if self.ids is None:
            return torch.zeros_like(self.mask)
        return torch.isin(self.ids, torch.tensor(self.media)) & self.mask

    def _judge(self, index: int) -> None:
        probe = self.package.spec.probes[index]
        parts = [self.read[self.plan.source[index, k]] for k in range(len(probe.readings))]
        device = parts[-1].device
        sees = any(isinstance(reading.position, ImageMean) for reading in probe.readings)
        missing = ~self._images().any(dim=1).to(device) if sees else None
        x = torch.cat([p.to(device) for p in parts], dim=1)
        scores, finite = kernels.judge(probe, self.weights, x, missing)
        unknown = NO_IMAGE_ROWS if sees and self.media and self.ids is None else ""
        reasons = [unknown] * self.rows
        if index in self.short:
            short = self.short[index].tolist()
            reasons = [reference.TOO_SHORT if s else unknown for s in short]
        self.judged[index] = Judged.of(probe, scores, finite, self.ends, reasons)

    def _judged(self, until: Tensor) -> dict[int, Judged]:
        """What the probes say of the rows in front of the columns `until` [B]."""
        of_rows = {i: self.tokens.judged(i, self.layout, until) for i in self.logits}
        return {**self.judged, **of_rows}

    def _decide(self, index: int) -> None:
        spec = self.package.spec
        needed = rule_probes(spec, index)
        fired = {
            i: self.tokens.fired(i, self.layout) if i in self.logits else self.judged[i].fired
            for i in needed
        }
        begin = begins(spec, index, fired, self.ends)
        known = self.begins.get(index)
        if known is not None and torch.equal(known, begin):
            return
        at_begin = {
            i: self.tokens.scores_at(i, begin) if i in self.logits else self.judged[i].scores
            for i in needed
        }
        self.begins[index] = begin
        self.strengths[index] = strengths(spec, index, at_begin, self.rows)
        held = begin < NEVER
        self.active.pop(index, None)
        if bool(held.any()):
            self.active[index] = held.nonzero()[:, 0]

    def _act(self, stop: Stop, h: Tensor, columns: Tensor) -> Tensor:
        """Rewrite the rows of requests whose rule holds; the other rows are bit-identical."""
        spec = self.package.spec
        changed = h
        for act in stop.acts:
            rows = self.active.get(act.rule)
            if rows is None:
                continue
            intervention = spec.interventions[act.intervention]
            where = columns[None] >= self.begins[act.rule][rows][:, None]  # [R, Q]
            if intervention.position == "all_positions":
                where = torch.ones_like(where)
            if not bool(where.any()):
                continue
            if changed is h:
                changed = h.clone()
            device_rows = rows.to(h.device)
            old = changed[device_rows]
            strength = self.strengths[act.rule][rows].to(h.device)
            new = kernels.apply(intervention, act.target, self.weights, old, strength)
            changed[device_rows] = torch.where(where.to(h.device)[..., None], new, old)
        return changed

    def said(self, logits: Tensor, step: Step) -> Tensor:
        """The logits [B, H, V] of a pass, those of rows that `say` acts on forced."""
        return self.speech.forced(logits, step.head, self.layout, self.begins, self.ids)

    # -------------------------------------------------------- results

    def decided(self) -> bool:
        """True once every probe has judged the prompt and every rule is decided."""
        spec = self.package.spec
        pooled = len(spec.probes) - len(self.logits)
        return len(self.judged) == pooled and len(self.begins) == len(spec.rules)

    def acts_on_layers(self) -> bool:
        """True if a rule that holds for some row writes before the head."""
        return any(
            act.rule in self.active
            for stop in self.plan.stops
            if stop.depth < self.plan.head_depth
            for act in stop.acts
        )

    def outcomes(self) -> tuple[Outcome, ...]:
        """One outcome for each answer: of what survived so far."""
        if self._told is None:
            rows = range(0, self.rows, self.copies if self.beams else 1)
            self._told = tuple(map(self._outcome, rows))
        return self._told

    def _outcome(self, row: int) -> Outcome:
        spec = self.package.spec
        until = (self.ends + 1).clamp(min=self.survived)
        judged = self._judged(until)
        ends = int(self.ends[row])
        verdicts = tuple(judged[i].verdict(p, row, ends) for i, p in enumerate(spec.probes))
        held = [rule.id for i, rule in enumerate(spec.rules) if self.begins[i][row] < until[row]]
        return Outcome(verdicts, tuple(held))
