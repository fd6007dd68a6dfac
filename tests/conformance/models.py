"""Every type of decoder in transformers, steered: `make conformance-models`.

For each type a tiny random model (`model_types.py`) and a guard that fires on two of four prompts:
each prompt alone, all of them in one padded batch, and loops of forward calls. They are compared
with the unsteered model and the numpy reference (`model_oracle.py`). The last line is one JSON
object. `--update` writes the pins and docs/models.md.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))  # what tests share
import models_page
from model_oracle import (
    NEW,
    Greedy,
    Plain,
    acting,
    agree,
    batch,
    best,
    guard,
    half_fired,
    judged,
    same,
    steered,
)
from model_types import PROMPTS, TYPES, Absent, chosen, short, tiny
from steerbridge.errors import SteerbridgeError
from steerbridge.package import SteeringPackage
from steerbridge.reference import Action, Verdict
from steerbridge.testing import pins as pinned
from steerbridge.testing.kit import Result, Wrong
from steerbridge.testing.pins import Pins
from steerbridge_hf import steer

PINS: Final = models_page.TRANSFORMERS
# Outputs in which models give their state, and take it.
STATES: Final = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


class Refused(Exception):
    """The adapter refused before a token; its reason is the message."""


@dataclass(frozen=True, slots=True)
class Loop:
    """How forward calls are made: with a cache, and with a mask of all tokens behind it."""

    cached: bool
    masked: bool


# ---------------------------------------------------------------- what is tried


@dataclass
class Trial:
    """A model with its guard; `notes` are what a reader of the results should know."""

    plain: Plain
    package: SteeringPackage
    notes: list[str] = field(default_factory=list)
    doing: str = ""
    told: int = 0  # tokens given since the last request began

    @property
    def model(self) -> Any:
        return self.plain.model

    # -------------------------------------------------------- requests

    def generate(self, inputs: dict[str, Tensor]) -> tuple[list[Verdict], list[list[int]]]:
        """Verdicts and tokens of a batch with the guard."""
        self.told = 0
        with steer(self.model, self.package) as session:
            output = self.model.generate(
                **inputs,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[self._count],
            )
            verdicts = [outcome.verdicts[0] for outcome in session.outcomes]
        return verdicts, output[:, inputs["input_ids"].shape[1] :].tolist()

    def _count(self, ids: Tensor, scores: Any, **more: Any) -> Tensor:
        self.told += 1
        return torch.zeros(len(ids), dtype=torch.bool)

    def loop(self, ids: list[int], how: Loop) -> list[Greedy]:
        """Greedy tokens by forward calls."""
        answer: list[Greedy] = []
        state: dict[str, Any] = {}
        self.told = 0
        for _ in range(NEW):
            tokens = [*ids, *(g.token for g in answer)]
            given: dict[str, Any] = {"input_ids": torch.tensor([tokens[-1:] if state else tokens])}
            if how.masked or not state:
                given["attention_mask"] = torch.ones(1, len(tokens), dtype=torch.long)
            with torch.no_grad():
                output = self.model(**given, **state, use_cache=how.cached)
            if how.cached:
                state = {n: output[n] for n in STATES if output.get(n) is not None}
                if not state:
                    raise ValueError("its outputs have no cache")
            answer.append(best(output.logits[0, -1]))
            self.told += 1
        return answer

    # -------------------------------------------------------- checks

    def alone(self) -> None:
        """Each prompt by itself."""
        for ids in PROMPTS:
            self.doing = f"a prompt of {len(ids)} tokens"
            inputs = batch([ids])
            want = judged(self.package, self.plain.states(ids))
            actions = acting(self.package, want)
            control = self.plain.generated(inputs, [actions], self.package)[0]
            expected = self._expected(ids, actions, control, "its cache")
            if not actions:  # bit for bit
                expected = [Greedy(token, close=False) for token in self.plain.tokens(inputs)[0]]
            verdicts, answers = self.generate(inputs)
            self._compare(verdicts[0], answers[0], want, expected)

    def padded(self) -> None:
        """All prompts in one batch, padded on the left."""
        self.doing = "a padded batch"
        inputs = batch(PROMPTS)
        wants = [judged(self.package, s) for s in self.plain.padded_states(inputs)]
        actions = [acting(self.package, want) for want in wants]
        control = self.plain.generated(inputs, actions, self.package)
        expected = [
            self._expected(ids, actions[i], control[i], "padding") for i, ids in enumerate(PROMPTS)
        ]
        for ids, want in zip(PROMPTS, wants, strict=True):
            if not same(want, judged(self.package, self.plain.states(ids))):
                self._changed("padding")
        try:
            verdicts, answers = self.generate(inputs)
        except SteerbridgeError as error:
            if not self._mixes_rows():
                raise
            self._note(f"a batch mixes rows in the model itself, and is stopped ({short(error)})")
            return
        for i, want in enumerate(wants):
            self._compare(verdicts[i], answers[i], want, expected[i])

    def _mixes_rows(self) -> bool:
        """Whether the unsteered model gives another answer to a prompt beside another one."""
        first, *_ = self.plain.tokens(batch([PROMPTS[0], PROMPTS[0][::-1]]))
        return not agree(first, self.plain.greedy(PROMPTS[0], (), self.package))

    def loops(self, cached: bool) -> None:
        """Forward calls in a loop, with a cache or without."""
        kind = f"a loop of forward calls {'with its' if cached else 'without a'} cache"
        for ids in PROMPTS:
            self.doing = kind
            want = judged(self.package, self.plain.states(ids))
            actions = acting(self.package, want)
            try:
                how = self._own_loop(ids, cached)
                with steered(self.model, [actions], self.package, first=-1):
                    control = self.loop(ids, how)
            except Exception as error:  # the model's own, without the adapter
                if not cached:
                    raise
                self._note(f"no loop of forward calls with a cache ({short(error)})")
                return
            expected = self._expected(ids, actions, control, kind)
            self.told = 0
            with steer(self.model, self.package) as session:
                with session.request(torch.ones(1, len(ids), dtype=torch.long)):
                    answer = self.loop(ids, how)
                verdict = session.outcomes[0].verdicts[0]
            self._compare(verdict, [g.token for g in answer], want, expected)

    def _own_loop(self, ids: list[int], cached: bool) -> Loop:
        """How the unsteered model is to be called: recurrent ones take no mask behind a prompt."""
        usual = Loop(cached, masked=True)
        answer = [g.token for g in self.loop(ids, usual)]
        right = agree(answer, self.plain.greedy(ids, (), self.package))
        return usual if right or not cached else Loop(cached, masked=False)

    def _expected(
        self, ids: list[int], actions: Sequence[Action], control: list[Greedy], what: str
    ) -> list[Greedy]:
        """The answer without cache or batch, unless the model itself gives another one so.

        Args:
            control: the answer of the model with the oracle's hook, in the way that is tried.
        """
        expected = self.plain.greedy(ids, actions, self.package)
        if agree([g.token for g in control], expected):
            return expected
        self._changed(what)
        return control

    def _changed(self, what: str) -> None:
        self._note(f"{what} changes the model itself")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _compare(
        self, got: Verdict, answer: list[int], want: Verdict, expected: list[Greedy]
    ) -> None:
        if not same(got, want):
            raise Wrong(
                f"score {got.score:.6g} ({got.fired}), expected {want.score:.6g} ({want.fired})"
            )
        if not agree(answer, expected):
            raise Wrong(f"tokens {answer}, expected {[g.token for g in expected]}")


# ---------------------------------------------------------------- results


def tried(name: str) -> Result:
    """What the adapter makes of a type."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # transformers', of random models
        return _tried(name)


