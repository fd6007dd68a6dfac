"""Which rows start a new request in llama-cpp-python: caches, turns, drafts, saved states."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import LOW_RANK, MEAN, head, reading

llama_cpp = pytest.importorskip("llama_cpp")
from smollm2_llama import TEXT, VECTOR, answer, new_llama, tokens  # noqa: E402
from steerbridge.errors import (  # noqa: E402
    RowMappingLost,
    SteeredCache,
    UnsupportedFeature,
)
from steerbridge_llama_cpp import steer  # noqa: E402

pytestmark = pytest.mark.llama_cpp


BEFORE = {"type": "prompt_end", "offset": -3}


def test_each_prompt_on_one_cache_is_a_request(llama, make_package):
    """Repeated prompts and shared prefixes are each probed and answered as if fresh."""
    fresh = {}
    prompts = [TEXT, TEXT, TEXT + " red, white and", "The three"]
    package = make_package(True)
    for text in set(prompts):
        with steer(llama, package) as session:
            fresh[text] = answer(llama, tokens(llama, text)), session.outcomes[0].verdicts[0].score
    told = []
    with steer(llama, package, on_outcome=told.append) as session:
        for text in prompts:
            assert answer(llama, tokens(llama, text)) == fresh[text][0]
            assert session.outcomes[0].verdicts[0].score == pytest.approx(fresh[text][1], abs=2e-3)
    assert len(told) == len(prompts)


def test_a_prompt_that_is_cached_to_its_end_is_probed(llama, make_package):
    """After a single generated token the cache holds exactly the prompt, including its logits."""
    with steer(llama, make_package(True)) as session:
        first = answer(llama, tokens(llama), 1)
        score = session.outcomes[0].verdicts[0].score
        llama._steering_tracker.outcomes = ()
        assert answer(llama, tokens(llama), 1) == first
        assert session.outcomes[0].verdicts[0].score == pytest.approx(score, abs=2e-3)


def test_a_turn_on_what_was_evaluated_is_a_request(llama, make_package):
    with steer(
        llama,
        make_package(True, [reading("layer_input[22]", {"type": "prompt_end", "offset": -3})]),
    ):
        whole = answer(llama, tokens(llama, TEXT + " red"))
        llama.reset()
        llama.eval(tokens(llama))
        rest = tokens(llama, TEXT + " red")[len(tokens(llama)) :]
        assert answer(llama, rest, reset=False) == whole


@pytest.mark.parametrize("more", [[], [reading("layer_input[16]", BEFORE)]], ids=["mean", "both"])
def test_rows_of_a_prompt_are_kept_for_means(llama, make_package, monkeypatch, more):
    """A later prompt with the same prefix is evaluated from where the prefix ends. Rows of an
    answer are not read, so they are evaluated again as part of the next prompt."""
    package = make_package(True, [reading("layer_input[9]", MEAN), *more])
    texts = [TEXT, TEXT + " red, white and", "Something else altogether, that is", TEXT]
    fresh = {}
    for text in set(texts):
        with steer(llama, package) as session:
            fresh[text] = answer(llama, tokens(llama, text)), session.outcomes[0].verdicts[0].score
    with steer(llama, package) as session:
        evaluated, open_eval = [], llama._steering_tracker.before_eval

        def counting(rows):
            evaluated.append(rows)
            open_eval(rows)

        monkeypatch.setattr(llama._steering_tracker, "before_eval", counting)
        row_counts = []
        for text in texts:
            evaluated.clear()
            assert answer(llama, tokens(llama, text)) == fresh[text][0]
            score = session.outcomes[0].verdicts[0].score
            assert score == pytest.approx(fresh[text][1], abs=2e-3)
            row_counts.append(evaluated[0])
        prompts = [tokens(llama, text) for text in texts]
        assert row_counts == [
            len(prompt) - llama.longest_token_prefix(prompt, before)
            for prompt, before in zip(prompts, [[], *prompts], strict=False)
        ]
        assert row_counts[1] < row_counts[0]
        whole = len(prompts[0])
        # A turn on the answer: its rows were not read.
        prompt = [*tokens(llama), *answer(llama, tokens(llama)), *tokens(llama, "And?")]
        evaluated.clear()
        answer(llama, prompt)
        assert evaluated[0] == len(prompt) - whole
        # Rows of another's state are not those that were read.
        state = llama.save_state()
        llama.load_state(state)
        evaluated.clear()
        answer(llama, prompt)
        assert evaluated[0] == len(prompt)


def test_rows_that_belong_to_no_request_are_refused(llama, make_package):
    with steer(llama, make_package(True)):
        llama.reset()
        llama.eval(tokens(llama))
        llama.eval([300])
        with pytest.raises(RowMappingLost, match="new turn"):
            llama.eval([300, 301])
        llama.n_tokens = 2
        with pytest.raises(RowMappingLost, match="no known request"):
            llama.eval([300])
        with pytest.raises(RowMappingLost, match="a row to evaluate"):
            answer(llama, [])


def test_a_generator_that_was_left_behind_does_not_go_on(llama, make_package):
    """Its cache now belongs to another request; closing it late does not affect that request."""
    with steer(llama, make_package(True)) as session:
        want = answer(llama, tokens(llama, "The sea is"))
        left = [llama.generate(tokens(llama), temp=0.0) for _ in "ab"]
        for stream in left:
            next(stream)
        later = llama.generate(tokens(llama, "The sea is"), temp=0.0)
        got = [next(later)]
        with pytest.raises(RowMappingLost, match="another generate"):
            next(left[0])
        left[1].close()
        assert session.outcomes[0].fired
        assert got + [next(later) for _ in want[1:]] == want


def test_a_generator_closed_between_announcement_and_prompt_changes_nothing(llama, make_package):
    """Only the new prompt's last row is evaluated; it must not pass for a row of the old answer."""
    package = make_package(True)
    with steer(llama, package) as session:
        old = llama.generate(tokens(llama), temp=0.0)
        next(old)
        init = llama._init_sampler

        def closing(*args, **kwargs):
            old.close()
            return init(*args, **kwargs)

        llama._init_sampler = closing
        try:
            llama._steering_tracker.outcomes = ()
            answer(llama, tokens(llama), 1)
            assert session.outcomes[0].fired
        finally:
            del llama._init_sampler


