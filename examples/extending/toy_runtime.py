"""A runtime: `ToyModel` opens a model and answers, captures and trains on its behalf.

It is a `TrainableModel` (steerbridge/runtime.py). A runtime that cannot be trained leaves out
what stands under "train"; everything else is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steerbridge import Example, Generation, Outcome, Progress, SteeringPackage, Verdict, reference
from steerbridge.errors import UnsupportedFeature
from steerbridge.fingerprint import ModelFacts, file_sha256, text_sha256, tokenizer_sha256
from steerbridge.plan import plan
from steerbridge.reference import Action, AnySite
from steerbridge.runtime import Captured, OutputHead, Trace
from steerbridge.spec import HeadInput, LayerInput, LayerOutput, Reading, parse_site
from steerbridge.stats import log_probability
from toy_llama import Float32, Llama, Tokenizer

NAME: Final = "toy"  # of the entry point, and of the calibrations in packages


# --8<-- [start:guard]
class Guard:
    """A package at work on one request: `visit` is called along the order of computation.

    The plan says what happens at each depth: readings are taken, probes whose last reading this
    was are judged, rules whose last probe this was are decided, and then rules act. A probe reads
    a place before anything is written there. The guard is for one request and keeps its decision.
    """

    def __init__(self, package: SteeringPackage, prompt: int) -> None:
        self._spec, self._tensors, self._prompt = package.spec, package.tensors, prompt
        planned = plan(package.spec)
        self._stops = {stop.depth: stop for stop in planned.stops}
        self._head = planned.head_depth
        self._states: dict[int, Float32] = {}  # of the prompt [T, D], by depth
        self._verdicts: dict[str, Verdict] = {}
        self._actions: list[Action] = []
        for rule in planned.unconditional:
            self._decide(rule)

    def visit(self, depth: int, rows: Float32) -> Float32:
        """Rows [T, D] at a depth -> the rows with which the model goes on."""
        stop = self._stops.get(depth)
        if stop is None:
            return rows
        if depth not in self._states:  # the first pass: it holds the whole prompt
            self._states[depth] = rows[: self._prompt].copy()
            for i in stop.probes:
                probe = self._spec.probes[i]
                self._verdicts[probe.id] = reference.judge(probe, self._tensors, self._hidden_at)
            for i in stop.rules:
                self._decide(i)
        return self._steered(depth, rows) if self._actions else rows

    def _hidden_at(self, site: AnySite) -> Float32:
        return self._states[self._spec.depth(site)]

    def _decide(self, index: int) -> None:
        rule = self._spec.rules[index]
        if reference.holds(rule, self._verdicts):
            strength = reference.strength(rule, self._verdicts)
            for id in rule.interventions:
                self._actions.append(Action(rule.id, self._spec.intervention(id), strength))

    def _steered(self, depth: int, rows: Float32) -> Float32:
        site = parse_site("head_input" if depth == self._head else f"layer_input[{depth}]")
        rows = rows.copy()
        for action in self._actions:
            everywhere = action.intervention.position == "all_positions"
            first = 0 if everywhere else self._prompt - 1  # the prompt's last row predicts a token
            rows[first:] = reference.steer([action], self._tensors, site, rows[first:])
        return rows

    @property
    def outcome(self) -> Outcome:
        """Verdicts in the order of the spec, and the rules that held."""
        held = {action.rule for action in self._actions}
        return Outcome(
            tuple(self._verdicts[probe.id] for probe in self._spec.probes),
            tuple(rule.id for rule in self._spec.rules if rule.id in held),
        )
        # --8<-- [end:guard]


class ToyModel:
    """A model that is opened, for every command: `steerbridge ... --runtime toy --model FOLDER`.

    Args:
        model: a folder with `config.json`, `model.safetensors` and a tokenizer.
        options: what users pass with the command; this runtime has none.
    """

    # --8<-- [start:open]
    runtime, quantisation = NAME, "F32"

    def __init__(self, model: str | Path, **options: Any) -> None:
        for option in options:
            raise UnsupportedFeature(NAME, f"option {option}")  # an option is never ignored
        folder = Path(model)
        self._llama, self.tokenizer = Llama(folder), Tokenizer(folder)
        config, template = self._llama.config, self.tokenizer.template
        self.facts = ModelFacts(
            config["model_type"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            name=folder.name,
            architecture=config["architectures"][0],
            tokenizer_sha256=tokenizer_sha256(self.tokenizer.tokens),
            chat_template_sha256=None if template is None else text_sha256(template),
        )
        self.weights_sha256 = file_sha256(folder / "model.safetensors")
        self.context: int = config["max_position_embeddings"]

    def checked(self, package: SteeringPackage, ignore: Sequence[str] = ()) -> SteeringPackage:
        """The package with this runtime's thresholds; one for another model is refused, and one
        that needs more than this runtime does."""
        package.check(self.facts, ignore)
        for probe in package.spec.probes:
            if probe.token_reading is not None:
                raise UnsupportedFeature(NAME, f"{probe.id}: {probe.token_reading}")
        for act in package.spec.interventions:
            if act.type == "say":
                raise UnsupportedFeature(NAME, f"{act.id}: {act.type}")
        return package.calibrated(NAME, self.quantisation, lambda: self.weights_sha256)
        # --8<-- [end:open]

    def answer(
        self, ids: list[int], guard: Guard | None, limit: int
    ) -> Iterator[tuple[int, Float32]]:
        """Greedy tokens, each with the logits [V] that it was chosen from."""
        for _ in range(limit):
            logits = self._llama.forward(ids, guard.visit if guard else _unsteered)[-1]
            token = int(logits.argmax())
            yield token, logits
            if token == self.tokenizer.end:
                return
            ids = [*ids, token]

    def render(self, prompt: Example) -> list[int]:
        """See `LoadedModel`."""
        if prompt.images:
            raise UnsupportedFeature(NAME, "prompts with images")
        whole = self.tokenizer.render(prompt.messages(prompt.text))
        return self.tokenizer.encode((prompt.text if prompt.raw else whole) + prompt.prefill)

    # --8<-- [start:generate]
    def generate(
        self,
        prompts: Sequence[Example],
        package: SteeringPackage | None,
        *,
        max_new_tokens: int,
        ignore: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[Generation]:
        """See `LoadedModel`."""
        steered = None if package is None else self.checked(package, ignore)
        answers = []
        for i, ids in enumerate(map(self.render, prompts), 1):
            guard = None if steered is None else Guard(steered, len(ids))
            tokens = [token for token, _ in self.answer(ids, guard, max_new_tokens)]
            text = self.tokenizer.decode(tokens).decode(errors="replace")
            finish = "stop" if tokens[-1] == self.tokenizer.end else "length"
            outcome = None if guard is None else guard.outcome
            answers.append(Generation(text, tuple(tokens), finish, outcome))
            if progress:
                progress("answers", i, len(prompts))
        return answers
        # --8<-- [end:generate]

    # --8<-- [start:capture]
    def capture(
        self,
        prompts: Sequence[Example],
        readings: Sequence[Reading],
        out: NDArray[np.float32],
        progress: Progress | None = None,
    ) -> None:
        """See `LoadedModel`: out[i, k] = reading k of prompt i; NaN where there is no image."""
        for i, ids in enumerate(map(self.render, prompts)):
            states = self._states(ids)
            for k, reading in enumerate(readings):
                vector = reference.read(reading, states[self._depth(reading.site)])
                out[i, k] = np.nan if vector is None else vector
            if progress:
                progress("capture", i + 1, len(prompts))
        # --8<-- [end:capture]

    def trace(self, prompt: Example, package: SteeringPackage) -> Trace:
        """See `LoadedModel`: the rows' logits of each probe that reads tokens."""
        ids = self.render(prompt)
        states = self._states(ids)
        logits = {}
        for probe in package.spec.probes:
            if probe.token_reading is not None:
                x = reference.row_inputs(probe.token_reading, lambda s: states[self._depth(s)])
                logits[probe.id] = reference.row_logits(probe, package.tensors, x)
        pieces = (self.tokenizer.decode([id]).decode(errors="replace") for id in ids)
        return Trace(tuple(pieces), logits)

    def log_likelihoods(
        self,
        prompts: Sequence[Example],
        answer: str,
        package: SteeringPackage | None,
        ignore: Sequence[str] = (),
    ) -> NDArray[np.float64]:
        """See `LoadedModel`."""
        steered = None if package is None else self.checked(package, ignore)
        forced, rows = self.tokenizer.encode(answer), []
        for ids in map(self.render, prompts):
            visit = _unsteered if steered is None else Guard(steered, len(ids)).visit
            logits = self._llama.forward([*ids, *forced], visit)[len(ids) - 1 : -1]
            rows.append([log_probability(*pair) for pair in zip(logits, forced, strict=True)])
        return np.array(rows)

    # --8<-- [start:train]
    def states(
        self,
        prompts: Sequence[Example],
        readings: Sequence[Reading],
        sites: Sequence[LayerInput],
        *,
        exact: bool = True,
    ) -> Iterator[Captured]:
        """See `TrainableModel`: readings [K, D] and rows [T, S, D] of each prompt."""
        del exact  # always exact: there is nothing quicker here
        for i, prompt in enumerate(prompts):
            states = self._states(self.render(prompt))
            read = np.empty((len(readings), self.facts.hidden_size), np.float32)
            for k, reading in enumerate(readings):
                vector = reference.read(reading, states[self._depth(reading.site)])
                read[k] = np.nan if vector is None else vector
            rows = [states[self._depth(site)] for site in sites]
            yield Captured(i, read, np.stack(rows, 1) if rows else np.empty((0, 0, 0), np.float32))

    def answer_tokens(self, answer: str) -> list[int]:
        """See `TrainableModel`."""
        return [*self.tokenizer.encode(answer), self.tokenizer.end]

    def answer_states(
        self, prompts: Sequence[Example], answer: str, progress: Progress | None = None
    ) -> tuple[Float32, NDArray[np.int64]]:
        """See `TrainableModel`: states [N, T, D] that predict each token of an answer."""
        forced = self.answer_tokens(answer)
        states = []
        for i, ids in enumerate(map(self.render, prompts), 1):
            head_input = self._states([*ids, *forced[:-1]])[self._llama.layers + 1]
            states.append(head_input[-len(forced) :])
            if progress:
                progress("answer states", i, len(prompts))
        return np.array(states, np.float32), np.array(forced)

    def output_head(self) -> OutputHead:
        """See `TrainableModel`."""
        return OutputHead(self._llama.head, bias=None, softcap=None)
        # --8<-- [end:train]

    def _states(self, ids: list[int]) -> dict[int, Float32]:
        """Hidden states [T, D] by depth."""
        states: dict[int, Float32] = {}

        def keep(depth: int, rows: Float32) -> Float32:
            states[depth] = rows
            return rows

        self._llama.forward(ids, keep)
        return states

    def _depth(self, site: AnySite) -> int:
        if isinstance(site, HeadInput):
            return self._llama.layers + 1
        return site.layer + isinstance(site, LayerOutput)


def _unsteered(_depth: int, rows: Float32) -> Float32:
    return rows
