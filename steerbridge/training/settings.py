"""What a user may choose about training, and the defaults. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from steerbridge.data import Example

Shape = Literal["linear", "mlp"]
InterventionType = Literal["head_matrix", "add_vector", "project_out"]

FOLDS: Final = 5  # parts of the prompts; each is scored by probes that never saw it
DEFAULT_REFUSAL: Final = "I'm sorry, but I can't assist with that."


@dataclass(frozen=True, slots=True)
class Goal:
    """One probe of a guard: what it is for, and its part of the false positives.

    `harmful` and `harmless` map kinds of prompts to their weight in the probe's loss; `*` stands
    for every kind not named (weight 1 unless given), and 0 excludes a kind. Goals in use share
    `target_fpr` in proportion to `share`. A goal is in use only if there are harmful prompts of
    the kind `needs` (None: of any kind with a weight).
    """

    probe: str
    share: float
    harmful: Mapping[str, float] = field(default_factory=dict)
    harmless: Mapping[str, float] = field(default_factory=dict)
    needs: str | None = None

    def weight(self, example: Example) -> float:
        """The weight of one prompt in the loss."""
        weights = self.harmful if example.harmful else self.harmless
        return weights.get(example.kind, weights.get("*", 1.0))

    def applies(self, examples: Sequence[Example]) -> bool:
        """True if there is something for its probe to catch."""
        caught = {e.kind for e in examples if e.harmful and self.weight(e) > 0}
        return self.needs in caught if self.needs else bool(caught)


# One probe cannot do two things well: separate harmful from harmless requests, and separate them
# from harmless requests in nearly the same words. Two probes can. The same holds for the channels
# of a multimodal model: harm in the image alone (kind `image`) and in the combination (`both`).
GOALS: Final = (
    Goal(
        "harm",
        0.85,
        {"general_harmful": 0.33, "twin": 0.0, "image": 0.0, "both": 0.0},
        {"borderline": 40.0},
    ),
    Goal(
        "twins",
        0.15,
        {"twin": 5.0, "pair": 0.3, "image": 0.0, "both": 0.0},
        {"borderline": 20.0, "pair": 0.3},
        "twin",
    ),
    Goal("image", 0.5, {"*": 0.0, "image": 1.0}, needs="image"),
    Goal("both", 0.5, {"*": 0.0, "both": 1.0}, needs="both"),
)


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How the refusal head is trained.

    Args:
        eps: scale of the head's output; the trained matrix is relative to it.
        steps: optimiser steps.
        batch: prompts per step, each with all tokens of the refusal.
        decay: penalty on the squared entries of W, which pulls towards no steering.
    """

    eps: float = 0.1
    steps: int = 120
    batch: int = 20
    learning_rate: float = 0.03
    decay: float = 1e-4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What a user may choose about training.

    Args:
        name: name of the package.
        refusal: the sentence that the refusal head is trained to say.
        probe: shape of the probes: `mlp` or `linear`.
        target_fpr: kind of harmless prompts -> share of them that may fire; `*` is any other
            kind.
        goals: the probes of the guard and what each must catch.
        intervention: `head_matrix`, `add_vector` or `project_out`.
        rank: rank of the head matrix; None keeps it dense.
        head: how the head matrix is trained.
        head_prompts: harmful prompts that the intervention is trained on, at most.
        validation_prompts: other harmful prompts that its strength is chosen on, at most.
        seed: the same seed and data give the same package.
    """

    name: str = "steerbridge-guard"
    refusal: str = DEFAULT_REFUSAL
    probe: Shape = "mlp"
    target_fpr: Mapping[str, float] = field(
        default_factory=lambda: {"*": 0.01, "borderline": 0.02, "pair": 0.02}
    )
    goals: tuple[Goal, ...] = GOALS
    intervention: InterventionType = "head_matrix"
    rank: int | None = None
    head: HeadSettings = field(default_factory=HeadSettings)
    head_prompts: int = 256
    validation_prompts: int = 32
    seed: int = 0
