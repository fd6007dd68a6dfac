"""Packages and prompts of the conformance kit: guards that fire on some prompts and not on others.

A case is a package for the tiny model and prompts of which its rules hold for about half. Prompts
are chosen so that no right answer hangs on rounding: scores keep a distance from the threshold,
and the best logit of every step from the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np

from steerbridge import reference
from steerbridge.package import SteeringPackage, parse
from steerbridge.spec import (
    SPEC_VERSION,
    CosineProbe,
    LinearProbe,
    MlpProbe,
    Probe,
    Softmax,
    tensor_shapes,
)
from steerbridge.tensors import Tensor
from steerbridge.testing.model import EOS, LAYERS, MARK, TinyModel
from steerbridge.testing.oracle import Expected, Guard, answer, plain
from steerbridge.testing.vision import PICTURES

Json = dict[str, Any]

NEW: Final = 8  # tokens of an answer, unless a shape asks for more
MARGIN: Final = 0.02  # between the two best logits
DISTANCE: Final = 0.02  # of a score from the threshold
RANK: Final = 4
PROMPTS: Final = 48
_FORMS: Final = ("pt", "tp", "tpt", "ppt", "p", "t")  # pictures and texts
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz ,.?!"


def site(text: str) -> Json:
    """`layer_input[2]` as JSON."""
    stream, _, layer = text.rstrip("]").partition("[")
    return {"stream": stream, **({"layer": int(layer)} if layer else {})}


def reading(at: str, position: str = "prompt_end", offset: int = 0) -> Json:
    """A reading as JSON."""
    return {
        "site": site(at),
        "position": {"type": position, **({"offset": offset} if offset else {})},
    }


END: Final = (reading("layer_input[2]"),)


def linear(
    link: str = "sigmoid",
    comparator: str = ">",
    readings: Sequence[Json] = END,
    id: str = "p",
    **more: Any,
) -> Json:
    """A linear probe; its threshold is set from the prompts."""
    return {
        "id": id,
        "type": "linear",
        "readings": list(readings),
        "weight": f"{id}.weight",
        "bias": 0.25,
        "link": link,
        "comparator": comparator,
        "threshold": 0.0,
        **more,
    }


def rows_of(
    *sites: str, scope: str = "both", window: int = 4, skip: int = 1, rows: str = "all"
) -> Json:
    """A token reading as JSON."""
    chosen = sites or ("layer_input[1]", "layer_input[2]")
    return {
        "sites": [site(at) for at in chosen],
        "scope": scope,
        "window": window,
        "skip": skip,
        "rows": rows,
    }


def of_rows(probe: Json, **reading: Any) -> Json:
    """A probe that reads tokens in place of what it read."""
    kept = {key: value for key, value in probe.items() if key != "readings"}
    return {**kept, "token_reading": rows_of(*reading.pop("sites", ()), **reading)}


def says(text: str = "No.", id: str = "s", **more: Any) -> Json:
    """A forced answer."""
    return {"id": id, "type": "say", "text": text, "tokens": [*text.encode(), EOS], **more}


def mlp(activation: str = "relu", output: Json | None = None, layers: int = 2) -> Json:
    """An MLP probe, softmax over two classes unless `output` says otherwise."""
    softmax = {"type": "softmax", "classes": ["harmful", "harmless"], "harmful": "harmful"}
    return {
        "id": "p",
        "type": "mlp",
        "readings": list(END),
        "layers": [{"weight": f"p.{i}.weight", "bias": f"p.{i}.bias"} for i in range(layers)],
        "activation": activation,
        "output": output or softmax,
        "comparator": ">",
        "threshold": 0.0,
    }


def cosine(squash: str = "tanh") -> Json:
    """A probe of activation steering's conditions (CAST)."""
    return {
        "id": "p",
        "type": "cosine",
        "readings": list(END),
        "direction": "p.direction",
        "squash": squash,
        "comparator": ">",
        "threshold": 0.0,
    }


def head(form: str = "low_rank", id: str = "h") -> Json:
    """A head matrix, strong enough to change every answer."""
    parts = {"low_rank": {"u": f"{id}.u", "v": f"{id}.v"}, "dense": {"matrix": f"{id}.matrix"}}
    return {
        "id": id,
        "type": "head_matrix",
        "position": "from_prompt_end",
        "eps": 1.0,
        "weight": {"form": form, **parts[form]},
    }


