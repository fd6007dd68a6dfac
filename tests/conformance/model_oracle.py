"""What a model must do with a guard on it: the unsteered model, hooks and the numpy reference.

Nothing of the adapter: hidden states are those that the model returns, and its output embedding is
steered by `reference.steer`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import helpers
from model_types import PROMPTS, Absent
from steerbridge import reference
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage
from steerbridge.reference import Action, Verdict
from steerbridge.spec import parse_site

NEW: Final = 8  # tokens of an answer
# Of a score, relative above 1: float32 sums of other lengths, and in other orders.
TOLERANCE: Final = 1e-4
# Between the best and the second logit, relative above 100: closer ones may change places.
MARGIN: Final = 1e-3
STRENGTHS: Final = (2.0, 8.0, 32.0, 128.0)  # of the head: the first that changes an answer
SEEDS: Final = 8  # of guards
States = list[np.ndarray]  # [T, D] of one prompt, by block
HEAD: Final = parse_site("head_input")


@dataclass(frozen=True, slots=True)
class Greedy:
    """A greedy token of the oracle, and whether rounding could choose another one."""

    token: int
    close: bool


@dataclass
class Plain:
    """The unsteered model, and what steering must make of it.

    Args:
        margin: see `MARGIN`; wider where another runtime computes less exactly.
    """

    model: Any
    margin: float = MARGIN

    def states(self, ids: list[int]) -> States:
        """Hidden states [T, D] before each block of a prompt, without a cache."""
        return [*self._missing, *self._hidden(ids)]

    def _hidden(self, ids: list[int]) -> States:
        with torch.no_grad():
            output = self.model(
                input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False
            )
        return [h[0].double().numpy() for h in output.hidden_states]

    @cached_property
    def _missing(self) -> States:
        """Stands for the first block's input, which recurrent models leave out.

        Tokens have seen one another behind the first block, and not before it.
        """
        first, *rest = PROMPTS[0]
        one, other = (self._hidden([token, *rest])[0] for token in (first, first + 1))
        return [] if np.array_equal(one[1:], other[1:]) else [np.full_like(one, np.nan)]

    def padded_states(self, inputs: dict[str, Tensor]) -> list[States]:
        """The same for each row of a padded batch, as `generate` evaluates it."""
        output = self._generate(
            inputs, max_new_tokens=1, output_hidden_states=True, return_dict_in_generate=True
        )
        layers = output.hidden_states[0]
        masks = inputs["attention_mask"].bool()
        hidden = [[h[i][m].double().numpy() for h in layers] for i, m in enumerate(masks)]
        return [[*self._missing, *row] for row in hidden]

    def greedy(
        self,
        ids: list[int],
        actions: Sequence[Action],
        package: SteeringPackage,
        new: int = NEW,
    ) -> list[Greedy]:
        """Greedy tokens without a cache; the actions steer the rows from the prompt end on."""
        tokens, answer = list(ids), []
        with steered(self.model, [actions], package, first=len(ids) - 1):
            for _ in range(new):
                with torch.no_grad():
                    output = self.model(input_ids=torch.tensor([tokens]), use_cache=False)
                answer.append(best(output.logits[0, -1], self.margin))
                tokens.append(answer[-1].token)
        return answer

    def generated(
        self,
        inputs: dict[str, Tensor],
        actions: Sequence[Sequence[Action]],
        package: SteeringPackage,
    ) -> list[list[Greedy]]:
        """Greedy tokens of each row by `generate`, with the actions on the last row of a pass."""
        with steered(self.model, actions, package, first=-1):
            output = self._generate(inputs, output_logits=True, return_dict_in_generate=True)
        return [[best(step[i]) for step in output.logits] for i in range(len(actions))]

    def tokens(self, inputs: dict[str, Tensor]) -> list[list[int]]:
        """Greedy tokens of each row by `generate`."""
        return self._generate(inputs)[:, inputs["input_ids"].shape[1] :].tolist()

    def _generate(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        return self.model.generate(
            **inputs, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
        )


def best(logits: Tensor, margin: float = MARGIN) -> Greedy:
    """The greedy token of logits [V]."""
    first, second = logits.double().topk(2).values.tolist()
    return Greedy(int(logits.argmax()), first - second < margin * max(1.0, abs(first) / 100))


@contextmanager
def steered(
    model: Any, actions: Sequence[Sequence[Action]], package: SteeringPackage, first: int
) -> Iterator[None]:
    """The output embedding sees, in row `i` of the batch, states from `first` on steered."""

    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0].clone()
        for i, own in enumerate(actions):
            rows = reference.steer(own, package.tensors, HEAD, states[i, first:].numpy())
            states[i, first:] = torch.from_numpy(np.asarray(rows, np.float32))
        return (states, *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- the guard


def guard(
    model: Any,
    threshold: float = 0.0,
    eps: float = 1.0,
    seed: int = 0,
    more: Sequence[dict[str, Any]] = (),
) -> SteeringPackage:
    """A guard of one linear probe that reads two sites, and more if asked, and a head of low
    rank."""
    config = model.config.get_text_config()
    known = ModelFacts(
        model_type=config.model_type,
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        name="",
    )
    readings = [
        helpers.reading(f"layer_input[{known.num_layers // 2}]"),
        helpers.reading("layer_input[1]", helpers.MEAN),
        *more,
    ]
    return helpers.package(
        known,
        seed=seed,
        scale=1.2 / known.hidden_size**0.5,
        probes=[helpers.linear_probe(readings=readings, threshold=threshold)],
        interventions=[helpers.head(weight=helpers.LOW_RANK, eps=eps)],
        rules=[helpers.rule(["p"], ["h"])],
    )


def judged(
    package: SteeringPackage, states: States, image_rows: np.ndarray | None = None
) -> Verdict:
    """The verdict on hidden states [T, D] by block; `image_rows` [T] are a picture's."""
    probe = package.spec.probes[0]
    inputs = reference.probe_input(
        probe, package.tensors, lambda s: states[package.spec.depth(s)], image_rows
    )
    return reference.verdicts(package, {probe.id: inputs})[0]


