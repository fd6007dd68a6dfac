"""State of the requests in one batch: prompt ends, readings, scores, strengths.

Columns count tokens of the padded batch from the left, cached ones included, so a forward
pass covers columns start..start+Q-1 whatever the cache holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerbridge.errors import RowMappingLost, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.plan import Plan, Stop
from steerbridge.runtime import Outcome
from steerbridge.spec import ImageMean, PromptEnd, Reading
from steerbridge_hf import kernels
from steerbridge_hf.decisions import decide, outcome
from steerbridge_hf.kernels import Weights
from steerbridge_hf.sites import RUNTIME


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: which columns it covers, and which of them reach the head."""

    start: int
    width: int
    kept: Tensor  # columns of this pass that the output embedding sees

    @property
    def stop(self) -> int:
        return self.start + self.width

    @property
    def columns(self) -> Tensor:
        """All columns of this pass, on the CPU."""
        return torch.arange(self.start, self.stop)


@dataclass(slots=True)
class Requests:
    """State of the B requests of one batch, from their first forward pass to their last."""

    package: SteeringPackage
    plan: Plan
    weights: Weights
    mask: Tensor  # [B, P] bool, on the CPU: tokens of the prompt
    images: Tensor | None  # [B, P] bool, on the CPU: image tokens of the prompt
    copies: int = 1  # rows of the model per prompt (beams, num_return_sequences)
    first: int | None = None  # first column that was evaluated, not cached
    watched: int = 0  # columns up to here passed through every hook
    read: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # [B, D]
    scores: dict[int, Tensor] = field(default_factory=dict)  # [B]
    strengths: dict[int, Tensor] = field(default_factory=dict)  # [B]; 0 where it did not fire
    held: dict[int, Tensor] = field(default_factory=dict)  # [B] bool
    active: dict[int, Tensor] = field(default_factory=dict)  # rows with a rule that holds
    ends: Tensor = field(init=False)  # [B] column of each prompt's last token

    def __post_init__(self) -> None:
        if not bool(self.mask.any(dim=1).all()):
            raise RowMappingLost("a row of the batch holds padding only: it has no prompt end")
        last = self.mask.shape[1] - 1
        self.ends = last - self.mask.flip(1).int().argmax(dim=1)  # [B]
        for rule in self.plan.unconditional:
            self._decide(rule)

    @property
    def prompt(self) -> int:
        """Number of columns of the prompt."""
        return self.mask.shape[1]

    # -------------------------------------------------------- shape of the batch

    def expand_to(self, rows: int) -> None:
        """Repeat each prompt for the rows that `generate` made of it (beams, samples)."""
        if rows == len(self.mask):
            return
        if self.first is not None or rows % len(self.mask):
            raise RowMappingLost(f"{rows} rows cannot be tied to {len(self.mask)} prompts")
        self.copies = rows // len(self.mask)
        self.mask = self.mask.repeat_interleave(self.copies, dim=0)
        self.ends = self.ends.repeat_interleave(self.copies, dim=0)
        if self.images is not None:
            self.images = self.images.repeat_interleave(self.copies, dim=0)
        for rule in self.plan.unconditional:
            self._decide(rule)

    def begin(self, step: Step) -> None:
        """Check that every row the probes read will be evaluated; called per forward pass."""
        if self.first is None:
            self.first = step.start
            self._check_cached_prefix(step.start)
        inside = step.start < self.prompt and int(self.ends.min()) < step.stop
        if inside and not self.closes(step):
            raise UnsupportedFeature(
                RUNTIME, "right padding with a prompt evaluated in chunks", "pad on the left"
            )

    def closes(self, step: Step) -> bool:
        """True if this pass holds the prompt end of every row, and so completes every reading."""
        return step.start <= int(self.ends.min()) and int(self.ends.max()) < step.stop

    def _check_cached_prefix(self, start: int) -> None:
        for stop in self.plan.stops:
            for index, at in stop.readings:
                probe = self.package.spec.probes[index]
                self._check_reading(probe.id, probe.readings[at], start)

    def _check_reading(self, probe: str, reading: Reading, start: int) -> None:
        if isinstance(reading.position, PromptEnd):
            wanted = self.ends + reading.position.offset
            real = (wanted >= 0) & self.mask.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
            if not bool(real.all()):
                raise RowMappingLost(f"{probe}: a prompt is too short for {reading}")
            if int(wanted.min()) < start:
                raise RowMappingLost(
                    f"{probe}: {reading} lies in the cached prefix of {start} tokens; "
                    "generate without a cache"
                )
        elif start > 0:
            raise RowMappingLost(
                f"{probe}: {reading} needs every row of the prompt, but {start} come "
                "from a cache; generate without one"
            )

    # -------------------------------------------------------- walking the stops

    def visit(self, stop: Stop, h: Tensor, step: Step, columns: Tensor) -> Tensor:
        """Read, score, decide and act at one site; `columns` [Q] are those `h` holds."""
        if step.start < self.prompt and not self.decided():
            closes = self.closes(step)
            for probe, reading in stop.readings:
                self._read(probe, reading, h, columns, closes)
            if closes:
                for probe in stop.probes:
                    self._score(probe)
                for rule in stop.rules:
                    self._decide(rule)
        return self._act(stop, h, columns) if stop.acts and self.active else h

    def _read(self, probe: int, index: int, h: Tensor, columns: Tensor, closes: bool) -> None:
        h = h.detach()
        position = self.package.spec.probes[probe].readings[index].position
        key = (probe, index)
        if isinstance(position, PromptEnd):
            wanted = columns[None] == (self.ends + position.offset)[:, None]  # [B, Q]
            inside = wanted.any(dim=1)
            if closes and key not in self.read and not bool(inside.all()):
                raise RowMappingLost(f"the rows of {position} were not in the batch")
            if key not in self.read:
                self.read[key] = torch.full(
                    (len(self.mask), h.shape[-1]), math.nan, device=h.device
                )
            rows = inside.nonzero()[:, 0]
            self.read[key][rows] = h[rows, wanted[rows].int().argmax(dim=1)].float()
            return
        mask = self._images() if isinstance(position, ImageMean) else self.mask
        part = mask[:, columns[columns < self.prompt]].to(h.device)
        # float64 where the device supports it, so that the order of chunks has no effect
        wide = torch.float32 if h.device.type == "mps" else torch.float64
        total = (h[:, : part.shape[1]].to(wide) * part[..., None]).sum(dim=1)
        self.read[key] = self.read.get(key, 0) + total
        if closes:
            counts = mask.sum(dim=1).clamp(min=1).to(h.device)
            self.read[key] = (self.read[key] / counts[:, None]).float()

    def _images(self) -> Tensor:
        if self.images is None:
            raise RowMappingLost("image_mean needs the image tokens: pass input_ids")
        return self.images

    def _score(self, index: int) -> None:
        probe = self.package.spec.probes[index]
        parts = [self.read[self.plan.source[index, k]] for k in range(len(probe.readings))]
        device = parts[-1].device
        missing = torch.zeros(len(self.mask), dtype=torch.bool)
        if self.images is not None:
            missing = ~self.images.any(dim=1)
        x = torch.cat([p.to(device) for p in parts], dim=1)
        self.scores[index] = kernels.score(probe, self.weights, x, missing.to(device)).cpu()

    def _decide(self, index: int) -> None:
        held, strengths = decide(self.package.spec, index, self.scores, len(self.mask))
        self.held[index], self.strengths[index] = held, strengths
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
            where = columns[None] >= self.ends[rows][:, None]  # [R, Q]
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

    # -------------------------------------------------------- results

    def decided(self) -> bool:
        """True once every probe has a score and every rule a decision."""
        return len(self.scores) == len(self.package.spec.probes) and len(self.held) == len(
            self.package.spec.rules
        )

    def acts_on_layers(self) -> bool:
        """True if a rule that holds for some row writes before the head."""
        return any(
            act.rule in self.active
            for stop in self.plan.stops
            if stop.depth < self.plan.head_depth
            for act in stop.acts
        )

    def outcomes(self) -> tuple[Outcome, ...]:
        """One outcome per prompt (rows made from one prompt share it)."""
        return tuple(
            outcome(self.package.spec, self.scores, self.held, row)
            for row in range(0, len(self.mask), self.copies)
        )