def at_layers(
    type: str, *outputs: int, alpha: float, position: str = "from_prompt_end", id: str = "v"
) -> Json:
    """`add_vector` or `project_out` at the outputs of these blocks."""
    targets = [{"site": site(f"layer_output[{k}]"), "vector": f"{id}.{k}"} for k in outputs]
    return {"id": id, "type": type, "position": position, "alpha": alpha, "targets": targets}


def rule(
    probes: Sequence[str] | None, acts: Sequence[str], kind: str = "any", id: str = "r", **more: Any
) -> Json:
    """A rule; `probes` None: unconditional."""
    return {
        "id": id,
        "condition": None if probes is None else {"type": kind, "probes": list(probes)},
        "interventions": list(acts),
        "strength": {"type": "constant", "value": 1.0},
        **more,
    }


@dataclass(frozen=True)
class Case:
    """A package for the tiny model, and prompts that its rules hold for, and others.

    Args:
        new: tokens of an answer after which it is said which prompts these are.
    """

    model: TinyModel
    package: SteeringPackage
    prompts: tuple[str, ...]
    new: int = 1
    _answers: dict[tuple[str, int], Expected] = field(default_factory=dict, compare=False)

    @cached_property
    def fired(self) -> list[str]:
        """Prompts for which a rule holds."""
        return [p for p in self.prompts if self.holds(p)]

    @cached_property
    def quiet(self) -> list[str]:
        """Prompts for which none holds."""
        return [p for p in self.prompts if not self.holds(p)]

    def holds(self, prompt: str) -> bool:
        """Whether a rule holds for a prompt."""
        outcome = self.expected(prompt, self.new).outcome
        return outcome is not None and bool(outcome.rules)

    def expected(self, prompt: str, new: int = NEW) -> Expected:
        """The right answer to a prompt, computed once."""
        if (prompt, new) not in self._answers:
            ids = self.model.encode(prompt)
            self._answers[prompt, new] = answer(self.model, self.package, ids, new)
        return self._answers[prompt, new]

    def sound(self, prompt: str, new: int = NEW) -> bool:
        """True if rounding cannot change the right answer, and steering is seen in its tokens."""
        expected = self.expected(prompt, new)
        if expected.distance <= DISTANCE or expected.margin < MARGIN or not expected.settled:
            return False
        assert expected.outcome is not None
        unsteered = plain(self.model, self.model.encode(prompt), new)
        differs = unsteered.tokens != expected.tokens
        return unsteered.margin > MARGIN and differs == bool(expected.outcome.rules)


def case(
    model: TinyModel,
    probes: Sequence[Json] = (linear(),),
    interventions: Sequence[Json] = (head(),),
    rules: Sequence[Json] | None = None,
    seed: int = 0,
    count: int = PROMPTS,
    prompts: Sequence[str] = (),
) -> Case:
    """A case with random tensors; thresholds are set so that about half of the prompts fire.

    Args:
        prompts: what to choose from; none: `count` random texts.
    """
    prompts = prompts or prompts_of(seed, count)
    scopes = [p.get("token_reading", {}).get("scope", "prompt") for p in probes]
    new = 1 if set(scopes) <= {"prompt"} else NEW
    if rules is None:
        rules = [rule([p["id"] for p in probes], [i["id"] for i in interventions])]
    spec = parse(
        {
            "spec_version": SPEC_VERSION,
            "name": "conformance",
            "base_model": model.facts.info().model_dump(exclude_unset=True),
            "probes": list(probes),
            "interventions": list(interventions),
            "rules": list(rules),
        }
    )
    tensors = _tensors(spec, np.random.default_rng(seed))
    package = _centred(model, SteeringPackage(spec, tensors), prompts, new)
    package = _with_thresholds(model, package, prompts, new)
    whole = Case(model, package, tuple(prompts), new)
    return Case(model, package, tuple(p for p in prompts if whole.sound(p)), new)