def _tried(name: str) -> Result:
    try:
        trial = _begun(tiny(name))
    except Absent as error:
        return Result("absent", str(error))
    except Refused as error:
        return Result("refused", str(error))
    except Exception as error:
        return Result("wrong", f"steer(): {short(error)}")
    checks: tuple[Callable[[], None], ...] = (
        trial.alone,
        trial.padded,
        lambda: trial.loops(cached=True),
        lambda: trial.loops(cached=False),
    )
    try:
        for check in checks:
            check()
    except SteerbridgeError as error:
        if not trial.told:
            return Result("refused", f"{trial.doing}: {short(error)}")
        return Result("wrong", f"{trial.doing}, after {trial.told} tokens: {short(error)}")
    except Exception as error:
        return Result("wrong", f"{trial.doing}: {short(error)}")
    return Result("right", "; ".join(trial.notes))


def _begun(model: Any) -> Trial:
    """A trial of a model that can be steered, and that works without."""
    plain = Plain(model)
    try:
        plain.tokens(batch([PROMPTS[0]]))
    except Exception as error:
        raise Absent(f"its own generate() fails: {short(error)}") from error
    try:
        steer(model, guard(model)).remove()
    except SteerbridgeError as error:
        raise Refused(short(error)) from error
    try:
        plain.states(PROMPTS[0])
    except Exception as error:
        raise Absent(f"no hidden states to compare with: {short(error)}") from error
    return Trial(plain, half_fired(plain))


def _said(name: str) -> Result:
    result = tried(name)
    print(f"{name}: {result.status} {result.detail}".rstrip(), file=sys.stderr, flush=True)
    return result


def main() -> int:
    """Try the chosen types; 1 if one is wrong, or not as pinned."""
    options = chosen(__doc__)
    start = time.monotonic()
    known = models_page.read()[1].shapes
    run = Pins("real", {name: _said(name) for name in options.types})
    differences = list(_differences(known, run.shapes))
    for line in differences:
        print(line, file=sys.stderr)
    if options.update:
        _write({**{n: r for n, r in known.items() if n in TYPES}, **run.shapes})
    counts = run.counts()
    seconds = round(time.monotonic() - start)
    print(json.dumps({**counts, "as_pinned": not differences, "seconds": seconds}))
    return int(bool(counts["wrong"] or (differences and not options.update)))


def _differences(known: Mapping[str, Result], run: Mapping[str, Result]) -> Iterator[str]:
    """What is not as pinned; of a type that is right, its notes too."""
    yield from Pins("real", {n: r for n, r in known.items() if n in run}).differences(run)
    yield from (f"{n}: pinned, but no type any more" for n in sorted(set(known) - set(TYPES)))
    for name, result in run.items():
        if (pin := known.get(name)) and pin.status == result.status == "right" and pin != result:
            yield f"{name}: pinned with {pin.detail!r}, found {result.detail!r}"


def _write(shapes: dict[str, Result]) -> None:
    title = f"transformers {transformers.__version__}"
    pinned.write(PINS, {title: Pins("real", dict(sorted(shapes.items())))})
    models_page.write()


if __name__ == "__main__":
    sys.exit(main())
