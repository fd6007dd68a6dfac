"""What a user may choose about training, and the defaults. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from steerbridge.data import Example
from steerbridge.datasets.forms import CHAT, LONG

Shape = Literal["linear", "mlp"]
Refusal = Literal["say", "head_matrix", "add_vector", "project_out"]

DEFAULT_REFUSAL: Final = "I'm sorry, but I can't assist with that."
FORM_SHARES: Final[Mapping[str, float]] = {
    CHAT: 1.0,
    **dict.fromkeys(("system", "turns", "prefill", "raw", "layout"), 0.1),
    **dict.fromkeys(LONG, 0.05),
}


@dataclass(frozen=True, slots=True)
class Goal:
    """One probe of a guard and what it is for.

    `harmful` and `harmless` map kinds of prompts to their weight in the probe's loss; `*` stands
    for every kind not named (weight 1 unless given), and 0 excludes a kind. A goal is in use only
    if there are harmful prompts of the kind `needs` (None: of any kind with a weight).

    Attributes:
        reads: `rows`, each by itself, or `whole`: places and means of the prompt.
    """

    probe: str
    reads: Literal["rows", "whole"]
    harmful: Mapping[str, float] = field(default_factory=dict)
    harmless: Mapping[str, float] = field(default_factory=dict)
    needs: str | None = None

    def weight(self, example: Example) -> float:
        """The weight of one prompt in the loss."""
        weights = self.harmful if example.harmful else self.harmless
        return weights.get(example.kind, weights.get("*", 1.0))

    def applies(self, examples: Sequence[Example]) -> bool:
        """True if there is something for its probe to catch. Rows are not read where there are
        pictures: runtimes cannot calibrate such a probe yet."""
        if self.reads == "rows" and any(e.images for e in examples):
            return False
        caught = {e.kind for e in examples if e.harmful and self.weight(e) > 0}
        return self.needs in caught if self.needs else bool(caught)


# A probe that reads rows sees a request wherever it stands; one that reads the whole prompt is
# better on short ones. A harmless prompt that shares its words with a harmful one counts less than
# an ordinary one: the promise is about those. The channels of a multimodal model have one each:
# harm in the image alone (kind `image`) and in the combination (`both`).
GOALS: Final = (
    Goal("harm", "rows", harmless={"pair": 0.3, "borderline": 0.3}),
    Goal("whole", "whole", {"image": 0.0, "both": 0.0}),
    Goal("image", "whole", {"*": 0.0, "image": 1.0}, needs="image"),
    Goal("both", "whole", {"*": 0.0, "both": 1.0}, needs="both"),
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
        refuse: what the guard does when it fires: `say` the sentence, a trained `head_matrix` that
            makes the model say it, or a direction to `add_vector` or `project_out`.
        sentence: what a refusal says.
        reads: `rows` or `whole` prompts alone (see `Goal.reads`); `best`: what detects more, or
            both.
        probe: shape of the probes: `mlp` or `linear`.
        target_fpr: share of ordinary prompts that may fire.
        confidence: with which that rate holds, over the choice of the prompts; with too few prompts
            for it the rate is that of those prompts, and the evidence says so.
        forms: form -> how many of a hundredth of the prompts are put into it (1: all of them).
        answers: so many of the model's own answers are trained on, and probes that read rows go on
            reading while it answers; 0: they read prompts alone.
        search_minutes: for the search over layers and windows of probes that read rows, at most.
        goals: the probes of the guard and what each must catch.
        rank: rank of the head matrix; None keeps it dense.
        head: how the head matrix is trained.
        head_prompts: harmful prompts that a head or direction is made from, at most.
        validation_prompts: other harmful prompts that its strength is chosen on, at most.
        seed: the same seed and data give the same package.
    """

    name: str = "steerbridge-guard"
    refuse: Refusal = "say"
    sentence: str = DEFAULT_REFUSAL
    reads: Literal["best", "rows", "whole"] = "best"
    probe: Shape = "mlp"
    target_fpr: float = 0.01
    confidence: float = 0.95
    forms: Mapping[str, float] = field(default_factory=lambda: FORM_SHARES)
    answers: int = 0
    search_minutes: float = 10.0
    goals: tuple[Goal, ...] = GOALS
    rank: int | None = None
    head: HeadSettings = field(default_factory=HeadSettings)
    head_prompts: int = 256
    validation_prompts: int = 32
    seed: int = 0

    def goals_in_use(self, examples: Sequence[Example]) -> list[Goal]:
        """The goals whose probes are trained on these examples."""
        wanted = [goal for goal in self.goals if self.reads in ("best", goal.reads)]
        return [goal for goal in wanted if goal.applies(examples)]