def half_fired(plain: Plain) -> SteeringPackage:
    """A guard that fires on two of the prompts and clearly changes the first token of an answer."""
    states = [plain.states(ids) for ids in PROMPTS]
    for seed, eps in itertools.product(range(SEEDS), STRENGTHS):
        scores = sorted(judged(guard(plain.model, seed=seed), s).score for s in states)
        threshold = (scores[1] + scores[2]) / 2
        package = guard(plain.model, threshold, eps, seed)
        apart = scores[2] - scores[1] > 0.01 * max(1.0, abs(threshold))
        if apart and any(map(_changes(plain, package), PROMPTS, states)):
            return package
    raise Absent(f"no guard among {SEEDS} with eps {STRENGTHS} clearly changes an answer")


def _changes(plain: Plain, package: SteeringPackage) -> Callable[[list[int], States], bool]:
    def changes(ids: list[int], states: States) -> bool:
        actions = acting(package, judged(package, states))
        [new] = plain.greedy(ids, actions, package, new=1)
        [old] = plain.greedy(ids, (), package, new=1)
        return new.token != old.token and not new.close

    return changes


def acting(package: SteeringPackage, verdict: Verdict) -> tuple[Action, ...]:
    return reference.actions(package.spec, (verdict,))


def batch(prompts: Sequence[list[int]]) -> dict[str, Tensor]:
    """Prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def same(a: Verdict, b: Verdict, tolerance: float = TOLERANCE) -> bool:
    apart = abs(a.score - b.score)
    return a.fired == b.fired and apart <= tolerance * max(1.0, abs(b.score))


def agree(answer: list[int], expected: list[Greedy]) -> bool:
    """Whether tokens are the oracle's, up to the first that rounding could change."""
    for token, greedy in zip(answer, expected, strict=True):
        if greedy.close:
            return True
        if token != greedy.token:
            return False
    return True
