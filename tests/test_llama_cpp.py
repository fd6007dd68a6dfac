"""llama-cpp-python on SmolLM2: what a steered `Llama` owes (design: the seven promises)."""

from __future__ import annotations

import numpy as np
import pytest

import helpers
from helpers import IMAGE, MEAN, head, linear_probe, reading, rule

llama_cpp = pytest.importorskip("llama_cpp")

from steerbridge.errors import (  # noqa: E402
    ModelMismatch,
    RowMappingLost,
    SteeredCache,
    SteeringFailed,
    UnsupportedFeature,
)
from steerbridge.fingerprint import ModelFacts  # noqa: E402
from steerbridge.package import SteeringPackage, parse  # noqa: E402
from steerbridge_llama_cpp import SteeredContext, SteeredLlama, open_model, steer  # noqa: E402
from steerbridge_llama_cpp.facts import facts  # noqa: E402
from steerbridge_llama_cpp.model import LlamaCppModel  # noqa: E402

pytestmark = pytest.mark.llama_cpp

CHAT = [{"role": "user", "content": "Name a colour."}]
TEXT = "The three colours of the flag are"
LOW = {"form": "low_rank", "u": "h.u", "v": "h.v"}
VECTOR = helpers.vector_after_layer_25()
AT = [reading("layer_input[22]")]
BEFORE = {"type": "prompt_end", "offset": -3}


def new_llama(path, **options):
    settings = {"n_ctx": 512, "verbose": False, "seed": 1, **options}
    return llama_cpp.Llama(str(path), **settings)


@pytest.fixture(scope="module")
def llama(smollm2_path):
    """One plain Llama; every test detaches what it attached."""
    made = new_llama(smollm2_path)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def detached(request):
    yield
    if "llama" in request.fixturenames:
        found = request.getfixturevalue("llama")
        if (session := found.__dict__.get("steering_session")) is not None:
            session.remove()  # a test failed inside its `with`: spare the others
        found.set_cache(None)
        assert type(found) is llama_cpp.Llama


@pytest.fixture
def make(llama):
    """make(fires, readings=..., act=...): a package that always, or never, fires."""
    known = facts(llama._model)

    def package(fires, readings=AT, act=None, **probe):
        act = act or head(weight=LOW, eps=3.0)
        limit = -1e9 if fires else 1e9
        return helpers.package(
            known,
            scale=0.05,
            probes=[linear_probe(readings=readings, threshold=limit, **probe)],
            interventions=[act],
            rules=[rule(["p"], [act["id"]])],
        )

    return package


def tokens(llama, text=TEXT):
    return llama.tokenize(text.encode())


def answer(llama, prompt, count=8, **options):
    """`count` greedy tokens."""
    found = []
    for token in llama.generate(prompt, temp=0.0, **options):
        found.append(token)
        if len(found) == count:
            return found
    raise AssertionError("generate() does not end by itself")


def logits(llama):
    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy()


# ---------------------------------------------------------------- same semantics


@pytest.mark.slow
@pytest.mark.parametrize(
    "act", [head(weight=LOW, eps=0.2), VECTOR], ids=["low-rank head", "vector"]
)
def test_f32_scores_and_tokens_equal_the_oracle(smollm2_path, smollm2_f32_path, act):
    """Readings at two layers, one a mean; half of the prompts fire."""
    pytest.importorskip("transformers")
    from oracle import oracle
    from steerbridge.data import from_corpus
    from steerbridge_hf import open_model as open_hf

    hf = open_hf(smollm2_path)
    model = open_model(smollm2_f32_path, n_ctx=256, type_k=0, type_v=0)
    prompts = [e for e in from_corpus("test") if len(e.text) < 80][::30][:4]
    rows = [model.render(p) for p in prompts]
    assert rows == [hf.render(p) for p in prompts]
    probe = linear_probe(readings=[*AT, reading("layer_input[16]", MEAN)])
    fields = {"scale": 0.05, "interventions": [act], "rules": [rule(["p"], [act["id"]])]}
    first = helpers.package(hf.facts, probes=[probe], **fields)
    scores = sorted(oracle(hf.model, first, r, 0)[0][0].score for r in rows)
    limit = float(np.mean(scores[1:3]))
    package = helpers.package(hf.facts, probes=[{**probe, "threshold": limit}], **fields)
    got = model.generate(prompts, package, max_new_tokens=6)
    assert sum(g.outcome.fired for g in got) == 2
    for found, row in zip(got, rows, strict=True):
        verdicts, want = oracle(hf.model, package, row, 6)
        assert found.outcome.verdicts[0].score == pytest.approx(verdicts[0].score, abs=1e-3)
        assert found.outcome.fired == verdicts[0].fired
        assert list(found.tokens) == want