def test_speculative_decoding_gives_the_same_tokens(smollm2_path, llama, make_package):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = tokens(llama, "one two three four one two three four one two")
    package = make_package(True, act=head(weight=LOW_RANK, eps=6.0))
    with steer(llama, package):
        want = answer(llama, prompt, 24)
    drafting = new_llama(smollm2_path, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    plain = answer(drafting, prompt, 24)
    with steer(drafting, package) as session:
        assert answer(drafting, prompt, 24) == want != plain
        assert session.outcomes[0].fired


@pytest.mark.parametrize("act", [None, VECTOR], ids=["head", "layer"])
def test_cached_rows_serve_a_later_request_unless_they_were_steered(
    llama, make_package, monkeypatch, act
):
    """Rows that a head steered are reused, as it leaves the cache alone; a vector's never are."""
    prompt, longer = tokens(llama), tokens(llama, TEXT + " red and then some more")
    llama.reset()
    plain = answer(llama, longer)
    evaluated = []
    with steer(llama, make_package(True, act=act)):
        llama.reset()
        want = answer(llama, longer)
        llama.reset()
        answer(llama, prompt)
        first = llama._ctx.native.first_steered(0)
        assert first == (None if act is None else len(prompt) - 1)
        decode = llama._ctx.decode
        monkeypatch.setattr(
            llama._ctx, "decode", lambda b: (evaluated.append(b.batch.n_tokens), decode(b))
        )
        assert answer(llama, longer) == want != plain
        monkeypatch.undo()
    assert len(longer) - evaluated[0] == (len(prompt) if act is None else first)
    assert answer(llama, longer) == plain


def test_llama_cache_and_saved_states(llama, make_package):
    from llama_cpp import LlamaRAMCache

    options = {"max_tokens": 6, "temperature": 0.0}
    with steer(llama, make_package(True)):
        llama.set_cache(LlamaRAMCache())
        first = llama.create_completion(TEXT, **options)
        llama.create_completion("Something else entirely", **options)
        again = llama.create_completion(TEXT, **options)  # from the saved state
        assert again["choices"] == first["choices"]
        assert again["steering"]["fired"]
        llama.set_cache(None)
        state = llama.save_state()
        llama.load_state(state)
        with pytest.raises(RowMappingLost, match="no known request"):
            llama.eval([300])
        assert llama.create_completion(TEXT, **options)["choices"] == first["choices"]
    with steer(llama, make_package(True, act=VECTOR)):
        llama.create_completion(TEXT, **options)
        with pytest.raises(SteeredCache, match="layer"):
            llama.save_state()
        with pytest.raises(UnsupportedFeature, match="saved states"):
            llama.set_cache(LlamaRAMCache())
    llama.set_cache(LlamaRAMCache())
    with pytest.raises(UnsupportedFeature, match="set_cache"):
        steer(llama, make_package(True, act=VECTOR))
    llama.set_cache(None)


def test_threads_take_turns(smollm2_path, make_package):
    """llama.cpp's context is used by one thread at a time; each gets its own answer."""
    llama = new_llama(smollm2_path)
    with steer(llama, make_package(True)):
        texts = [TEXT, "My name is", "The sky is"]
        want = {text: llama(text, max_tokens=6, temperature=0)["choices"] for text in texts}
        jobs = texts * 4
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda t: llama(t, max_tokens=6, temperature=0)["choices"], jobs))
        assert got == [want[text] for text in jobs]


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_would_lose_the_package(llama, make_package, copies):
    with steer(llama, make_package(True)), pytest.raises(UnsupportedFeature, match="pickling"):
        copies(llama)
