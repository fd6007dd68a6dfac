"""A package in llama-cpp-python on SmolLM2: matches transformers, and no trace if nothing fires."""

from __future__ import annotations

import numpy as np
import pytest

import helpers
from helpers import LOW_RANK, MEAN, head, linear_probe, reading, rule

llama_cpp = pytest.importorskip("llama_cpp")
from smollm2_llama import LAYER_22, TEXT, VECTOR, answer, logits, new_llama, tokens  # noqa: E402
from steerbridge.errors import (  # noqa: E402
    RowMappingLost,
    UnsupportedFeature,
)
from steerbridge.package import SteeringPackage, parse  # noqa: E402
from steerbridge_llama_cpp import SteeredContext, open_model, steer  # noqa: E402
from steerbridge_llama_cpp.model import LlamaCppModel  # noqa: E402

pytestmark = pytest.mark.llama_cpp


@pytest.mark.slow
@pytest.mark.parametrize(
    "act", [head(weight=LOW_RANK, eps=0.2), VECTOR], ids=["low-rank head", "vector"]
)
def test_f32_scores_and_tokens_equal_the_oracle(smollm2_hf, smollm2_f32_path, act):
    """Two readings, one of them a mean; half of the prompts fire."""
    from oracle import oracle
    from steerbridge.data import corpus_examples

    hf = smollm2_hf
    model = open_model(smollm2_f32_path, n_ctx=256, type_k=0, type_v=0)
    prompts = [e for e in corpus_examples("test") if len(e.text) < 80][::30][:4]
    rows = [model.render(p) for p in prompts]
    assert rows == [hf.render(p) for p in prompts]
    probe = linear_probe(readings=[*LAYER_22, reading("layer_input[16]", MEAN)])
    fields = {"scale": 0.05, "interventions": [act], "rules": [rule(["p"], [act["id"]])]}
    first = helpers.package(hf.facts, probes=[probe], **fields)
    scores = sorted(oracle(hf.model, first, r, 0)[0][0].score for r in rows)
    limit = float(np.mean(scores[1:3]))
    package = helpers.package(hf.facts, probes=[{**probe, "threshold": limit}], **fields)
    got = model.generate(prompts, package, max_new_tokens=6)
    assert sum(g.outcome.fired for g in got) == 2
    for generation, row in zip(got, rows, strict=True):
        verdicts, want = oracle(hf.model, package, row, 6)
        assert generation.outcome.verdicts[0].score == pytest.approx(verdicts[0].score, abs=1e-3)
        assert generation.outcome.fired == verdicts[0].fired
        assert list(generation.tokens) == want


def test_capture_reads_what_transformers_reads(smollm2_hf, smollm2_f32_path):
    from steerbridge.data import Example
    from steerbridge.spec import LayerInput, PromptEnd, PromptMean, Reading

    prompts = [Example("Name a colour.", False), Example("How do I bake a plain cake?", False)]
    sites = [LayerInput(stream="layer_input", layer=layer) for layer in range(1, 23)]
    ends = [PromptEnd(type="prompt_end", offset=offset) for offset in (0, -5)]
    places = [*ends, PromptMean(type="prompt_mean")]
    readings = [Reading(site=site, position=place) for site in sites for place in places]
    got, want = (np.empty((2, len(readings), 576), np.float32) for _ in range(2))
    open_model(smollm2_f32_path, n_ctx=256, type_k=0, type_v=0).capture(prompts, readings, got)
    smollm2_hf.capture(prompts, readings, want)
    assert len(readings) > 64  # more than one probe of the format holds
    np.testing.assert_allclose(got, want, atol=2e-3, rtol=2e-4)


@pytest.mark.parametrize("sizes", [{}, {"n_batch": 8}, {"n_batch": 16, "n_ubatch": 4}])
def test_micro_batches_change_no_verdict(smollm2_path, make_package, sizes):
    """Splitting a prompt into batches and micro-batches changes neither score, answer nor mean."""
    package = make_package(True, [*LAYER_22, reading("layer_input[9]", MEAN)])
    long = TEXT * 5
    small = new_llama(smollm2_path, **sizes)
    with steer(small, package) as session:
        small_answer = answer(small, tokens(small, long))
        score = session.outcomes[0].verdicts[0].score
    whole = new_llama(smollm2_path)
    with steer(whole, package) as session:
        assert small_answer == answer(whole, tokens(whole, long))
        assert session.outcomes[0].verdicts[0].score == pytest.approx(score, abs=2e-3)


def test_text_of_long_tokens(llama):
    """`Llama.detokenize` returns nothing for a token longer than 32 bytes."""
    text = f"{'-' * 45} and {'=' * 60}"
    ids = llama.tokenize(text.encode(), add_bos=False)
    assert llama.detokenize(ids).decode() != text  # llama-cpp-python 0.3.36
    assert LlamaCppModel(llama).text_of(ids) == text


