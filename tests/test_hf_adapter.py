"""The HF adapter against the numpy oracle, on tiny random models of several families."""

from __future__ import annotations

import numpy as np
import pytest

import helpers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from oracle import oracle  # noqa: E402
from steerbridge_hf import steer  # noqa: E402
from steerbridge_hf.sites import facts  # noqa: E402
from tiny_requests import ADD, NEW, OUT, PROBE, PROMPTS, batch, forward, generate, half_fired  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("no_grad")]


FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]


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


def test_padding_side_does_not_change_a_verdict(tiny_llama):
    package, fired = half_fired(tiny_llama)
    with steer(tiny_llama, package) as session:
        forward(session, tiny_llama, batch(side="right"))
        right = session.outcomes
        forward(session, tiny_llama, batch(side="left"))
        left = session.outcomes
        generate(tiny_llama, batch(side="right"))
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
def test_ways_to_generate_give_the_same_tokens(tiny_llama, options):
    package, fired = half_fired(
        tiny_llama, interventions=[helpers.head(), ADD], rules=[helpers.rule(["p"], ["v", "h"])]
    )
    lookup = "prompt_lookup_num_tokens" in options  # takes one prompt at a time
    inputs = [batch([p]) for p in PROMPTS] if lookup else [batch()]
    with steer(tiny_llama, package) as session:
        want = [t for b in inputs for t in generate(tiny_llama, b)]
        got, outcomes = [], []
        for b in inputs:
            got += generate(tiny_llama, b, **options)
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
def test_rows_made_from_one_prompt_share_its_verdict(tiny_llama, options):
    package, fired = half_fired(tiny_llama)
    copies = options.get("num_return_sequences", 1)
    torch.manual_seed(0)
    plain = generate(tiny_llama, **options)
    with steer(tiny_llama, package) as session:
        torch.manual_seed(0)
        steered = generate(tiny_llama, **options)
    assert [o.fired for o in session.outcomes] == [f for f in fired for _ in range(copies)]
    quiet = [i for i in range(len(plain)) if not fired[i // copies]]
    if not options.get("do_sample"):  # samples of a batch draw from one stream of numbers
        assert [steered[i] for i in quiet] == [plain[i] for i in quiet]
    assert steered != plain


def test_remove_leaves_no_trace(tiny_llama):
    before, hooks = (
        dict(tiny_llama.__dict__),
        [len(m._forward_pre_hooks) for m in tiny_llama.modules()],
    )
    plain = generate(tiny_llama)
    session = steer(tiny_llama, helpers.package(facts(tiny_llama)))
    session.apply()
    generate(tiny_llama)
    session.remove()
    session.remove()
    assert tiny_llama.__dict__.keys() == before.keys()
    assert [len(m._forward_pre_hooks) for m in tiny_llama.modules()] == hooks
    assert generate(tiny_llama) == plain


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


def test_unconditional_rules_act_everywhere_they_say(tiny_llama):
    probes, rules = [], [helpers.rule(None, ["v"])]
    everywhere = {**ADD, "position": "all_positions"}
    results = []
    for act in (ADD, everywhere):
        package = helpers.package(
            facts(tiny_llama), probes=probes, interventions=[act], rules=rules
        )
        with steer(tiny_llama, package) as session:
            results.append(forward(session, tiny_llama, batch()).logits)
        assert session.outcomes[0].rules == ("r",)
    plain = tiny_llama(**batch()).logits
    assert torch.equal(results[0][2, :6], plain[2, :6])  # before the prompt end
    assert not torch.equal(results[0][2, 6], plain[2, 6])
    assert not torch.equal(results[1][2, :6], plain[2, :6])


def test_a_nan_in_the_states_fires(tiny_llama):
    model = helpers.tiny()
    package = helpers.package(facts(model), probes=[{**PROBE, "threshold": 1e9}])
    with steer(model, package) as session:
        forward(session, model, batch())
        assert not any(o.fired for o in session.outcomes)
        embedding = model.get_input_embeddings().weight
        with torch.no_grad():
            embedding[PROMPTS[3][1]] = float("nan")
        forward(session, model, batch())
    assert [o.fired for o in session.outcomes] == [False, False, False, True]


def test_pipeline(tiny_llama):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w2", padding_side="left"
    )
    package, fired = half_fired(tiny_llama)
    pipe = transformers.pipeline("text-generation", model=tiny_llama, tokenizer=fast)
    seen = []
    with steer(tiny_llama, package, on_outcome=seen.extend):
        for p in PROMPTS:
            pipe(" ".join(f"w{i}" for i in p), max_new_tokens=4, do_sample=False)
    assert [o.fired for o in seen] == fired


def test_probe_kinds_in_torch_equal_the_oracle(tiny_llama):
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
    package = helpers.package(facts(tiny_llama), scale=0.3, probes=probes, rules=rules)
    with steer(tiny_llama, package) as session:
        tokens = generate(tiny_llama)
    for i, ids in enumerate(PROMPTS):
        verdicts, want = oracle(tiny_llama, package, ids, NEW)
        for got, expected in zip(session.outcomes[i].verdicts, verdicts, strict=True):
            assert got.score == pytest.approx(expected.score, abs=1e-4), got.probe
            assert got.fired == expected.fired
        assert tokens[i] == want


def test_captured_states_do_not_know_their_neighbours():
    """Learned positions count from the prompt's first token, regardless of padding."""
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


def test_a_calibration_is_of_one_checkpoint(tiny_llama):
    """Another checkpoint of the same shape, or a changed one, keeps the package's thresholds."""
    from steerbridge.spec import Calibration
    from steerbridge_torch import weights_sha256

    base = helpers.package(facts(tiny_llama), probes=[helpers.linear_probe(threshold=1e9)])
    fitted = Calibration(
        runtime="hf",
        quantisation="F32",
        weights=weights_sha256(tiny_llama),
        thresholds={"p": -1e9},
    )
    package = base.replace(calibrations=(fitted,))
    for model, threshold in ((tiny_llama, -1e9), (helpers.tiny(seed=1), 1e9)):
        session = steer(model, package)
        assert session.package.spec.probes[0].threshold == threshold
        session.remove()
    assert weights_sha256(tiny_llama) == fitted.weights  # steering left nothing behind