def test_capture_reads_what_transformers_reads(smollm2_path, smollm2_f32_path):
    pytest.importorskip("transformers")
    from steerbridge.data import Example
    from steerbridge.training.states import all_readings
    from steerbridge_hf import open_model as open_hf

    prompts = [Example("Name a colour.", False), Example("How do I bake a plain cake?", False)]
    readings = all_readings(30, boundary=-5)
    found, want = (np.empty((2, len(readings), 576), np.float32) for _ in range(2))
    open_model(smollm2_f32_path, n_ctx=256, type_k=0, type_v=0).capture(prompts, readings, found)
    open_hf(smollm2_path).capture(prompts, readings, want)
    assert len(readings) > 64  # more than one probe of the format holds
    np.testing.assert_allclose(found, want, atol=2e-3, rtol=2e-4)


@pytest.mark.parametrize("sizes", [{}, {"n_batch": 8}, {"n_batch": 16, "n_ubatch": 4}])
def test_micro_batches_change_no_verdict(smollm2_path, make, sizes):
    """A prompt cut into batches and micro-batches: the same score, answer and mean."""
    package = make(True, [*AT, reading("layer_input[9]", MEAN)])
    long = TEXT * 5
    small = new_llama(smollm2_path, **sizes)
    with steer(small, package) as session:
        found = answer(small, tokens(small, long))
        score = session.outcomes[0].verdicts[0].score
    whole = new_llama(smollm2_path)
    with steer(whole, package) as session:
        assert found == answer(whole, tokens(whole, long))
        assert session.outcomes[0].verdicts[0].score == pytest.approx(score, abs=2e-3)


def test_text_of_long_tokens(llama):
    """`Llama.detokenize` answers with nothing for a token of more than 32 bytes."""
    text = f"{'-' * 45} and {'=' * 60}"
    found = llama.tokenize(text.encode(), add_bos=False)
    assert llama.detokenize(found).decode() != text  # llama-cpp-python 0.3.36
    assert LlamaCppModel(llama).text_of(found) == text


# ---------------------------------------------------------------- untouched when quiet


@pytest.mark.parametrize("readings", [AT, [reading("layer_input[12]", MEAN)]], ids=["end", "mean"])
def test_quiet_logits_are_bit_identical(llama, make, readings):
    def run():
        """Logits of the prompt end and of four tokens."""
        llama.reset()
        llama.eval(tokens(llama))
        seen = [logits(llama)]
        for _ in range(4):
            llama.eval([int(seen[-1].argmax())])
            seen.append(logits(llama))
        return np.array(seen)

    plain = run()
    with steer(llama, make(False, readings)) as session:
        quiet = run()
        assert not session.outcomes[0].fired
    assert quiet.tobytes() == plain.tobytes()
    with steer(llama, make(True, readings)):
        assert run().tobytes() != plain.tobytes()
    assert run().tobytes() == plain.tobytes()


def test_removing_leaves_an_ordinary_llama(llama, make):
    before = answer(llama, tokens(llama))
    session = steer(llama, make(True))
    session.apply()
    assert isinstance(llama, llama_cpp.Llama)
    assert answer(llama, tokens(llama)) != before
    with pytest.raises(UnsupportedFeature, match="steered already"):
        steer(llama, make(True))
    session.remove()
    session.remove()
    assert answer(llama, tokens(llama)) == before
    with pytest.raises(UnsupportedFeature, match="not attached"):
        session.context  # noqa: B018


# ---------------------------------------------------------------- several sequences in a batch


