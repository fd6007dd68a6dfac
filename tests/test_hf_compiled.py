"""Models in transformers that are compiled before or after a package is attached."""

from __future__ import annotations

import pytest

import helpers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from steerbridge.errors import (  # noqa: E402
    HookLost,
)
from steerbridge_hf import steer  # noqa: E402
from steerbridge_hf.sites import facts  # noqa: E402
from tiny_requests import PROMPTS, generate, half_fired  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("no_grad")]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_models_are_steered_or_stop(when):
    model = helpers.tiny()
    package, fired = half_fired(model)
    with steer(model, package):
        want = generate(model)
    torch.compiler.reset()
    if when == "after":
        model.forward = torch.compile(model.forward, backend="eager")
        generate(model)
        with steer(model, package) as session:
            assert generate(model) == want
    else:
        with steer(model, package) as session:
            model.forward = torch.compile(model.forward, backend="eager")
            assert generate(model) == want
    assert [o.fired for o in session.outcomes] == fired


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "in place", "forward"])
def test_code_compiled_before_is_traced_again(how):
    """A direct call of an already traced model is steered, and unsteered again after `remove`."""
    model = helpers.tiny()
    package = helpers.package(facts(model), probes=[helpers.linear_probe(threshold=-1e9)])
    ids = torch.tensor([PROMPTS[0]])
    compiled = model
    if how == "module":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        plain = compiled(ids).logits
        with steer(model, package) as session:
            with session.request(torch.ones_like(ids)):
                steered = compiled(ids).logits
            assert session.outcomes[0].fired
        assert not torch.equal(steered[:, -1], plain[:, -1])
        assert torch.equal(steered[:, :-1], plain[:, :-1])
        assert torch.equal(compiled(ids).logits, plain)


def test_a_compiled_call_without_hooks_stops_generation():
    model = helpers.tiny()
    package, _ = half_fired(model)
    plain = model.forward
    with steer(model, package) as session:
        for handle in session._handles:
            handle.remove()
        model.forward = plain
        with pytest.raises(HookLost):
            generate(model)
