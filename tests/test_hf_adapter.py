"""The HF adapter against the numpy oracle, on tiny random models of several families."""

from __future__ import annotations

import copy
import inspect
import threading

import numpy as np
import pytest

import helpers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from oracle import oracle  # noqa: E402
from steerbridge.errors import (  # noqa: E402
    HookLost,
    ModelMismatch,
    RowMappingLost,
    SteeredCache,
    UnsupportedFeature,
)
from steerbridge_hf import steer  # noqa: E402
from steerbridge_hf.sites import facts  # noqa: E402

pytestmark = pytest.mark.hf


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


PROMPTS = [[5, 9, 13, 21, 8], [7, 3, 11], [40, 41, 42, 43, 44, 45, 46], [30, 31]]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]
NEW = 8
PARAMETERS = inspect.signature(transformers.LlamaModel.forward).parameters
CACHE = "cache" if "cache" in PARAMETERS else "past_key_values"  # renamed in transformers 5.24

ADD = {
    "id": "v",
    "type": "add_vector",
    "position": "from_prompt_end",
    "alpha": 3.0,
    "targets": [{"site": helpers.site(f"layer_output[{k}]"), "vector": f"v{k}"} for k in (2, 3)],
}
OUT = {**ADD, "id": "o", "type": "project_out", "alpha": 0.3}
PROBE = helpers.linear_probe(
    readings=[
        helpers.reading("layer_input[2]"),
        helpers.reading("layer_input[1]", helpers.MEAN),
        helpers.reading("layer_output[2]", {"type": "prompt_end", "offset": -1}),
    ]
)


def batch(prompts=PROMPTS, side="left"):
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, p in enumerate(prompts):
        part = slice(width - len(p), width) if side == "left" else slice(0, len(p))
        ids[i, part], mask[i, part] = torch.tensor(p), 1
    return {"input_ids": ids, "attention_mask": mask}


def half_fired(model, **fields):
    """A package whose first probe fires on half of PROMPTS, and which those are."""
    fields = {"probes": [PROBE], **fields}
    probe = helpers.package(facts(model), **fields)
    scores = [oracle(model, probe, p, new=0)[0][0].score for p in PROMPTS]
    limit = float(np.mean(sorted(scores)[1:3]))
    fields["probes"] = [{**fields["probes"][0], "threshold": limit}, *fields["probes"][1:]]
    return helpers.package(facts(model), **fields), [s > limit for s in scores]


