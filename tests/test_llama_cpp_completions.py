"""Methods of a steered `Llama`: completions, sampling, log probabilities, embeddings."""

from __future__ import annotations

import pytest

llama_cpp = pytest.importorskip("llama_cpp")
from smollm2_llama import CHAT, TEXT, new_llama  # noqa: E402
from steerbridge_llama_cpp import SteeredLlama, steer  # noqa: E402

pytestmark = pytest.mark.llama_cpp


def test_completions_say_what_was_decided(llama, make_package):
    options = {"max_tokens": 5, "temperature": 0.0}
    with steer(llama, make_package(True)):
        whole = llama(TEXT, **options)
        chunks = list(llama.create_completion(TEXT, stream=True, **options))
        assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
        chat = llama.create_chat_completion(CHAT, **options)
        stream = list(llama.create_chat_completion(CHAT, stream=True, **options))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in stream)
    assert text == chat["choices"][0]["message"]["content"]
    for answer in (whole, chat, *chunks, *stream):
        assert answer["steering"]["fired"]
        assert answer["steering"]["rules"] == ["r"]
        assert answer["steering"]["verdicts"][0]["probe"] == "p"


def test_sampling_options_act_on_steered_logits(llama, make_package):
    """Grammar, logit bias, stop words and seed apply to the logits that the head has changed."""
    from llama_cpp import LlamaGrammar

    digits = LlamaGrammar.from_string("root ::= [0-9]+", verbose=False)
    options = {"max_tokens": 6, "temperature": 0.0}
    with steer(llama, make_package(True)) as session:
        text = llama(TEXT, grammar=digits, **options)["choices"][0]["text"]
        assert text
        assert set(text) <= set("0123456789")
        token = llama.tokenize(b" blue", add_bos=False)[0]
        biased = llama(TEXT, logit_bias={str(token): 1000.0}, **options)["choices"][0]["text"]
        assert biased == " blue" * 6
        free = llama(TEXT, **options)["choices"][0]["text"]
        stop = free[2:6]
        assert llama(TEXT, stop=[stop], **options)["choices"][0]["text"] == free[: free.index(stop)]
        hot = {"max_tokens": 6, "temperature": 1.2, "seed": 7}
        assert llama(TEXT, **hot)["choices"] == llama(TEXT, **hot)["choices"]
        assert session.outcomes[0].fired


def test_log_probabilities_are_those_of_steered_logits(smollm2_path, make_package):
    every = new_llama(smollm2_path, logits_all=True)
    options = {"max_tokens": 3, "temperature": 0.0, "logprobs": 2}
    plain = every(TEXT, **options)["choices"][0]
    with steer(every, make_package(False)):
        assert every(TEXT, **options)["choices"][0] == plain
    with steer(every, make_package(True)):
        steered = every(TEXT, **options)["choices"][0]
    assert steered["logprobs"]["token_logprobs"] != plain["logprobs"]["token_logprobs"]


def test_embeddings_are_those_of_the_model(smollm2_path, make_package):
    """Embeddings are not steered, as nothing is generated; the next completion is."""
    texts = ["a cat", "a somewhat longer text about cats"]
    embedding = new_llama(smollm2_path, embedding=True, pooling_type=1)
    want = embedding.embed(texts)
    with steer(embedding, make_package(True)):
        assert embedding.embed(texts) == want
        assert embedding(TEXT, max_tokens=3)["steering"]["fired"]
        assert embedding.create_embedding("a cat")["data"][0]["embedding"] == want[0]


def test_steered_llama_is_the_short_form(smollm2_path, make_package, tmp_path):
    path = make_package(True).save(tmp_path / "guard")
    told = []
    short = SteeredLlama(
        str(smollm2_path), package=path, on_outcome=told.append, n_ctx=128, verbose=False
    )
    assert short(TEXT, max_tokens=2)["steering"]["fired"]
    assert told[0][0].fired
    short.steering_session.remove()
    assert type(short) is llama_cpp.Llama
    assert "steering" not in short(TEXT, max_tokens=2)