@pytest.mark.parametrize("package_acts", [head(weight=LOW, eps=0.3), VECTOR], ids=["head", "layer"])
def test_only_fired_sequences_of_a_batch_change(llama, make, package_acts):
    """Four sequences, two of them fire; the others' logits keep their bits."""
    texts = ["A cat", "Seven grey horses run home", "Why is the sea", "Tea with milk, and then"]
    prompts = [tokens(llama, t) for t in texts]
    scores = []
    with steer(llama, make(False)) as session:
        for prompt in prompts:
            answer(llama, prompt, 1)
            scores.append(session.outcomes[0].verdicts[0].score)
    limit = float(np.mean(sorted(scores)[1:3]))
    package = make(True, act=package_acts)
    probes = tuple(p.model_copy(update={"threshold": limit}) for p in package.spec.probes)
    package = type(package)(package.spec.model_copy(update={"probes": probes}), package.tensors)

    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.n_seq_max, params.kv_unified = 4, True
    steered = SteeredContext(package, model=llama._model, params=params)
    plain = llama_cpp._internals.LlamaContext(model=llama._model, params=params, verbose=False)
    with pytest.raises(RowMappingLost, match="open request"):
        decode_all(steered, prompts)
    steered.recover()
    for seq, prompt in enumerate(prompts):
        steered.begin(seq, 0, len(prompt))
    found, want = (decode_all(c, prompts) for c in (steered, plain))
    fired = [steered.outcome(seq).fired for seq in range(4)]
    assert fired == [s > limit for s in scores]
    assert sum(fired) == 2
    for step_found, step_want in zip(found, want, strict=True):
        for seq in range(4):
            same = step_found[seq].tobytes() == step_want[seq].tobytes()
            assert same != fired[seq]
    steered.close()
    plain.close()


def decode_all(context, prompts, steps=3):
    """Logits [step][seq] of one mixed prompt batch and of tokens decoded together."""
    batch = llama_cpp._internals.LlamaBatch(n_tokens=64, embd=0, n_seq_max=4, verbose=False)
    longest = max(map(len, prompts))
    rows = [  # interleaved, so that no sequence's rows lie together
        (seq, i, p[i]) for i in range(longest) for seq, p in enumerate(prompts) if i < len(p)
    ]
    lengths = [len(p) for p in prompts]
    seen = []
    for _ in range(steps):
        batch.batch.n_tokens = len(rows)
        where = {}
        for k, (seq, position, token) in enumerate(rows):
            batch.batch.token[k], batch.batch.pos[k] = token, position
            batch.batch.n_seq_id[k], batch.batch.seq_id[k][0] = 1, seq
            last = position == lengths[seq] - 1
            batch.batch.logits[k] = last
            if last:
                where[seq] = k
        context.decode(batch)
        size = (llama_cpp.llama_vocab_n_tokens(context.model.vocab),)
        seen.append(
            [
                np.ctypeslib.as_array(context.get_logits_ith(where[s]), size).copy()
                for s in range(len(prompts))
            ]
        )
        rows = [(s, lengths[s], 300 + s) for s in range(len(prompts))]
        lengths = [n + 1 for n in lengths]
    return seen


# ---------------------------------------------------------------- requests: caches, turns, drafts


def test_each_prompt_on_one_cache_is_a_request(llama, make):
    """A shared prefix, the same prompt again, a longer one: probed anew, answered alike."""
    fresh = {}
    prompts = [TEXT, TEXT, TEXT + " red, white and", "The three"]
    package = make(True)
    for text in set(prompts):
        with steer(llama, package) as session:
            fresh[text] = answer(llama, tokens(llama, text)), session.outcomes[0].verdicts[0].score
    told = []
    with steer(llama, package, on_outcome=told.append) as session:
        for text in prompts:
            assert answer(llama, tokens(llama, text)) == fresh[text][0]
            assert session.outcomes[0].verdicts[0].score == pytest.approx(fresh[text][1], abs=2e-3)
    assert len(told) == len(prompts)


def test_a_prompt_that_is_cached_to_its_end_is_probed(llama, make):
    """After one token only, the cache holds exactly the prompt, and its logits are there."""
    with steer(llama, make(True)) as session:
        first = answer(llama, tokens(llama), 1)
        score = session.outcomes[0].verdicts[0].score
        session.outcomes = ()
        assert answer(llama, tokens(llama), 1) == first
        assert session.outcomes[0].verdicts[0].score == pytest.approx(score, abs=2e-3)


def test_a_turn_on_what_was_evaluated_is_a_request(llama, make):
    with steer(
        llama, make(True, [reading("layer_input[22]", {"type": "prompt_end", "offset": -3})])
    ):
        whole = answer(llama, tokens(llama, TEXT + " red"))
        llama.reset()
        llama.eval(tokens(llama))
        rest = tokens(llama, TEXT + " red")[len(tokens(llama)) :]
        assert answer(llama, rest, reset=False) == whole


