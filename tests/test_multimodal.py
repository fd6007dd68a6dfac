"""Prompts with images: the demo model steered in llama.cpp (libmtmd) and in transformers."""

from __future__ import annotations

import base64
import io
import random

import numpy as np
import pytest

import helpers
from helpers import IMAGE, MEAN, head, linear_probe, reading, rule

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
llama_cpp = pytest.importorskip("llama_cpp")

from llama_cpp.llama_chat_format import MTMDChatHandler  # noqa: E402

from steerbridge.data import Example  # noqa: E402
from steerbridge.errors import (  # noqa: E402
    DataError,
    RowMappingLost,
    SteeredCache,
    SteeringFailed,
    UnsupportedFeature,
)
from steerbridge_demo import drawings, open_hf  # noqa: E402
from steerbridge_llama_cpp import open_model, steer  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.llama_cpp]

SIZES = [(128, 128), (90, 120), (300, 200), (64, 64), (250, 100)]
QUESTION = "What is in the picture?"
AT = [
    reading("layer_input[18]"),
    reading("layer_input[8]", MEAN),
    reading("layer_input[8]", IMAGE),
]
VECTOR = helpers.add_vector(25, alpha=400.0)


@pytest.fixture(scope="module")
def hf():
    return open_hf()


@pytest.fixture(scope="module")
def f32(demo_files):
    files = demo_files
    options = {"n_ctx": 512, "type_k": 0, "type_v": 0, "n_batch": 64, "n_ubatch": 32}
    made = open_model(files["text_f32"], mmproj=files["mmproj_f32"], **options)
    yield made
    made.llama.close()


@pytest.fixture(scope="module")
def plain(demo_files):
    """A `Llama` of the shipped model, with the chat handler that a user would set."""
    files = demo_files
    handler = MTMDChatHandler(str(files["mmproj_f32"]), verbose=False)
    made = llama_cpp.Llama(
        str(files["text_q4_1"]), chat_handler=handler, n_ctx=512, verbose=False, seed=1
    )
    yield made
    made.close()


@pytest.fixture(autouse=True)
def detached(request):
    yield
    for name in {"plain", "f32"} & set(request.fixturenames):
        opened = request.getfixturevalue(name)
        llama = getattr(opened, "llama", opened)
        if (session := llama.__dict__.get("steering_session")) is not None:
            session.remove()  # a test failed inside its `with`: spare the others
        llama.set_cache(None)


