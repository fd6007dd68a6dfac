"""The engines behind `steerbridge serve`: what one request leaves for the next."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

import helpers
from helpers import reading

pytest.importorskip("llama_cpp")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from steerbridge import registry
from steerbridge.errors import DataError
from steerbridge.serving import Cancelled, Message, Part, Question, Sampling

pytestmark = pytest.mark.llama_cpp
NEW = 8
GREEDY = Sampling(NEW)


def question(text, **options):
    return Question((Message("user", (Part(text=text),)),), **options)


@pytest.fixture(scope="module", params=["llama.cpp", "hf"])
def opened(request, smollm2_path, smollm2_f32_path):
    """An engine with a guard, and its answers to a harmful and a harmless prompt."""
    path = smollm2_path if request.param == "hf" else smollm2_f32_path
    prompts = helpers.corpus_prompts(2)
    model = registry.runtime(request.param).load()(path)
    guard, answers = helpers.fitted(model, prompts, [reading("layer_input[22]")], NEW)
    del model
    engine = registry.runtime(request.param).load_engine()(path, guard, context=2048)
    return engine, prompts, answers


def tokens(engine, asked, sampling=GREEDY, check=lambda: None):
    """Ids of an answer, and how it ended."""
    ids = []

    def emit(token, _):
        ids.append(token.id)
        return True

    ended = engine.answer(asked, sampling, emit, check)
    return tuple(ids), ended


def right(opened):
    engine, prompts, answers = opened
    for prompt, wanted in zip(prompts, answers, strict=True):
        ids, ended = tokens(engine, question(prompt.text))
        assert ids == wanted.tokens
        assert ended.outcome.fired == prompt.harmful


class Leaves:
    """A client that leaves at the n-th check."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise Cancelled


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_client_that_leaves_while_its_prompt_is_evaluated(opened, after):
    """Long prompts end early, and the next answers are as if they had never been asked."""
    engine, prompts, _ = opened
    for prompt in prompts:
        check = Leaves(after)
        with pytest.raises(Cancelled):
            tokens(engine, question("bees and honey. " * 300 + prompt.text), check=check)
        assert check.left == -1  # it ended there, and went on nowhere
        right(opened)


def test_a_client_that_leaves_in_the_middle_of_its_answer(opened):
    engine, prompts, _ = opened
    for prompt in prompts:
        seen = []

        def emit(token, _, seen=seen):
            seen.append(token)
            if len(seen) == 3:
                raise Cancelled
            return True

        with pytest.raises(Cancelled):
            engine.answer(question(prompt.text), GREEDY, emit, lambda: None)
        assert len(seen) == 3
        right(opened)


def test_a_prompt_that_is_only_judged(opened):
    engine, prompts, answers = opened
    for prompt, wanted in zip(prompts, answers, strict=True):
        ids, ended = tokens(engine, question(prompt.text), Sampling(0))
        assert (ids, ended.finish) == ((), "length")
        assert ended.outcome.verdicts[0].fired == wanted.outcome.verdicts[0].fired
        score = wanted.outcome.verdicts[0].score
        assert ended.outcome.verdicts[0].score == pytest.approx(score, abs=1e-3)
    right(opened)


def test_a_seed_ends_with_its_request(opened):
    """An answer without a seed is not drawn with that of an earlier client."""
    engine, prompts, _ = opened
    asked = question(next(p for p in prompts if not p.harmful).text)
    warm = Sampling(12, temperature=1.5)
    seeded = Sampling(12, temperature=1.5, seed=7)
    tokens(engine, asked, seeded)  # from here on, the cache holds the prompt
    assert len({tokens(engine, asked, seeded)[0] for _ in range(2)}) == 1
    assert len({tokens(engine, asked, warm)[0] for _ in range(4)}) > 1
    after = set()
    for _ in range(4):
        tokens(engine, asked, seeded)
        after.add(tokens(engine, asked, warm)[0])
    assert len(after) > 1
    right(opened)


def test_an_answer_that_the_client_begins(opened):
    """The prompt is the chat with the beginning of its answer, and it is judged there."""
    engine, prompts, _ = opened
    begun = question(prompts[1].text, prefill="Sure, here")
    plain = engine.prompt(question(prompts[1].text))
    prompt = engine.prompt(begun)
    assert prompt.text == plain.text + "Sure, here"
    assert len(prompt.tokens) > len(plain.tokens)
    _, ended = tokens(engine, begun)
    assert ended.prompt_tokens == len(prompt.tokens)
    assert ended.outcome is not None
    right(opened)


def test_messages_that_the_template_does_not_take(opened, monkeypatch):
    """As of a model without a system role: a DataError, whatever the template raises."""
    engine, _, _ = opened
    model = engine._model
    refusing = "{{ raise_exception('no system role') }}"
    if hasattr(model, "tokenizer"):
        monkeypatch.setattr(model.tokenizer, "chat_template", refusing)
    else:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        formatter = Jinja2ChatFormatter(template=refusing, eos_token="", bos_token="")
        monkeypatch.setattr(model, "_render", formatter)
    with pytest.raises(DataError, match="no system role"):
        tokens(engine, question("hi"))
    monkeypatch.undo()
    right(opened)


def test_no_limit_means_the_rest_of_the_context(opened):
    engine, prompts, _ = opened
    asked = question("bees and honey. " * 400 + prompts[0].text)
    room = engine.context - len(engine.prompt(asked).tokens)
    assert 0 < room < 500
    ids, ended = tokens(engine, asked, Sampling(None, temperature=0.0))
    assert ended.finish == "eos_token" or len(ids) == room
    right(opened)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"p{n}": {} for n in range(900)}},
        {"type": "string", "minLength": 1_000_000},
        {"anyOf": [{"type": "string"}] * 500},
        {"enum": []},
        {"$ref": "https://example.com/x.json"},
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "description": "x" * 20_000},
    ],
    ids=["many", "long", "same", "nothing", "elsewhere", "pattern", "large"],
)
def test_schemas_cost_little_and_end_nothing(schema, smollm2_path):
    from llama_cpp import Llama

    from steerbridge_llama_cpp.engine import grammar

    vocabulary = Llama(str(smollm2_path), vocab_only=True, verbose=False)
    start = time.monotonic()
    with contextlib.suppress(DataError):
        grammar(json.dumps(schema), vocabulary._model.vocab)
    assert time.monotonic() - start < 10


def test_pictures_arrive_alike_in_both_runtimes(tmp_path, demo_files):
    """Pixels that were decoded once: answers and verdicts are those of the files."""
    import steerbridge_demo
    from steerbridge import load
    from steerbridge_hf.engine import HfEngine
    from steerbridge_serve.pictures import decode

    path, prompts, answers = helpers.drawn_guard(tmp_path, demo_files, NEW)
    guard, options = load(path), {"mmproj": demo_files["mmproj_f32"]}
    opener = registry.runtime("llama.cpp").load_engine()
    engines = [
        opener(demo_files["text_f32"], guard, context=512, **options),
        HfEngine(steerbridge_demo.open_hf(), guard, "demo", 512, ()),
    ]
    for prompt, wanted in zip(prompts, answers, strict=True):
        [picture] = decode([prompt.images[0].read_bytes()], 1_000_000)
        asked = Question((Message("user", (Part(picture=picture), Part(text=prompt.text))),))
        for engine in engines:
            ids, ended = tokens(engine, asked)
            assert ids == wanted.tokens, engine.name
            assert ended.outcome.fired == prompt.harmful