def generate(model, inputs=None, **options):
    inputs = batch() if inputs is None else inputs
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    output = model.generate(**inputs, **options)
    return [trim(row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def trim(tokens):
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens


@pytest.fixture(scope="module")
def llama():
    return helpers.tiny()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("acts", "ids"),
    [([helpers.head()], ["h"]), ([ADD, OUT], ["v", "o"]), ([helpers.head(), ADD], ["v", "h"])],
    ids=["head", "layers", "both"],
)
def test_scores_verdicts_and_tokens_equal_the_oracle(family, acts, ids):
    model = helpers.tiny(family)
    package, fired = half_fired(model, interventions=acts, rules=[helpers.rule(["p"], ids)])
    with steer(model, package) as session:
        tokens = generate(model)
    plain = generate(model)
    assert [o.fired for o in session.outcomes] == fired
    for i, ids_ in enumerate(PROMPTS):
        verdicts, want = oracle(model, package, ids_, NEW)
        assert session.outcomes[i].verdicts[0].score == pytest.approx(verdicts[0].score, abs=1e-4)
        assert session.outcomes[i].rules == (("r",) if fired[i] else ())
        assert tokens[i] == want
    assert any(a != b for a, b, f in zip(tokens, plain, fired, strict=True) if f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quiet_rows_keep_their_bits(dtype):
    model = helpers.tiny().to(dtype)
    package, fired = half_fired(
        helpers.tiny(),
        interventions=[helpers.head(), ADD],
        rules=[helpers.rule(["p"], ["v", "h"])],
    )
    options = {"output_logits": True, "return_dict_in_generate": True, "min_new_tokens": NEW}
    options |= {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**batch(), **options)
    with steer(model, package) as session:
        steered = model.generate(**batch(), **options)
    assert [o.fired for o in session.outcomes] == fired
    for step, (a, b) in enumerate(zip(plain.logits, steered.logits, strict=True)):
        for row, f in enumerate(fired):
            assert torch.equal(a[row], b[row]) != f, (step, row)


def test_padding_side_does_not_change_a_verdict(llama):
    package, fired = half_fired(llama)
    with steer(llama, package) as session:
        llama(**batch(side="right"))
        right = session.outcomes
        llama(**batch(side="left"))
        left = session.outcomes
        generate(llama, batch(side="right"))
        assert [o.fired for o in session.outcomes] == fired
    for a, b in zip(right, left, strict=True):
        assert a.fired == b.fired
        assert a.verdicts[0].score == pytest.approx(b.verdicts[0].score, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda o: next(iter(o)),
)
def test_ways_to_generate_give_the_same_tokens(llama, options):
    package, fired = half_fired(
        llama, interventions=[helpers.head(), ADD], rules=[helpers.rule(["p"], ["v", "h"])]
    )
    lookup = "prompt_lookup_num_tokens" in options  # takes one prompt at a time
    inputs = [batch([p]) for p in PROMPTS] if lookup else [batch()]
    with steer(llama, package) as session:
        want = [t for b in inputs for t in generate(llama, b)]
        got, outcomes = [], []
        for b in inputs:
            got += generate(llama, b, **options)
            outcomes += session.outcomes
    assert got == want
    assert [o.fired for o in outcomes] == fired


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["beams", "beams-return", "samples"],
)
def test_rows_made_from_one_prompt_share_its_verdict(llama, options):
    package, fired = half_fired(llama)
    copies = options.get("num_return_sequences", 1)
    torch.manual_seed(0)
    plain = generate(llama, **options)
    with steer(llama, package) as session:
        torch.manual_seed(0)
        steered = generate(llama, **options)
    assert [o.fired for o in session.outcomes] == fired
    quiet = [i for i in range(len(plain)) if not fired[i // copies]]
    if not options.get("do_sample"):  # samples of a batch draw from one stream of numbers
        assert [steered[i] for i in quiet] == [plain[i] for i in quiet]
    assert steered != plain


def test_streaming_and_threads(llama):
    package, _ = half_fired(llama)
    with steer(llama, package) as session:
        want = [generate(llama, batch([p]))[0] for p in PROMPTS]
        got = {}

        def run(i):
            seen = []

            class Streamer:
                def put(self, value):
                    seen.extend(value.flatten().tolist())

                def end(self):
                    pass

            generate(llama, batch([PROMPTS[i]]), streamer=Streamer())
            got[i] = trim(seen[len(PROMPTS[i]) :])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert [got[i] for i in range(4)] == want
    assert session.outcomes


def test_a_loop_of_forward_calls_is_one_request(llama):
    package, fired = half_fired(llama)
    with steer(llama, package) as session:
        want = [generate(llama, batch([p]), min_new_tokens=3, max_new_tokens=3)[0] for p in PROMPTS]
        for i, p in enumerate(PROMPTS):
            out = llama(torch.tensor([p]))
            assert session.outcomes[0].fired == fired[i]
            tokens = [int(out.logits[0, -1].argmax())]
            while len(tokens) < 3:
                out = llama(torch.tensor([tokens[-1:]]), **{CACHE: out[CACHE]})
                tokens.append(int(out.logits[0, -1].argmax()))
            if 2 not in tokens:
                assert tokens == want[i]
        with pytest.raises(RowMappingLost, match="belongs to no known request"):
            llama(torch.tensor([[4, 5]]), **{CACHE: out[CACHE]})


def test_a_follow_up_turn_is_probed_anew(llama):
    ends = {**PROBE, "readings": PROBE["readings"][:1]}
    package, _ = half_fired(llama, probes=[ends])
    prefix, whole = PROMPTS[2], PROMPTS[2] + PROMPTS[0]
    with steer(llama, package) as session:
        cold = generate(llama, batch([whole]))
        verdict = session.outcomes
        cache = llama(torch.tensor([prefix]))[CACHE]
        warm = generate(llama, batch([whole]), **{CACHE: copy.deepcopy(cache)})
        assert warm == cold
        assert session.outcomes[0].fired == verdict[0].fired
        with pytest.raises(UnsupportedFeature, match="attention_mask"):
            llama.generate(torch.tensor([whole]), **{CACHE: copy.deepcopy(cache)})
    means, _ = half_fired(llama)
    with steer(llama, means), pytest.raises(RowMappingLost, match="needs every row"):
        generate(llama, batch([whole]), **{CACHE: copy.deepcopy(cache)})


def test_head_steering_leaves_the_cache_alone_and_layers_taint_it(llama):
    always = {"probes": [{**PROBE, "threshold": -1e9, "readings": PROBE["readings"][:1]}]}
    options = {"return_dict_in_generate": True, "max_new_tokens": 1, "pad_token_id": 0}
    plain = llama.generate(**batch(), **options)[CACHE]
    with steer(llama, helpers.package(facts(llama), **always)):
        headed = llama.generate(**batch(), **options)[CACHE]
    for a, b in zip(plain.layers, headed.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    layers = helpers.package(
        facts(llama), **always, interventions=[ADD], rules=[helpers.rule(["p"], ["v"])]
    )
    with steer(llama, layers):
        used = llama.generate(**batch(), **options)[CACHE]
        more = batch([[*p, 9] for p in PROMPTS])
        with pytest.raises(SteeredCache):
            llama.generate(**more, **{CACHE: copy.deepcopy(used)}, **options)


def test_remove_leaves_no_trace(llama):
    before, hooks = dict(llama.__dict__), [len(m._forward_pre_hooks) for m in llama.modules()]
    plain = generate(llama)
    session = steer(llama, helpers.package(facts(llama)))
    session.apply()
    generate(llama)
    session.remove()
    session.remove()
    assert llama.__dict__.keys() == before.keys()
    assert [len(m._forward_pre_hooks) for m in llama.modules()] == hooks
    assert generate(llama) == plain


def test_remove_puts_back_what_others_had_wrapped():
    model = helpers.tiny()
    plain = model.generate
    object.__setattr__(model, "generate", lambda **kwargs: plain(**kwargs))
    theirs = model.generate
    with steer(model, helpers.package(facts(model))) as session:
        generate(model)
        assert session.outcomes
    assert model.generate is theirs


def test_a_lora_model_is_steered_through_its_base():
    peft = pytest.importorskip("peft")
    model = helpers.tiny()
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    package, fired = half_fired(model)  # the adapter is inside: the base runs with it
    with steer(wrapped, package) as session:
        steered = generate(wrapped)
    assert [o.fired for o in session.outcomes] == fired
    assert steered != generate(wrapped)


def test_unconditional_rules_act_everywhere_they_say(llama):
    probes, rules = [], [helpers.rule(None, ["v"])]
    everywhere = {**ADD, "position": "all_positions"}
    results = []
    for act in (ADD, everywhere):
        package = helpers.package(facts(llama), probes=probes, interventions=[act], rules=rules)
        with steer(llama, package) as session:
            results.append(llama(**batch()).logits)
        assert session.outcomes[0].rules == ("r",)
    plain = llama(**batch()).logits
    assert torch.equal(results[0][2, :6], plain[2, :6])  # before the prompt end
    assert not torch.equal(results[0][2, 6], plain[2, 6])
    assert not torch.equal(results[1][2, :6], plain[2, :6])


def test_a_nan_in_the_states_fires(llama):
    model = helpers.tiny()
    package = helpers.package(facts(model), probes=[{**PROBE, "threshold": 1e9}])
    with steer(model, package) as session:
        model(**batch())
        assert not any(o.fired for o in session.outcomes)
        embedding = model.get_input_embeddings().weight
        with torch.no_grad():
            embedding[PROMPTS[3][1]] = float("nan")
        model(**batch())
    assert [o.fired for o in session.outcomes] == [False, False, False, True]


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


@pytest.mark.parametrize("how", ["module", "in place", "forward"])
def test_code_compiled_before_is_traced_again(how):
    """A bare call of an already traced model is steered, and plain again after `remove`."""
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


def test_pipeline(llama):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w2", padding_side="left"
    )
    package, fired = half_fired(llama)
    pipe = transformers.pipeline("text-generation", model=llama, tokenizer=fast)
    seen = []
    with steer(llama, package, on_outcome=seen.extend):
        for p in PROMPTS:
            pipe(" ".join(f"w{i}" for i in p), max_new_tokens=4, do_sample=False)
    assert [o.fired for o in seen] == fired


def test_refusals(llama):
    package = helpers.package(facts(llama))
    with steer(llama, package):
        with pytest.raises(UnsupportedFeature, match="already"):
            steer(llama, package)
        with pytest.raises(UnsupportedFeature, match="guidance_scale"):
            generate(llama, guidance_scale=2.0)
        with pytest.raises(UnsupportedFeature, match="continuous batching"):
            llama.generate_batch([[1, 2]])
        with pytest.raises(RowMappingLost, match="padding only"):
            generate(
                llama,
                {
                    "input_ids": torch.ones(1, 2, dtype=torch.long),
                    "attention_mask": torch.zeros(1, 2, dtype=torch.long),
                },
            )
        with pytest.raises(RowMappingLost, match="outside a forward pass"):
            llama.model(torch.tensor([[1, 2]]))
    with pytest.raises(ModelMismatch, match="num_layers"):
        steer(helpers.tiny(num_hidden_layers=3), package)
    with pytest.raises(UnsupportedFeature, match="not a generating model"):
        steer(llama.model, package)


def test_a_prompt_too_short_for_its_reading_stops(llama):
    reading = helpers.reading("layer_input[2]", {"type": "prompt_end", "offset": -2})
    package = helpers.package(facts(llama), probes=[helpers.linear_probe(readings=[reading])])
    with steer(llama, package), pytest.raises(RowMappingLost, match="too short"):
        generate(llama)


def test_probe_kinds_in_torch_equal_the_oracle(llama):
    output = {"type": "sigmoid", "harmful_when": "low"}
    layers = [{"weight": "a", "bias": "b"}, {"weight": "c", "bias": "d"}]
    probes = [
        helpers.linear_probe("one", link="sigmoid", input_mean="m", input_scale="s"),
        helpers.linear_probe("two", type="cosine", direction="dir", squash="tanh"),
        helpers.linear_probe("three", type="mlp", layers=layers, activation="gelu", output=output),
        helpers.linear_probe("four", readings=[helpers.reading("head_input")]),
        helpers.linear_probe("five", readings=[helpers.reading("layer_input[4]")]),
        helpers.linear_probe("six", readings=[helpers.reading("layer_input[2]", helpers.IMAGE)]),
    ]
    by_score = {"type": "score", "probe": "three", "scale": 2.0}
    rules = [
        helpers.rule(None, ["h"], condition={"type": "all", "probes": ["one", "two"]}),
        helpers.rule(["four"], ["h"], id="s", strength=by_score),
    ]
    package = helpers.package(facts(llama), scale=0.3, probes=probes, rules=rules)
    with steer(llama, package) as session:
        tokens = generate(llama)
    for i, ids in enumerate(PROMPTS):
        verdicts, want = oracle(llama, package, ids, NEW)
        for got, expected in zip(session.outcomes[i].verdicts, verdicts, strict=True):
            assert got.score == pytest.approx(expected.score, abs=1e-4), got.probe
            assert got.fired == expected.fired
        assert tokens[i] == want


def test_captured_states_do_not_know_their_neighbours():
    """Positions that are learnt count from a prompt's first token, whatever padding is before."""
    from steerbridge.data import Example
    from steerbridge.spec import Reading
    from steerbridge_hf import HfModel

    class Tokenizer:
        pad_token_id, chat_template = 0, None

        def __call__(self, text):
            return {"input_ids": [int(word) for word in text.split()]}

    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=64, pad_token_id=0
    )
    torch.manual_seed(0)
    model = HfModel(transformers.GPT2LMHeadModel(config).eval(), Tokenizer())
    prompts = [Example(" ".join(map(str, ids)), False) for ids in PROMPTS]
    readings = [
        Reading.model_validate(helpers.reading("layer_input[2]", position))
        for position in ({"type": "prompt_end"}, helpers.MEAN)
    ]
    together = np.empty((len(prompts), 2, 16), np.float32)
    model.capture(prompts, readings, together)
    for i, prompt in enumerate(prompts):
        alone = np.empty((1, 2, 16), np.float32)
        model.capture([prompt], readings, alone)
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)