def marked(model: TinyModel, window: int) -> Case:
    """A case whose probe finds `MARK`, which is in no prompt of `prompts_of`: a linear map of two
    blocks' outputs, fitted to random texts."""
    probe = of_rows(linear(), scope="prompt", window=window)
    made = case(model, [probe], seed=31, count=2)
    rng = np.random.default_rng(32)
    letters = list(_LETTERS + MARK * 4)
    ids = [model.encode("".join(rng.choice(letters, size=40))) for _ in range(60)]
    states = [model.forward(row)[0] for row in ids]
    x = np.concatenate([np.hstack([s[1], s[2]])[1:] for s in states]).astype(np.float64)
    y = np.where(np.concatenate([row[1:] for row in ids]) == ord(MARK), 1.0, -1.0)
    share = (y > 0).mean()
    by_class = np.where(y > 0, 0.5 / share, 0.5 / (1 - share))[:, None]
    inputs = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    system = inputs.T @ (by_class * inputs) + 1e-6 * len(x) * np.eye(inputs.shape[1])
    fitted = 4 * np.linalg.solve(system, inputs.T @ (by_class[:, 0] * y))
    # Between what texts without marks reach now and then, and what marks fall short of.
    found = inputs @ fitted
    middle = (np.quantile(found[y < 0], 0.999) + np.quantile(found[y > 0], 0.05)) / 2
    [known] = made.package.spec.probes
    package = made.package.replace(
        probes=(known.replace(bias=float(fitted[-1] - middle), threshold=0.5),),
        tensors={**made.package.tensors, "p.weight": Tensor.of(fitted[:-1].astype(np.float32))},
    )
    return Case(model, package, ())


def prompts_of(seed: int, count: int = PROMPTS) -> list[str]:
    """Random texts of 3 to 30 bytes."""
    rng = np.random.default_rng([seed, 7])
    lengths = rng.integers(3, 31, size=count)
    return ["".join(rng.choice(list(_LETTERS), size=n)) for n in lengths]


def with_pictures(seed: int, count: int = PROMPTS) -> list[str]:
    """Texts with a picture before, behind or between them, with several, alone, or with none."""
    forms, shown = itertools.cycle(_FORMS), itertools.cycle(PICTURES)
    made = []
    for text, form in zip(prompts_of(seed, count), forms, strict=False):
        made.append("".join(next(shown) if part == "p" else text for part in form))
    alone = [*PICTURES, *map("".join, itertools.permutations(PICTURES, 2))]
    return list(dict.fromkeys([*made, *alone]))


def _tensors(spec: Any, rng: np.random.Generator) -> dict[str, Tensor]:
    """Random tensors of the right shapes; one scale for every kind."""
    tensors: dict[str, Tensor] = {}
    free: dict[str, int] = {}
    for where, name, shape in tensor_shapes(spec):
        sizes = [free.setdefault(n, RANK) if isinstance(n, str) else n for n in shape]
        values = rng.normal(size=sizes) / (sizes[-1] ** 0.5 if len(sizes) > 1 else 1)
        if "input_scale" in where:
            values = np.abs(values) + 0.5
        tensors[name] = Tensor.of(values.astype(np.float32))
    return tensors


def _centred(
    model: TinyModel, package: SteeringPackage, prompts: Sequence[str], new: int
) -> SteeringPackage:
    """Logits of linear and MLP probes scaled to a deviation of 1.5, those of linear ones moved to
    0 too: there a sigmoid tells them apart."""
    tensors, probes = dict(package.tensors), []
    for probe in package.spec.probes:
        if not isinstance(probe, CosineProbe):
            y = np.array([_logit(model, package, probe, p, new) for p in prompts])
            y = y[np.isfinite(y)]
            factor = np.float32(1.5 / y.std())
            last = probe.layers[-1] if isinstance(probe, MlpProbe) else probe
            tensors[last.weight] = Tensor.of(tensors[last.weight].float32() * factor)
            if isinstance(probe, LinearProbe):
                probe = probe.replace(bias=float((probe.bias - np.median(y)) * factor))
            elif probe.token_reading is not None:
                bias = probe.layers[-1].bias
                scaled = package.replace(tensors=tensors)
                y = np.array([_logit(model, scaled, probe, p, new) for p in prompts])
                tensors[bias] = _shifted(probe, tensors[bias], -np.median(y))
        probes.append(probe)
    return package.replace(tensors=tensors, probes=tuple(probes))


