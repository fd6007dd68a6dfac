"""Sessions of both adapters have the public members of `Attachment`. That of transformers has
`request` beside them, for loops of forward calls; that of llama.cpp `between_batches`, which may
end a prompt."""

from __future__ import annotations

import pytest

import helpers
from steerbridge.runtime import Attachment

MEMBERS = {"apply", "remove", "package", "outcomes", "unchecked", "current"}


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def test_the_common_base():
    assert public(Attachment) == MEMBERS
    assert all(getattr(Attachment, name).__doc__ for name in MEMBERS)


@pytest.mark.hf
def test_of_transformers():
    torch = pytest.importorskip("torch")
    import steerbridge_hf
    from steerbridge_hf.sites import facts

    model = helpers.tiny()
    package = helpers.package(facts(model))
    ids = torch.tensor([[5, 9, 13]])
    members = MEMBERS | {"request"}
    assert public(steerbridge_hf.Session) == members
    with steerbridge_hf.steer(model, package) as session, torch.no_grad():
        assert public(session) == members
        assert session.current is None
        assert session.outcomes == ()
        assert session.package.spec == package.spec
        model.generate(input_ids=ids, max_new_tokens=2)
        assert len(session.outcomes) == 1
        assert session.current is None
    assert len(session.outcomes) == 1


@pytest.mark.llama_cpp
def test_the_class_of_llama_cpp():
    pytest.importorskip("llama_cpp")
    import steerbridge_llama_cpp

    assert public(steerbridge_llama_cpp.Session) == MEMBERS | {"between_batches"}


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_of_llama_cpp(smollm2_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    import steerbridge_llama_cpp
    from steerbridge_llama_cpp.facts import facts

    llama = llama_cpp.Llama(str(smollm2_path), n_ctx=128, verbose=False)
    before = set(vars(llama))
    package = helpers.package(facts(llama._model))
    prompt = llama.tokenize(b"The three colours of the flag are")
    with steerbridge_llama_cpp.steer(llama, package) as session:
        assert public(session) == MEMBERS | {"between_batches"}
        assert session.current is None
        assert session.outcomes == ()
        assert session.package.spec == package.spec
        answer = llama.generate(prompt, temp=0.0)
        next(answer)
        assert session.current is session.outcomes[0]
        later = llama.generate([*prompt[:-1], 28], temp=0.0)
        assert session.current is session.outcomes[0]  # `later` has not started
        next(later)
        assert session.current is session.outcomes[0]
        later.close()
        assert session.current is None
    assert len(session.outcomes) == 1
    assert set(vars(llama)) == before
    llama.close()