def drawn(size=(128, 128), seed=0):
    return drawings.draw(drawings.sample(random.Random(seed), size=size))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Questions about pictures of several sizes, one with two of them, one with none."""
    folder = tmp_path_factory.mktemp("pictures")
    examples = [Example("How are you?", False)]
    for i, size in enumerate(SIZES):
        path = folder / f"{i}.png"
        drawn(size, i).save(path)
        examples.append(Example(QUESTION, False, images=(path,)))
    both = (folder / "0.png", folder / "1.png")
    return [*examples, Example("Which one is bigger?", False, images=both)]


def package(known, limit, act=None, readings=AT):
    act = act or head(weight=helpers.LOW_RANK, eps=1.0)
    return helpers.package(
        known,
        scale=0.05,
        probes=[linear_probe(readings=readings, threshold=limit)],
        interventions=[act],
        rules=[rule(["p"], [act["id"]])],
    )


def url(picture):
    data = io.BytesIO()
    picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def chat(*parts):
    """One user message of texts and pictures."""
    content = [
        {"type": "text", "text": p}
        if isinstance(p, str)
        else {"type": "image_url", "image_url": {"url": url(p)}}
        for p in parts
    ]
    return {"role": "user", "content": content}


def ask(llama, *messages, **options):
    settings = {"max_tokens": 8, "temperature": 0.0, "repeat_penalty": 1.0, **options}
    return llama.create_chat_completion(list(messages), **settings)


def text(answer):
    return answer["choices"][0]["message"]["content"]


# ---------------------------------------------------------------- the same in both runtimes


@pytest.mark.parametrize("act", [None, VECTOR], ids=["low-rank head", "vector"])
def test_scores_verdicts_and_tokens_are_those_of_transformers(hf, f32, prompts, act):
    known = hf.facts
    scores = [
        a.outcome.verdicts[0].score
        for a in hf.generate(prompts, package(known, 0.0, act), max_new_tokens=1)
    ]
    limit = float(np.mean(sorted(scores)[2:4]))
    made = package(known, limit, act)
    want = hf.generate(prompts, made, max_new_tokens=12)
    got = f32.generate(prompts, made, max_new_tokens=12)
    for a, b in zip(want, got, strict=True):
        assert b.outcome.verdicts[0].score == pytest.approx(a.outcome.verdicts[0].score, abs=1e-3)
        assert b.outcome.fired == a.outcome.fired
        assert b.tokens == a.tokens
    unsteered = f32.generate(prompts, None, max_new_tokens=12)
    for before, after in zip(unsteered, got, strict=True):
        assert after.outcome.fired or before.tokens == after.tokens
    assert any(b.tokens != a.tokens for a, b in zip(unsteered, got, strict=True))


def test_capture_reads_what_transformers_reads(hf, f32, prompts):
    from steerbridge.training.states import all_readings

    readings = all_readings(30, boundary=-5, images=True)[::7]
    shape = (len(prompts), len(readings), 576)
    ours, theirs = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    f32.capture(prompts, readings, ours)
    hf.capture(prompts, readings, theirs)
    of_image = np.array([r.position.type == "image_mean" for r in readings])
    assert np.isnan(ours[0, of_image]).all()
    assert np.isnan(theirs[0, of_image]).all()
    assert not np.isnan(ours[1:]).any()
    known = ~np.isnan(theirs)
    scale = np.nan_to_num(np.abs(theirs)).max(axis=2, keepdims=True).clip(1)
    assert (np.abs(ours - theirs) / scale)[known].max() < 1e-4
    rendered = [f32.render(p) for p in prompts]
    token = hf.model.config.image_token_id
    assert rendered == [[0 if i == token else i for i in hf.render(p)] for p in prompts]


# ---------------------------------------------------------------- chat handlers


def test_a_chat_about_a_picture_is_probed_steered_and_told(plain):
    known = facts_of(plain)
    asked = chat(drawn(), QUESTION)
    free = text(ask(plain, asked))
    with steer(plain, package(known, 1e9)) as session:
        quiet = ask(plain, asked)
        assert text(quiet) == free
        assert quiet["steering"]["fired"] is False
        calm = session.outcomes[0].verdicts[0].score
        assert text(ask(plain, asked)) == free  # once more, on the same cache
        other = ask(plain, chat(drawn(seed=5), QUESTION))
        assert other["steering"]["verdicts"][0]["score"] != calm  # it saw the picture
    with steer(plain, package(known, -1e9, head(eps=3.0))):
        fired = ask(plain, asked)
        assert fired["steering"]["fired"] is True
        assert fired["steering"]["verdicts"][0]["score"] == pytest.approx(calm)
        assert text(fired) != free
        chunks = list(ask(plain, asked, stream=True))
        said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert said == text(fired)
        assert chunks[-1]["steering"]["fired"] is True
    assert text(ask(plain, asked)) == free


def facts_of(llama):
    from steerbridge_llama_cpp.facts import facts

    return facts(llama._model)


def test_pictures_of_earlier_turns_and_several_pictures_count(plain):
    """`image_mean` covers every picture of the prompt."""
    known = facts_of(plain)
    first, second = drawn(seed=1), drawn((90, 120), seed=2)
    turns = [
        chat(first, QUESTION),
        {"role": "assistant", "content": "It is a thing."},
        {"role": "user", "content": "And what colour is it?"},
    ]
    made = package(known, 1e9, readings=[reading("layer_input[8]", IMAGE)])
    with steer(plain, made) as session:

        def score(*messages):
            ask(plain, *messages, max_tokens=1)
            return session.outcomes[0].verdicts[0].score

        one, two = score(chat(first, QUESTION)), score(chat(first, second, QUESTION))
        again = score(*turns)
        assert one == pytest.approx(again)  # the rows before the question are the same
        assert abs(one - two) > 1e-3
        assert score({"role": "user", "content": "Hello"}) == 0.0  # no picture: the input mean


def test_images_as_files_and_urls_are_the_same(plain, tmp_path):
    picture = drawn()
    path = tmp_path / "a.png"
    picture.save(path)
    with steer(plain, package(facts_of(plain), 1e9)) as session:
        ask(plain, chat(picture, QUESTION), max_tokens=1)
        data = session.outcomes
        part = {"type": "image_url", "image_url": path.as_uri()}
        asked = {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}
        ask(plain, asked, max_tokens=1)
        assert session.outcomes == data


def test_a_text_after_a_picture_does_not_take_its_rows_for_its_own(plain):
    """llama_cpp keeps the ids of an earlier text at the rows of a picture."""
    known = facts_of(plain)
    long = "Tell me about " + "the old lighthouse on the northern shore and " * 12 + "the sea."
    with steer(plain, package(known, 1e9, readings=[reading("layer_input[18]")])) as session:

        def asked_fresh():
            plain.reset()
            answer = ask(plain, {"role": "user", "content": long})
            return text(answer), session.outcomes

        want = asked_fresh()
        ask(plain, chat(drawn(), QUESTION))
        got = ask(plain, {"role": "user", "content": long})
        assert (text(got), session.outcomes) == want


def test_completions_after_a_picture_evaluate_its_rows_never_as_text(plain):
    with steer(plain, package(facts_of(plain), 1e9, readings=[reading("layer_input[18]")])) as s:
        plain.input_ids[:] = 0  # uninitialised memory, of which a picture's rows keep theirs
        ask(plain, chat(drawn(), QUESTION), max_tokens=2)
        held = plain.input_ids[: plain.n_tokens].tolist()
        with pytest.raises(RowMappingLost, match="images"):
            next(plain.generate([5, 6], reset=False))
        with pytest.raises(SteeredCache, match="images"):
            plain.save_state()
        # The ids of picture and text together, as a text: evaluated from the picture on.
        first = s._tracker._images
        next(plain.generate(held, temp=0.0))
        assert s._tracker._images == []
        assert first
        assert s.outcomes


def test_what_cannot_be_told_from_text_is_refused(plain):
    asked = chat(drawn(), QUESTION)
    with steer(plain, package(facts_of(plain), 1e9)):
        plain.set_cache(llama_cpp.LlamaRAMCache())
        with pytest.raises(UnsupportedFeature, match="saved states"):
            ask(plain, asked)
        plain.set_cache(None)
        sound = {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}
        with pytest.raises(UnsupportedFeature, match="input_audio"):
            ask(plain, sound)


def test_a_broken_picture_leaves_nothing_behind(plain, f32, tmp_path):
    bad = {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}
    message = {"role": "user", "content": [bad, {"type": "text", "text": QUESTION}]}
    with steer(plain, package(facts_of(plain), 1e9)):
        want = text(ask(plain, chat(drawn(), QUESTION)))
        with pytest.raises(ValueError, match="bitmap"):
            ask(plain, message)
        assert text(ask(plain, chat(drawn(), QUESTION))) == want
        with pytest.raises(ValueError, match="n_ctx"):  # some chunks in, then too long
            ask(plain, chat(*[drawn(seed=i) for i in range(25)], QUESTION))
        assert plain.n_tokens == 0
        assert text(ask(plain, chat(drawn(), QUESTION))) == want
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png"):
        f32.render(Example("?", False, images=(tmp_path / "a.png",)))


def test_without_the_session_s_knowledge_nothing_is_decoded(plain):
    """A direct call of libmtmd that bypasses the session gives no answer."""
    handler = plain.chat_handler
    with steer(plain, package(facts_of(plain), 1e9)):
        with pytest.raises((ValueError, RuntimeError, SteeringFailed)):
            handler(llama=plain, messages=[chat(drawn(), QUESTION)], max_tokens=2)
        assert text(ask(plain, chat(drawn(), QUESTION)))


def test_prompts_with_images_need_a_vision_tower(smollm2_path, prompts):
    model = open_model(smollm2_path, n_ctx=128)
    with pytest.raises(UnsupportedFeature, match="mmproj"):
        model.render(prompts[1])
    model.llama.close()
