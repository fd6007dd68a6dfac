"""A runtime as another project adds one: its distribution names `RUNTIME` as the entry point `toy`
of the group `steerbridge.runtimes`, and every command then takes `--runtime toy`.

Its model is numpy: a row starts from a hash of the bytes so far, and each block is one matrix.
Shapes: T rows (tokens), D width, V vocabulary.
"""

from functools import partial

import numpy as np

from steerbridge import reference
from steerbridge.errors import UnsupportedFeature
from steerbridge.fingerprint import ModelFacts
from steerbridge.registry import Runtime
from steerbridge.runtime import Generation, Outcome, OutputHead, silent
from steerbridge.serving import Ended, Token, chat_messages, check_room
from steerbridge.spec import HeadInput, LayerOutput, parse_site
from steerbridge.stats import log_probability

# With imports that take long, this would be a module of its own: it is read to list the runtimes.
RUNTIME = Runtime(target="toy_runtime:ToyModel", engine="toy_runtime:ToyEngine")
NAME = "toy"  # of the entry point, and of calibrations in packages
LAYERS, WIDTH, END = 4, 128, 256  # END is the token after the 256 bytes
HEAD = LAYERS + 1  # depths: the input of each block, the output of the last one, the head


class ToyModel:
    """A `TrainableModel` (steerbridge/runtime.py) of any name; its weights follow from it."""

    runtime, quantisation = NAME, "F32"

    def __init__(self, model, **options):
        for option in options:
            raise UnsupportedFeature(NAME, f"option {option}")  # an option is never ignored
        self.facts = ModelFacts("toy", WIDTH, LAYERS, END + 1, name=str(model))
        random = np.random.default_rng([*str(model).encode()])
        self._embedding = random.normal(size=(4096, WIDTH))
        self._blocks = random.normal(size=(LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
        self._output = random.normal(size=(END + 1, WIDTH))
        self._output[[*range(32), *range(127, END)]] = 0  # answers consist of printable bytes

    def forward(self, tokens, steering=None):
        """Hidden states [T, D] by depth, as probes read them, and the logits [T, V]."""
        a, b, c = np.array([[0, 0, *tokens[:-2]][: len(tokens)], [0, *tokens[:-1]], tokens])
        recent = self._embedding[(a * 65599 + b * 257 + c) % 4096]  # of the last three bytes
        h = 3 * recent + recent.cumsum(0) / np.arange(1, len(tokens) + 1)[:, None] ** 0.5
        states = []
        for depth in range(HEAD + 1):
            states.append(h.copy())  # a probe reads a site before anything is written there
            if steering:
                steering.write(depth, h)
            if depth < LAYERS:
                h = h + np.tanh(h @ self._blocks[depth])
            elif depth == LAYERS:
                h = h / np.sqrt((h * h).mean(axis=1, keepdims=True))
        return states, h @ self._output.T

    def answer(self, tokens, steering, limit):
        """Greedy tokens, each with the logits [V] that it was chosen from."""
        for _ in range(limit):
            logits = self.forward(tokens, steering)[1][-1]
            tokens = [*tokens, int(logits.argmax())]
            yield tokens[-1], logits
            if tokens[-1] == END:
                return

    def checked(self, package, ignore):
        """The package with this runtime's thresholds; one of another model is refused."""
        package.check(self.facts, ignore)
        return package.calibrated(NAME, self.quantisation)

    def render(self, prompt):
        if prompt.images:
            raise UnsupportedFeature(NAME, "prompts with images")
        return rendered(prompt.messages(prompt.text))

    def generate(self, prompts, package, *, max_new_tokens, ignore=(), progress=silent):
        answers = []
        for tokens in map(self.render, prompts):
            steering = package and Steering(self.checked(package, ignore), self, tokens)
            answer = tuple(id for id, _ in self.answer(tokens, steering, max_new_tokens))
            text = bytes(id for id in answer if id != END).decode()
            finish = "stop" if answer[-1] == END else "length"
            answers.append(Generation(text, answer, finish, steering and steering.outcome))
        return answers

    def log_likelihoods(self, prompts, answer, package, ignore=()):
        forced, rows = list(answer.encode()), []
        for tokens in map(self.render, prompts):
            steering = package and Steering(self.checked(package, ignore), self, tokens)
            logits = self.forward([*tokens, *forced], steering)[1][len(tokens) - 1 : -1]
            rows.append([log_probability(*pair) for pair in zip(logits, forced, strict=True)])
        return np.array(rows)

    def capture(self, prompts, readings, out, progress=silent):
        for i, prompt in enumerate(prompts):
            states, _ = self.forward(self.render(prompt))
            for k, reading in enumerate(readings):
                vector = reference.read(reading, state_at(states, reading.site))
                out[i, k] = np.nan if vector is None else vector  # NaN: there is no image

    def answer_states(self, prompts, answer, progress=silent):
        forced = [*answer.encode(), END]
        heads = [self.forward([*self.render(p), *forced[:-1]])[0][HEAD] for p in prompts]
        return np.array([h[-len(forced) :] for h in heads], np.float32), np.array(forced)

    def output_head(self):
        return OutputHead(self._output.astype(np.float32), bias=None, softcap=None)


def rendered(messages):
    return list("".join(f"{message['content']}\n> " for message in messages).encode())


def state_at(states, site):
    head = isinstance(site, HeadInput)
    return states[HEAD if head else site.layer + isinstance(site, LayerOutput)]


class Steering:
    """A package at work on one prompt: what it decides (`outcome`), and what it writes."""

    def __init__(self, package, model, tokens):
        self._tensors, self._prompt_end = package.tensors, len(tokens) - 1
        self._actions, decided = (), None
        while decided != self._actions:  # what one rule writes, a probe behind it may read
            decided, at = self._actions, partial(state_at, model.forward(tokens, self)[0])
            verdicts = tuple(reference.judge(p, self._tensors, at) for p in package.spec.probes)
            self._actions = reference.actions(package.spec, verdicts)
        self.outcome = Outcome(verdicts, tuple(dict.fromkeys(a.rule for a in self._actions)))

    def write(self, depth, h):
        """Let what acts at a depth change its hidden states [T, D]."""
        site = parse_site("head_input" if depth == HEAD else f"layer_input[{depth}]")
        for action in self._actions:
            first = 0 if action.intervention.position == "all_positions" else self._prompt_end
            h[first:] = reference.steer([action], self._tensors, site, h[first:])


class ToyEngine:
    """An `Engine` (steerbridge/serving.py); the class is its own `EngineOpener`."""

    def __init__(self, model, package, *, context, ignore=(), **options):
        self._model = ToyModel(model, **options)
        self.package = self._model.checked(package, ignore)
        self.name, self.context, self.vision = self._model.facts.name, context, False

    def answer(self, question, sampling, emit):
        if question.images or sampling.temperature or sampling.repetition_penalty != 1:
            raise UnsupportedFeature(NAME, "images and sampling", "temperature 0")
        tokens = rendered(chat_messages(question)) or list(question.prompt.encode())
        check_room(len(tokens), sampling, self.context)
        steering = Steering(self.package, self._model, tokens) if question.steered else None
        outcome, finish = steering and steering.outcome, "length"
        for id, logits in self._model.answer(tokens, steering, sampling.max_new_tokens):
            text, finish = (b"", "eos_token") if id == END else (bytes([id]), finish)
            if not emit(Token(id, text, id == END, log_probability(logits, id)), outcome):
                return Ended("stopped", len(tokens), outcome)
        return Ended(finish, len(tokens), outcome)
