"""Requests that a steered `Llama` refuses, and that it fails closed."""

from __future__ import annotations

import pytest

import helpers
from helpers import IMAGE, reading

llama_cpp = pytest.importorskip("llama_cpp")
from smollm2_llama import answer, tokens  # noqa: E402
from steerbridge.errors import (  # noqa: E402
    ModelMismatch,
    SteeringFailed,
    UnsupportedFeature,
)
from steerbridge.fingerprint import ModelFacts  # noqa: E402
from steerbridge_llama_cpp import steer  # noqa: E402

pytestmark = pytest.mark.llama_cpp


def test_a_lost_hook_stops_generation(llama, make_package):
    """Covers a graph outside an announced batch, and a batch whose nodes the hook does not see."""
    with steer(llama, make_package(True)) as session:
        stream = llama.generate(tokens(llama), temp=0.0)
        next(stream)
        llama._batch.set_batch(batch=[300], n_past=llama.n_tokens, logits_all=False)
        llama_cpp.llama_decode(llama.ctx, llama._batch.batch)  # behind the session's back
        with pytest.raises(SteeringFailed):
            next(stream)
        with pytest.raises(SteeringFailed, match="reset"):
            llama.eval([300])
        fine = answer(llama, tokens(llama))  # a new request starts afresh
        assert session.outcomes[0].fired
        llama._ctx.native.pause(True)
        assert llama._ctx.native.is_paused
        llama._ctx.native.pause(False)
        assert answer(llama, tokens(llama)) == fine


def test_a_package_for_another_model_is_refused(llama, make_package):
    other = helpers.package(ModelFacts("llama", 576, 31, 49152, name="deeper"))
    before = answer(llama, tokens(llama))
    with pytest.raises(ModelMismatch, match="num_layers"):
        steer(llama, other)
    assert answer(llama, tokens(llama)) == before  # on a fresh context, and it knows


def test_images_are_refused_before_anything_is_evaluated(llama, make_package):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with steer(llama, make_package(True)), pytest.raises(UnsupportedFeature, match="image_url"):
        llama.create_chat_completion([{"role": "user", "content": [image]}])


def test_sites_and_readings_that_llama_cpp_lacks_are_refused(llama, make_package):
    with pytest.raises(UnsupportedFeature, match=r"layer_input\[0\]"):
        steer(llama, make_package(True, [reading("layer_input[0]")]))
    with steer(llama, make_package(True, [reading("layer_input[9]", IMAGE)])) as session:
        answer(llama, tokens(llama), 1)  # no image: zeros, as the spec says
        assert session.outcomes[0].verdicts[0].score == 0.0
    early = reading("layer_input[9]", {"type": "prompt_end", "offset": -40})
    with steer(llama, make_package(True, [early])) as session:
        answer(llama, tokens(llama), 1)
        assert "shorter" in session.outcomes[0].verdicts[0].unjudged
        assert session.outcomes[0].rules
