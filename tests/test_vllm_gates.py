"""The gates of the vLLM plugin under drawn schedules of a stand-in engine, against the oracle."""

from __future__ import annotations

import random
from functools import cache, partial

import pytest

pytest.importorskip("torch")

from paged import Engine, Request, run
from steerbridge.errors import HookLost
from steerbridge.testing.cases import (
    NEW,
    at_layers,
    case,
    head,
    linear,
    means,
    mlp,
    of_rows,
    reading,
    rule,
    says,
    standard,
)
from steerbridge.testing.kit import compare_outcomes
from steerbridge.testing.model import TinyModel
from steerbridge_vllm.given import reaches_back

pytestmark = pytest.mark.hf
MODEL = TinyModel()
WATCHED = of_rows(linear(id="w"), scope="answer", skip=0)
VECTOR = at_layers("add_vector", 2, alpha=6.0)
BY_SCORE = {"type": "score", "probe": "p", "scale": 1.5}
LAYERED = ("layers", "both", "rows, layers")


@cache
def standard_cases():
    return standard(MODEL)


def standard_case(name):
    return standard_cases()[name]


CASES = {
    **{
        name: partial(standard_case, name) for name in ("head", "layers", "mean", "both", "earlier")
    },
    "rows": partial(case, MODEL, [of_rows(linear(), scope="prompt")], seed=30),
    "a long window": partial(case, MODEL, [of_rows(mlp(), scope="prompt", window=40)], seed=31),
    "answers": partial(case, MODEL, [of_rows(linear(), scope="answer", skip=0)], seed=32, count=64),
    "prompts and answers": partial(case, MODEL, [of_rows(linear())], seed=33),
    "rows, layers": partial(
        case, MODEL, [of_rows(linear())], interventions=[VECTOR], seed=34, count=64
    ),
    "mean and answers": partial(
        case, MODEL, [linear(readings=means()), WATCHED], seed=35, count=96
    ),
    "all of two": partial(
        case, MODEL, [linear(), WATCHED], rules=[rule(["p", "w"], ["h"], "all")], seed=36, count=96
    ),
    "says": partial(case, MODEL, [linear()], interventions=[says()], seed=37),
    "says later": partial(case, MODEL, [of_rows(linear())], interventions=[says()], seed=38),
    "says behind a head": partial(
        case,
        MODEL,
        [linear(), WATCHED],
        interventions=[head(), says()],
        rules=[rule(["p"], ["h"]), rule(["w"], ["s"], id="s")],
        seed=39,
        count=96,
    ),
    "strength by its score": partial(
        case,
        MODEL,
        [of_rows(linear(), window=1)],
        rules=[rule(["p"], ["h"], strength=BY_SCORE)],
        seed=40,
    ),
    "head input": partial(case, MODEL, [linear(readings=(reading("head_input"),))], seed=41),
}


# What is written before the head would be shared: refused with a prefix cache.
ALONE = (*LAYERED, "mean", "answers", "says later")
QUICK = ("head", "rows", "says")
BOTH = [(name, True) for name in CASES if name not in LAYERED] + [(name, False) for name in ALONE]
MARKED = [pytest.param(*one, marks=[] if one[0] in QUICK else pytest.mark.slow) for one in BOTH]


@pytest.mark.parametrize(("name", "cached"), MARKED)
def test_every_schedule_gives_the_oracles_answers(name, cached):
    guard = CASES[name]()
    draw = random.Random(f"{name} {cached}")
    engine = Engine(MODEL, guard.package, cached=cached, back=reaches_back(guard.package.spec))
    prompts = [*guard.prompts[:24], *guard.prompts[:8]]
    requests = [Request(f"r{i}", MODEL.encode(prompt), NEW) for i, prompt in enumerate(prompts)]
    run(engine, requests, draw, together=1 if name in LAYERED else 5)
    for prompt, request in zip(prompts, requests, strict=True):
        compare(guard, prompt, request)
    assert engine.gates.live == 0


def compare(guard, prompt, request):
    """An answer with the oracle's."""
    want = guard.expected(prompt, NEW)
    tokens = want.certain(0.005)
    assert tuple(request.answer)[: len(tokens)] == tokens, prompt
    compare_outcomes(prompt, request.outcome, want.outcome, 1e-4)


@pytest.mark.parametrize(
    "names", [("mean", "rows"), ("head", "says later", "mean"), ("earlier", "answers")]
)
def test_each_request_has_its_package(names):
    """Prompts of all, each asked with every package: prefixes are shared between them."""
    guards = [CASES[name]() for name in names]
    draw = random.Random(" ".join(names))
    back = max(reaches_back(guard.package.spec) for guard in guards)
    engine = Engine(MODEL, *(guard.package for guard in guards), cached=True, back=back)
    asked = [
        (guard, k, prompt)
        for k, guard in enumerate(guards)
        for other in guards
        for prompt in other.prompts[:12]
        if guard.sound(prompt, NEW)
    ]
    draw.shuffle(asked)
    requests = [
        Request(f"r{i}", MODEL.encode(prompt), NEW, package=k)
        for i, (_, k, prompt) in enumerate(asked)
    ]
    run(engine, requests, draw, together=6)
    for (guard, _, prompt), request in zip(asked, requests, strict=True):
        compare(guard, prompt, request)
    assert {request.package for request in requests} == set(range(len(guards)))
    assert engine.gates.live == 0


def test_a_package_that_is_not_there_ends_it():
    engine = Engine(MODEL, CASES["head"]().package, cached=True)
    with pytest.raises(HookLost, match="no package '1'"):
        engine.place(Request("r", MODEL.encode("Hello"), NEW, package=1))