@pytest.mark.parametrize("more", [[], [reading("layer_input[16]", BEFORE)]], ids=["mean", "both"])
def test_rows_of_a_prompt_are_kept_for_means(llama, make, monkeypatch, more):
    """A later prompt that begins with them is evaluated from where they end; an answer is not
    read, so its rows are evaluated as a part of the next prompt."""
    package = make(True, [reading("layer_input[9]", MEAN), *more])
    texts = [TEXT, TEXT + " red, white and", "Something else altogether, that is", TEXT]
    fresh = {}
    for text in set(texts):
        with steer(llama, package) as session:
            fresh[text] = answer(llama, tokens(llama, text)), session.outcomes[0].verdicts[0].score
    with steer(llama, package) as session:
        evaluated, open_eval = [], session.before_eval

        def counting(rows):
            evaluated.append(rows)
            open_eval(rows)

        monkeypatch.setattr(session, "before_eval", counting)
        found = []
        for text in texts:
            evaluated.clear()
            assert answer(llama, tokens(llama, text)) == fresh[text][0]
            score = session.outcomes[0].verdicts[0].score
            assert score == pytest.approx(fresh[text][1], abs=2e-3)
            found.append(evaluated[0])
        prompts = [tokens(llama, text) for text in texts]
        assert found == [
            len(prompt) - llama.longest_token_prefix(prompt, before)
            for prompt, before in zip(prompts, [[], *prompts], strict=False)
        ]
        assert found[1] < found[0]
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


def test_rows_that_belong_to_no_request_are_refused(llama, make):
    with steer(llama, make(True)):
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


def test_a_generator_that_was_left_behind_does_not_go_on(llama, make):
    """Its cache is another request's by now; and closing it late disturbs that one in nothing."""
    with steer(llama, make(True)) as session:
        want = answer(llama, tokens(llama, "The sea is"))
        left = [llama.generate(tokens(llama), temp=0.0) for _ in "ab"]
        for stream in left:
            next(stream)
        later = llama.generate(tokens(llama, "The sea is"), temp=0.0)
        found = [next(later)]
        with pytest.raises(RowMappingLost, match="another generate"):
            next(left[0])
        left[1].close()
        assert session.outcomes[0].fired
        assert found + [next(later) for _ in want[1:]] == want


def test_a_generator_closed_between_announcement_and_prompt_changes_nothing(llama, make):
    """The new prompt's last row alone is evaluated: it must not pass for an old answer's."""
    package = make(True)
    with steer(llama, package) as session:
        old = llama.generate(tokens(llama), temp=0.0)
        next(old)
        init = llama._init_sampler

        def closing(*args, **kwargs):
            old.close()
            return init(*args, **kwargs)

        llama._init_sampler = closing
        try:
            session.outcomes = ()
            answer(llama, tokens(llama), 1)
            assert session.outcomes[0].fired
        finally:
            del llama._init_sampler