def _shifted(probe: MlpProbe, bias: Tensor, by: float) -> Tensor:
    """The bias of a last layer with which the logit of harm is so much higher."""
    values = bias.float32().copy()
    if isinstance(probe.output, Softmax):
        values[probe.output.classes.index(probe.output.harmful)] += by
    else:
        values[0] += by if probe.output.harmful_when == "high" else -by
    return Tensor.of(values)


def _logit(
    model: TinyModel, package: SteeringPackage, probe: Probe, prompt: str, new: int
) -> float:
    """The probe's logit, the difference of its two, or its highest running score."""
    ids = model.encode(prompt)
    if probe.token_reading is not None:
        quiet = package.replace(rules=())
        guard = Guard(model, quiet, ids)
        answer(model, quiet, ids, new, guard)
        return guard.highest.get(probe.id, np.nan)
    states, _ = model.forward(ids)
    depth, images = package.spec.depth, model.of_picture(ids)
    x = reference.probe_input(probe, package.tensors, lambda site: states[depth(site)], images)
    y = reference.logits(probe, package.tensors, x)[0]
    return float(y[0] - y[1]) if len(y) == 2 else float(y[0])


def _scores(
    model: TinyModel, package: SteeringPackage, ids: Sequence[int], new: int
) -> dict[str, float]:
    """Scores of a prompt and its unsteered answer, by probe."""
    quiet = package.replace(rules=())
    outcome = answer(model, quiet, ids, new).outcome
    assert outcome is not None
    return {verdict.probe: verdict.score for verdict in outcome.verdicts}


def _with_thresholds(
    model: TinyModel, package: SteeringPackage, prompts: Sequence[str], new: int
) -> SteeringPackage:
    """Every threshold in the widest gap between the middle scores of the prompts."""
    scores: dict[str, list[float]] = {p.id: [] for p in package.spec.probes}
    for prompt in prompts:
        for id, score in _scores(model, package, model.encode(prompt), new).items():
            scores[id].append(score)
    thresholds = {id: _gap(values) for id, values in scores.items()}
    probes = tuple(p.replace(threshold=thresholds[p.id]) for p in package.spec.probes)
    return package.replace(probes=probes)


def _gap(scores: Sequence[float]) -> float:
    known = np.sort([s for s in scores if np.isfinite(s)])
    middle = known[len(known) * 3 // 8 : len(known) * 5 // 8 + 1]
    at = int(np.argmax(np.diff(middle)))
    return float((middle[at] + middle[at + 1]) / 2)


def means(site_name: str = "layer_input[2]") -> tuple[Json, ...]:
    """A mean over the prompt."""
    return (reading(site_name, "prompt_mean"),)


LAST: Final = f"layer_input[{LAYERS}]"


def standard(model: TinyModel) -> Mapping[str, Case]:
    """The cases that shapes use again and again: a head, layers, a mean, an earlier token."""
    vector = at_layers("add_vector", 2, alpha=2.0)
    return {
        "head": case(model),
        "layers": case(model, interventions=[vector], seed=1),
        "mean": case(model, probes=[linear(readings=means())], seed=2),
        "both": case(
            model,
            probes=[linear(readings=(*END, *means("layer_input[1]")))],
            interventions=[head(), vector],
            seed=3,
        ),
        "earlier": case(
            model, probes=[linear(readings=(reading("layer_input[2]", offset=-2),))], seed=4
        ),
    }


def pictured(model: TinyModel) -> Mapping[str, Case]:
    """The cases of prompts with pictures: a head, layers, a mean, a mean over picture rows."""
    vector = at_layers("add_vector", 2, alpha=2.0)
    of_pictures = linear(
        readings=(reading("layer_input[2]", "image_mean"),), input_mean="p.mean"
    )  # texts have no such rows, and are given the probe's input mean
    return {
        "head": case(model, seed=5, prompts=with_pictures(5)),
        "layers": case(model, interventions=[vector], seed=6, prompts=with_pictures(6)),
        "mean": case(model, [linear(readings=means())], seed=7, prompts=with_pictures(7)),
        "pictures": case(model, [of_pictures], seed=8, prompts=with_pictures(8)),
    }