@pytest.mark.parametrize(
    "readings", [LAYER_22, [reading("layer_input[12]", MEAN)]], ids=["end", "mean"]
)
def test_quiet_logits_are_bit_identical(llama, make_package, readings):
    def run():
        """Logits at the prompt end and after each of four tokens."""
        llama.reset()
        llama.eval(tokens(llama))
        seen = [logits(llama)]
        for _ in range(4):
            llama.eval([int(seen[-1].argmax())])
            seen.append(logits(llama))
        return np.array(seen)

    plain = run()
    with steer(llama, make_package(False, readings)) as session:
        quiet = run()
        assert not session.outcomes[0].fired
    assert quiet.tobytes() == plain.tobytes()
    with steer(llama, make_package(True, readings)):
        assert run().tobytes() != plain.tobytes()
    assert run().tobytes() == plain.tobytes()


def test_removing_leaves_an_ordinary_llama(llama, make_package):
    before = answer(llama, tokens(llama))
    session = steer(llama, make_package(True))
    session.apply()
    assert isinstance(llama, llama_cpp.Llama)
    assert answer(llama, tokens(llama)) != before
    with pytest.raises(UnsupportedFeature, match="steered already"):
        steer(llama, make_package(True))
    session.remove()
    session.remove()
    assert answer(llama, tokens(llama)) == before
    with pytest.raises(UnsupportedFeature, match="not attached"):
        session._tracker.context  # noqa: B018


@pytest.mark.parametrize(
    "package_acts", [head(weight=LOW_RANK, eps=0.3), VECTOR], ids=["head", "layer"]
)
def test_only_fired_sequences_of_a_batch_change(llama, make_package, package_acts):
    """Two of four sequences fire; the logits of the other two are bit-identical."""
    texts = ["A cat", "Seven grey horses run home", "Why is the sea", "Tea with milk, and then"]
    prompts = [tokens(llama, t) for t in texts]
    scores = []
    with steer(llama, make_package(False)) as session:
        for prompt in prompts:
            answer(llama, prompt, 1)
            scores.append(session.outcomes[0].verdicts[0].score)
    limit = float(np.mean(sorted(scores)[1:3]))
    package = make_package(True, act=package_acts)
    probes = tuple(p.replace(threshold=limit) for p in package.spec.probes)
    package = type(package)(package.spec.replace(probes=probes), package.tensors)

    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.n_seq_max, params.kv_unified = 4, True
    steered = SteeredContext(package, model=llama._model, params=params)
    plain = llama_cpp._internals.LlamaContext(model=llama._model, params=params, verbose=False)
    with pytest.raises(RowMappingLost, match="open request"):
        decode_all(steered, prompts)
    steered.recover()
    for seq, prompt in enumerate(prompts):
        steered.begin(seq, 0, len(prompt))
    got, want = (decode_all(c, prompts) for c in (steered, plain))
    fired = [steered.outcome(seq).fired for seq in range(4)]
    assert fired == [s > limit for s in scores]
    assert sum(fired) == 2
    for step_found, step_want in zip(got, want, strict=True):
        for seq in range(4):
            same = step_found[seq].tobytes() == step_want[seq].tobytes()
            assert same != fired[seq]
    steered.close()
    plain.close()


def decode_all(context, prompts, steps=3):
    """Logits [step][seq] of one batch with all prompts, then of tokens decoded together."""
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


def test_contexts_in_threads_do_not_meet(smollm2_path, make_package):
    """Two Llamas with different packages run in parallel; each answers as it does alone."""
    from concurrent.futures import ThreadPoolExecutor

    packages = [make_package(True), make_package(True, act=VECTOR)]

    def alone(package):
        own = new_llama(smollm2_path)
        with steer(own, package) as session:
            answers = [answer(own, tokens(own, t)) for t in (TEXT, "The sea is")]
            return answers, session.outcomes[0].verdicts[0].score

    want = [alone(p) for p in packages]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(alone, packages)) == want


def test_the_command_line_answers_in_llama_cpp(smollm2_path, make_package, tmp_path):
    import json

    from helpers import run_cli

    path = make_package(True).save(tmp_path / "guard.gguf")
    options = ["--runtime", "llama.cpp", "--model", smollm2_path, "--max-new-tokens", "4"]
    got = run_cli("generate", path, "Name a colour.", *options, "--json")
    assert got.returncode == 0, got.stderr
    (printed,) = json.loads(got.stdout)["answers"]
    assert printed["fired"]
    assert printed["steered"] != printed["unsteered"]


def test_a_lora_stays_on(smollm2_path, llama, make_package, tmp_path):
    """If no probe fires, a Llama with a LoRA answers as it does without the package."""
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
    with steer(adapted, make_package(False)):
        assert answer(adapted, tokens(adapted)) == want
    assert answer(adapted, tokens(adapted)) == want


def test_a_calibration_for_this_quantisation_is_used(llama, make_package):
    package = make_package(False)
    raw = package.spec.model_dump(exclude_unset=True)
    entry = {"runtime": "llama.cpp", "quantisation": "Q4_1", "thresholds": {"p": -1e9}}
    fitted = SteeringPackage(parse({**raw, "calibrations": [entry]}), package.tensors)
    with steer(llama, fitted) as session:
        answer(llama, tokens(llama), 1)
        assert session.outcomes[0].fired
        assert session.outcomes[0].verdicts[0].threshold == -1e9