def test_speculative_decoding_gives_the_same_tokens(smollm2_path, llama, make):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = tokens(llama, "one two three four one two three four one two")
    package = make(True, act=head(weight=LOW, eps=6.0))
    with steer(llama, package):
        want = answer(llama, prompt, 24)
    drafting = new_llama(smollm2_path, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    plain = answer(drafting, prompt, 24)
    with steer(drafting, package) as session:
        assert answer(drafting, prompt, 24) == want != plain
        assert session.outcomes[0].fired


@pytest.mark.parametrize("act", [None, VECTOR], ids=["head", "layer"])
def test_cached_rows_serve_a_later_request_unless_they_were_steered(llama, make, monkeypatch, act):
    """A head leaves the cache alone, so its rows are shared; a vector's rows never are."""
    prompt, longer = tokens(llama), tokens(llama, TEXT + " red and then some more")
    llama.reset()
    plain = answer(llama, longer)
    evaluated = []
    with steer(llama, make(True, act=act)) as session:
        llama.reset()
        want = answer(llama, longer)
        llama.reset()
        answer(llama, prompt)
        first = session.context.native.first_steered(0)
        assert first == (None if act is None else len(prompt) - 1)
        decode = llama._ctx.decode
        monkeypatch.setattr(
            llama._ctx, "decode", lambda b: (evaluated.append(b.batch.n_tokens), decode(b))
        )
        assert answer(llama, longer) == want != plain
        monkeypatch.undo()
    assert len(longer) - evaluated[0] == (len(prompt) if act is None else first)
    assert answer(llama, longer) == plain


def test_llama_cache_and_saved_states(llama, make):
    from llama_cpp import LlamaRAMCache

    options = {"max_tokens": 6, "temperature": 0.0}
    with steer(llama, make(True)):
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
    with steer(llama, make(True, act=VECTOR)):
        llama.create_completion(TEXT, **options)
        with pytest.raises(SteeredCache, match="layer"):
            llama.save_state()
        with pytest.raises(UnsupportedFeature, match="saved states"):
            llama.set_cache(LlamaRAMCache())
    llama.set_cache(LlamaRAMCache())
    with pytest.raises(UnsupportedFeature, match="set_cache"):
        steer(llama, make(True, act=VECTOR))
    llama.set_cache(None)


# ---------------------------------------------------------------- the public surface of Llama


def test_completions_say_what_was_decided(llama, make):
    options = {"max_tokens": 5, "temperature": 0.0}
    with steer(llama, make(True)):
        whole = llama(TEXT, **options)
        chunks = list(llama.create_completion(TEXT, stream=True, **options))
        assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
        chat = llama.create_chat_completion(CHAT, **options)
        stream = list(llama.create_chat_completion(CHAT, stream=True, **options))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in stream)
    assert text == chat["choices"][0]["message"]["content"]
    for found in (whole, chat, *chunks, *stream):
        assert found["steering"]["fired"]
        assert found["steering"]["rules"] == ["r"]
        assert found["steering"]["verdicts"][0]["probe"] == "p"


def test_sampling_options_act_on_steered_logits(llama, make):
    """Grammar, bias, stop words and a seed: the head changes what they choose from."""
    from llama_cpp import LlamaGrammar

    digits = LlamaGrammar.from_string("root ::= [0-9]+", verbose=False)
    options = {"max_tokens": 6, "temperature": 0.0}
    with steer(llama, make(True)) as session:
        found = llama(TEXT, grammar=digits, **options)["choices"][0]["text"]
        assert found
        assert set(found) <= set("0123456789")
        token = llama.tokenize(b" blue", add_bos=False)[0]
        biased = llama(TEXT, logit_bias={str(token): 1000.0}, **options)["choices"][0]["text"]
        assert biased == " blue" * 6
        free = llama(TEXT, **options)["choices"][0]["text"]
        stop = free[2:6]
        assert llama(TEXT, stop=[stop], **options)["choices"][0]["text"] == free[: free.index(stop)]
        hot = {"max_tokens": 6, "temperature": 1.2, "seed": 7}
        assert llama(TEXT, **hot)["choices"] == llama(TEXT, **hot)["choices"]
        assert session.outcomes[0].fired


def test_log_probabilities_are_those_of_steered_logits(smollm2_path, make):
    every = new_llama(smollm2_path, logits_all=True)
    options = {"max_tokens": 3, "temperature": 0.0, "logprobs": 2}
    plain = every(TEXT, **options)["choices"][0]
    with steer(every, make(False)):
        assert every(TEXT, **options)["choices"][0] == plain
    with steer(every, make(True)):
        found = every(TEXT, **options)["choices"][0]
    assert found["logprobs"]["token_logprobs"] != plain["logprobs"]["token_logprobs"]


def test_embeddings_are_those_of_the_model(smollm2_path, make):
    """Nothing is generated, so nothing is steered; the next request is."""
    texts = ["a cat", "a somewhat longer text about cats"]
    embedding = new_llama(smollm2_path, embedding=True, pooling_type=1)
    want = embedding.embed(texts)
    with steer(embedding, make(True)):
        assert embedding.embed(texts) == want
        assert embedding(TEXT, max_tokens=3)["steering"]["fired"]
        assert embedding.create_embedding("a cat")["data"][0]["embedding"] == want[0]


def test_steered_llama_is_the_short_form(smollm2_path, make, tmp_path):
    path = make(True).save(tmp_path / "guard")
    told = []
    short = SteeredLlama(
        str(smollm2_path), package=path, on_outcome=told.append, n_ctx=128, verbose=False
    )
    assert short(TEXT, max_tokens=2)["steering"]["fired"]
    assert told[0][0].fired
    short.steering_session.remove()
    assert type(short) is llama_cpp.Llama
    assert "steering" not in short(TEXT, max_tokens=2)


def test_contexts_in_threads_do_not_meet(smollm2_path, make):
    """Two Llamas with two packages at once: each answers as it does alone."""
    from concurrent.futures import ThreadPoolExecutor

    packages = [make(True), make(True, act=VECTOR)]

    def alone(package):
        with steer(new_llama(smollm2_path), package) as session:
            found = [answer(session.llama, tokens(session.llama, t)) for t in (TEXT, "The sea is")]
            return found, session.outcomes[0].verdicts[0].score

    want = [alone(p) for p in packages]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(alone, packages)) == want


def test_the_command_line_answers_in_llama_cpp(smollm2_path, make, tmp_path):
    import json

    from test_cli import run

    path = make(True).save(tmp_path / "guard.gguf")
    options = ["--runtime", "llama.cpp", "--model", smollm2_path, "--max-new-tokens", "4"]
    got = run("generate", path, "Name a colour.", *options, "--json")
    assert got.returncode == 0, got.stderr
    (found,) = json.loads(got.stdout)["answers"]
    assert found["fired"]
    assert found["steered"] != found["unsteered"]


def test_a_lora_stays_on(smollm2_path, llama, make, tmp_path):
    """Quiet, a steered Llama with a LoRA answers as it does without the package."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for part, shape in (("lora_a", (4, 576)), ("lora_b", (576, 4))):
        values = rng.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"blk.3.attn_q.weight.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapted = new_llama(smollm2_path, lora_path=str(tmp_path / "lora.gguf"))
    want = answer(adapted, tokens(adapted))
    assert want != answer(llama, tokens(llama))
    with steer(adapted, make(False)):
        assert answer(adapted, tokens(adapted)) == want
    assert answer(adapted, tokens(adapted)) == want


# ---------------------------------------------------------------- fail closed


def test_a_lost_hook_stops_generation(llama, make):
    """A graph that runs outside an announced batch, and a batch whose nodes are not seen."""
    with steer(llama, make(True)) as session:
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
        session.context.native.pause(True)
        assert session.context.native.is_paused
        session.context.native.pause(False)
        assert answer(llama, tokens(llama)) == fine


def test_a_package_for_another_model_is_refused(llama, make):
    other = helpers.package(ModelFacts("llama", 576, 31, 49152, name="deeper"))
    before = answer(llama, tokens(llama))
    with pytest.raises(ModelMismatch, match="num_layers"):
        steer(llama, other)
    assert answer(llama, tokens(llama)) == before  # on a fresh context, and it knows


def test_images_are_refused_before_anything_is_evaluated(llama, make):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with steer(llama, make(True)), pytest.raises(UnsupportedFeature, match="image_url"):
        llama.create_chat_completion([{"role": "user", "content": [image]}])


def test_sites_and_readings_that_llama_cpp_lacks_are_refused(llama, make):
    with pytest.raises(UnsupportedFeature, match=r"layer_input\[0\]"):
        steer(llama, make(True, [reading("layer_input[0]")]))
    with steer(llama, make(True, [reading("layer_input[9]", IMAGE)])) as session:
        answer(llama, tokens(llama), 1)  # no image: zeros, as the spec says
        assert session.outcomes[0].verdicts[0].score == 0.0
    with (
        steer(
            llama, make(True, [reading("layer_input[9]", {"type": "prompt_end", "offset": -40})])
        ),
        pytest.raises(RowMappingLost, match="a prompt of 41 rows"),
    ):
        answer(llama, tokens(llama), 1)


def test_a_calibration_for_this_quantisation_is_used(llama, make):
    package = make(False)
    raw = package.spec.model_dump(exclude_unset=True)
    entry = {"runtime": "llama.cpp", "quantisation": "Q4_1", "thresholds": {"p": -1e9}}
    fitted = SteeringPackage(parse({**raw, "calibrations": [entry]}), package.tensors)
    with steer(llama, fitted) as session:
        answer(llama, tokens(llama), 1)
        assert session.outcomes[0].fired
        assert session.outcomes[0].verdicts[0].threshold == -1e9
