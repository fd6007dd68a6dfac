"""Requests that a guess would get wrong in transformers: each is right, or stops before a token."""

from __future__ import annotations

import copy
import functools
import threading

import pytest

import helpers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from oracle import oracle  # noqa: E402
from steerbridge.errors import (  # noqa: E402
    DataError,
    HookLost,
    RowMappingLost,
    SteerbridgeError,
    SteeredCache,
    UnsupportedFeature,
)
from steerbridge_hf import steer  # noqa: E402
from steerbridge_hf.sites import facts  # noqa: E402
from tiny_requests import (  # noqa: E402
    ADD,
    CACHE,
    PROBE,
    PROMPTS,
    batch,
    forward,
    generate,
    half_fired,
)

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("no_grad")]
END = {**PROBE, "readings": PROBE["readings"][:1]}
MEAN = {**PROBE, "readings": PROBE["readings"][1:2]}
ALWAYS = {**END, "threshold": -1e9}


def always(model, *acts):
    """A package whose rule always holds."""
    acts = acts or (helpers.head(),)
    rules = [helpers.rule(["p"], [act["id"] for act in acts])]
    return helpers.package(facts(model), probes=[ALWAYS], interventions=list(acts), rules=rules)


# ---------------------------------------------------------------- what stands before a prompt


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
@pytest.mark.parametrize("probe", [END, MEAN], ids=["end", "mean"])
def test_virtual_tokens_are_rows_before_the_prompt(kind, probe):
    """PEFT puts them before the prompt's embeddings, and its mask before the prompt's."""
    import peft

    model = helpers.tiny()
    settings = {
        "prompt": peft.PromptTuningConfig,
        "p-tuning": functools.partial(peft.PromptEncoderConfig, encoder_hidden_size=16),
    }[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, settings).eval()
    package = helpers.package(facts(model), probes=[probe])
    inputs = {name: tensor[:1] for name, tensor in batch(PROMPTS[1:2]).items()}
    with steer(tuned, package) as session:
        seen = _input_of_block(model, 1 if probe is MEAN else 2)
        tuned.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
    rows = seen[0][0]
    assert len(rows) == len(PROMPTS[1]) + 3
    read = rows.mean(dim=0) if probe is MEAN else rows[-1]
    spec = package.spec.probes[0]
    want = float(read.double() @ torch.from_numpy(package.tensors[spec.weight].float32()).double())
    assert session.outcomes[0].verdicts[0].score == pytest.approx(want + spec.bias, abs=1e-4)


def _input_of_block(model, layer):
    seen = []
    model.model.layers[layer].register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    return seen


def test_a_generate_that_evaluates_a_prefix_first_is_right_or_stops(tiny_llama):
    package, fired = half_fired(tiny_llama, probes=[MEAN])

    def twice(model, input_ids, **kwargs):
        """Evaluates a part of the prompt, then all of it again."""
        model(input_ids[:, :2])
        out = model(input_ids)
        return torch.cat([input_ids, out.logits[:, -1:].argmax(-1)], dim=1)

    def parts(model, input_ids, **kwargs):
        cache = model(input_ids[:, :2])[CACHE]
        out = model(input_ids[:, 2:], **{CACHE: cache})
        return torch.cat([input_ids, out.logits[:, -1:].argmax(-1)], dim=1)

    with steer(tiny_llama, package) as session:
        for i, prompt in enumerate(PROMPTS[:3]):
            ids = torch.tensor([prompt])
            with pytest.raises(RowMappingLost, match="evaluated once"):
                tiny_llama.generate(ids, custom_generate=twice, pad_token_id=0)
            tiny_llama.generate(ids, custom_generate=parts, pad_token_id=0)
            assert session.outcomes[0].fired == fired[i]


# ---------------------------------------------------------------- what generate prepares


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_is_the_one_that_generate_infers(side):
    """The pad token of the model's own configuration, merged into the one that is given."""
    model = helpers.tiny()
    model.generation_config.pad_token_id = 0
    package, fired = half_fired(model)
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
    ids = batch(side=side)["input_ids"]
    plain = model.generate(ids, generation_config=copy.deepcopy(config))
    with steer(model, package) as session:
        steered = model.generate(ids, generation_config=copy.deepcopy(config))
    assert [o.fired for o in session.outcomes] == fired
    for row, held in enumerate(fired):
        assert held or torch.equal(plain[row], steered[row])


def test_a_generate_that_another_library_wrapped(tiny_llama):
    package, fired = half_fired(tiny_llama)
    original = tiny_llama.generate

    def wrapped(*args, **kwargs):
        return original(*args, **kwargs)

    with steer(tiny_llama, package) as session:
        want = generate(tiny_llama)
    object.__setattr__(tiny_llama, "generate", wrapped)
    try:
        with steer(tiny_llama, package) as session:
            assert generate(tiny_llama) == want
            assert [o.fired for o in session.outcomes] == fired
        assert tiny_llama.generate is wrapped
    finally:
        del tiny_llama.generate


def test_a_mask_of_one_row_is_that_of_every_prompt(tiny_llama):
    package, _ = half_fired(tiny_llama)
    ids = torch.tensor([[5, 9, 13], [7, 3, 11], [40, 41, 42], [30, 31, 32]])
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with steer(tiny_llama, package) as session:
        tiny_llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
        want = session.outcomes
        tiny_llama.generate(ids, attention_mask=torch.ones(1, 3, dtype=torch.long), **options)
        assert [o.fired for o in session.outcomes] == [o.fired for o in want]
        assert len(session.outcomes) == 4


def test_a_prompt_of_embeddings(tiny_llama):
    package, fired = half_fired(tiny_llama)
    with steer(tiny_llama, package) as session:
        for i, prompt in enumerate(PROMPTS):
            embeds = tiny_llama.get_input_embeddings()(torch.tensor([prompt]))
            tiny_llama.generate(inputs_embeds=embeds, max_new_tokens=3, pad_token_id=0)
            assert session.outcomes[0].fired == fired[i]


# ---------------------------------------------------------------- hooks and modules


def _clear(model):
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()


def _swap_block(model):
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])
    _clear(model.model.layers[2])


def _shorten(model):
    model.config.num_hidden_layers = 2
    model.model.layers = model.model.layers[:2]


def _swap_head(model):
    model.lm_head = copy.deepcopy(model.lm_head)


def _lora_on_head(model):
    import peft

    config = peft.LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("change", [_clear, _swap_block, _shorten, _swap_head, _lora_on_head])
def test_a_model_that_changed_after_steer_stops(change):
    model = helpers.tiny()
    package = always(model, helpers.head(), {**ADD, "id": "v"})
    session = steer(model, package)
    change(model)
    with pytest.raises(HookLost):
        generate(model)
    if change is not _clear:
        with pytest.raises(HookLost):
            forward(session, model, batch())


def test_a_final_norm_that_is_swapped_or_used_twice_changes_nothing():
    """The stream that enters it is read where the last block gives it."""
    model = helpers.tiny()
    last = helpers.linear_probe(readings=[helpers.reading("layer_input[4]")])
    package, fired = half_fired(model, probes=[last])
    with steer(model, package) as session:
        want = generate(model)
        model.model.norm = copy.deepcopy(model.model.norm)
        assert generate(model) == want
        assert [o.fired for o in session.outcomes] == fired


def test_a_module_that_is_called_twice_is_refused():
    model = helpers.tiny()
    block = model.model.layers[2]
    inner = block.forward
    block.forward = lambda h, *args, **kwargs: inner(h, *args, **kwargs)

    def forward_twice(h, *args, **kwargs):
        block.forward = inner
        block(h, *args, **{**kwargs, "use_cache": False})
        block.forward = forward_twice
        return inner(h, *args, **kwargs)

    block.forward = forward_twice
    with pytest.raises(UnsupportedFeature, match="2 times"):
        steer(model, helpers.package(facts(model), probes=[END]))


# ---------------------------------------------------------------- loops of forward calls


def _greedy(session, model, prompt, new, cached=True, chunk=0):
    """The tokens of a loop as users write it."""
    ids = torch.tensor([prompt])
    with session.request(torch.ones_like(ids)):
        cache, tokens = None, list(prompt)
        parts = ids.split(chunk, dim=1) if chunk else (ids,)
        for part in parts:
            out = model(part, **({CACHE: cache} if cached else {}))
            cache = out[CACHE]
        for _ in range(new):
            tokens.append(int(out.logits[0, -1].argmax()))
            if cached:
                out = model(torch.tensor([tokens[-1:]]), **{CACHE: cache})
                cache = out[CACHE]
            else:
                out = model(torch.tensor([tokens]), use_cache=False)
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "how", [{}, {"cached": False}, {"chunk": 1}, {"chunk": 2}], ids=["cache", "none", "one", "two"]
)
def test_a_loop_is_steered_to_its_end(tiny_llama, how):
    package, fired = half_fired(
        tiny_llama, interventions=[helpers.head(), ADD], rules=[helpers.rule(["p"], ["v", "h"])]
    )
    want = [oracle(tiny_llama, package, prompt, 6, eos=-1)[1] for prompt in PROMPTS]
    with steer(tiny_llama, package) as session:
        for i, prompt in enumerate(PROMPTS):
            assert _greedy(session, tiny_llama, prompt, 6, **how) == want[i]
            assert session.outcomes[0].fired == fired[i]


def test_a_loop_with_drafts_that_are_taken_back(tiny_llama):
    package = always(tiny_llama)
    ids = torch.tensor([PROMPTS[0]])
    with steer(tiny_llama, package) as session:
        want = _greedy(session, tiny_llama, PROMPTS[0], 3)
        with session.request(torch.ones_like(ids)):
            out = tiny_llama(ids)
            tokens, cache = [int(out.logits[0, -1].argmax())], out[CACHE]
            for _ in range(2):
                out = tiny_llama(torch.tensor([[tokens[-1], 1, 1]]), **{CACHE: cache})
                tokens.append(int(out.logits[0, 0].argmax()))
                cache.crop(-2)
    assert tokens == want


def test_another_last_token_is_another_request(tiny_llama):
    ids = torch.tensor([PROMPTS[0]])
    with steer(tiny_llama, always(tiny_llama)) as session, session.request(torch.ones_like(ids)):
        cache = tiny_llama(ids)[CACHE]
        cache.crop(-1)
        with pytest.raises(RowMappingLost, match="evaluated once"):
            tiny_llama(torch.tensor([[60]]), **{CACHE: cache})


def test_other_embeddings_in_one_request_stop(tiny_llama):
    """Without a cache and without ids, another prompt looks like the same one, grown."""
    embed = tiny_llama.get_input_embeddings()
    first, other = (embed(torch.tensor([PROMPTS[i]])) for i in (1, 2))
    with (
        steer(tiny_llama, always(tiny_llama)) as session,
        session.request(torch.ones(1, len(PROMPTS[1]))),
    ):
        tiny_llama(inputs_embeds=first, use_cache=False)
        with pytest.raises(RowMappingLost, match="evaluated once"):
            tiny_llama(inputs_embeds=other, use_cache=False)


def test_rows_that_change_places_stop(tiny_llama):
    package, _ = half_fired(tiny_llama)
    inputs = batch()
    mask = inputs["attention_mask"]
    with steer(tiny_llama, package) as session, session.request(mask):
        cache = tiny_llama(**inputs)[CACHE]
        cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
        with pytest.raises(RowMappingLost, match="other rows"):
            tiny_llama(
                torch.tensor([[4]] * 4),
                attention_mask=torch.cat([mask.flip(0), torch.ones(4, 1, dtype=mask.dtype)], 1),
                **{CACHE: cache},
            )


def test_prompts_packed_into_one_row_stop(tiny_llama):
    ids = torch.tensor([PROMPTS[0] + PROMPTS[1]])
    at = torch.tensor([[*range(5), *range(3)]])
    with steer(tiny_llama, always(tiny_llama)) as session, session.request(torch.ones_like(ids)):
        with pytest.raises(RowMappingLost, match="packed"):
            tiny_llama(ids, position_ids=at)
        tiny_llama(ids)


def test_a_turn_on_a_kept_cache_is_a_request_of_its_own(tiny_llama):
    first, whole = PROMPTS[2], PROMPTS[2] + PROMPTS[0]
    package, _ = half_fired(tiny_llama, probes=[END])
    [verdict], _ = oracle(tiny_llama, package, whole, 0)
    layers = always(tiny_llama, {**ADD, "id": "v"})
    for guard in (package, layers):
        with steer(tiny_llama, guard) as session:
            with session.request(torch.ones(1, len(first))):
                cache = tiny_llama(torch.tensor([first]))[CACHE]
            turn = {"input_ids": torch.tensor([whole[len(first) :]]), CACHE: cache}
            if guard is package:
                with session.request(torch.ones(1, len(whole))):
                    tiny_llama(**turn)
                assert session.outcomes[0].verdicts[0].score == pytest.approx(
                    verdict.score, abs=1e-4
                )
                continue
            with pytest.raises(SteeredCache), session.request(torch.ones(1, len(whole))):
                tiny_llama(**turn)


def test_a_bare_call_is_refused_and_says_what_to_write(tiny_llama):
    with (
        steer(tiny_llama, always(tiny_llama)),
        pytest.raises(UnsupportedFeature, match=r"with session\.request"),
    ):
        tiny_llama(**batch())


def test_a_request_that_ends_before_its_prompt_is_told(tiny_llama):
    ids = torch.tensor([PROMPTS[0]])
    with steer(tiny_llama, always(tiny_llama)) as session:
        with (
            pytest.raises(RowMappingLost, match="before its prompt"),
            session.request(torch.ones_like(ids)),
        ):
            tiny_llama(ids[:, :3])
        assert _greedy(session, tiny_llama, PROMPTS[0], 2)  # the next one is whole


def test_a_pass_whose_mask_has_another_width_stops(tiny_llama):
    ids = torch.tensor([PROMPTS[0]])
    with (
        steer(tiny_llama, always(tiny_llama)) as session,
        pytest.raises(RowMappingLost, match="over 9 columns"),
        session.request(torch.ones_like(ids)),
    ):
        tiny_llama(ids, attention_mask=torch.ones(1, 9, dtype=torch.long))


# ---------------------------------------------------------------- state


def test_autocast_and_the_default_dtype_change_no_score():
    model = helpers.tiny()
    package = helpers.package(facts(model), probes=[PROBE])
    with steer(model, package) as session:
        generate(model)
        want = [o.verdicts[0].score for o in session.outcomes]
        seen = []
        handle = model.model.layers[1].register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        torch.set_default_dtype(torch.bfloat16)
        try:
            generate(model)
        finally:
            torch.set_default_dtype(torch.float32)
        handle.remove()
        assert [o.verdicts[0].score for o in session.outcomes] == want
    # Under autocast the model itself is rougher; the kernels are not.
    from steerbridge_torch import Weights, kernels

    probe, x = package.spec.probes[0], torch.randn(64, 48)
    none = torch.zeros(64, dtype=torch.bool)
    plain, _ = kernels.judge(probe, Weights(package), x, none)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = kernels.judge(probe, Weights(package), x, none)
    assert torch.equal(plain, inside)


def test_nothing_outlives_an_exception(tiny_llama):
    package = always(tiny_llama)

    def fail(*_args):
        raise MemoryError

    with steer(tiny_llama, package) as session:
        handle = tiny_llama.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            generate(tiny_llama)
        handle.remove()
        with pytest.raises(RowMappingLost, match="outside a forward pass"):
            tiny_llama.model(torch.tensor([[1, 2]]))
        with pytest.raises(UnsupportedFeature):
            tiny_llama(torch.tensor([[1, 2]]))
        generate(tiny_llama)
        assert session.outcomes[0].fired


def test_outcomes_are_those_of_the_asking_thread(tiny_llama):
    package, fired = half_fired(tiny_llama)
    told = {}
    with steer(tiny_llama, package) as session:
        generate(tiny_llama, batch(PROMPTS[:1]))
        mine = session.outcomes

        def other():
            told["before"] = session.outcomes
            generate(tiny_llama, batch(PROMPTS[1:2]))
            told["after"] = session.outcomes

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert session.outcomes == mine
    assert told["before"] == ()
    assert told["after"][0].fired == fired[1] != fired[0]


def test_a_static_cache_that_was_emptied_is_not_steered_any_more(tiny_llama):
    layers = {"interventions": [ADD], "rules": [helpers.rule(["p"], ["v"])], "probes": [END]}
    package, fired = half_fired(tiny_llama, **layers)
    fires, quiet = fired.index(True), fired.index(False)
    cache = transformers.StaticCache(tiny_llama.config, max_cache_len=64)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, CACHE: cache}
    with steer(tiny_llama, package):
        generate(tiny_llama, batch(PROMPTS[fires : fires + 1]), **options)
        cache.reset()
        [said] = generate(tiny_llama, batch(PROMPTS[quiet : quiet + 1]), **options)
        turn = batch([[*PROMPTS[quiet], *said, 9]])
        generate(tiny_llama, turn, **options)  # goes on from a cache that nothing steered


def test_a_prompt_beyond_learned_positions_says_so():
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    probe = helpers.linear_probe(readings=[helpers.reading("layer_input[1]")])
    with (
        steer(model, helpers.package(facts(model), probes=[probe])),
        pytest.raises(DataError, match="16 tokens at most"),
    ):
        generate(model, batch([list(range(3, 30))]))


def test_padding_that_is_not_a_number_is_nobodys():
    """A mean leaves padding out, whatever it holds."""
    from steerbridge.plan import plan
    from steerbridge_hf.request import Requests, Step
    from steerbridge_torch import Weights

    model = helpers.tiny()
    package = helpers.package(facts(model), probes=[MEAN])
    laid = plan(package.spec)
    mask = torch.tensor([[False, True, True]])
    h = torch.randn(1, 3, 16)
    scores = []
    for padding in (0.0, float("nan")):
        h[0, 0] = padding
        requests = Requests(package, laid, Weights(package), mask, None)
        step = Step(0, 3, None, torch.arange(3), torch.arange(3), cached=False)
        requests.begin(step)
        for stop in laid.stops:
            requests.visit(stop, h, step, step.columns)
        [outcome] = requests.outcomes()
        assert not outcome.verdicts[0].unjudged
        scores.append(outcome.verdicts[0].score)
    assert scores[0] == scores[1]


def test_every_way_to_ask_ends_in_an_outcome_or_a_typed_error(tiny_llama):
    package = always(tiny_llama)
    ways = [
        {"num_beams": 2},
        {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"prompt_lookup_num_tokens": 3},
        {"token_healing": True},
        {"guidance_scale": 1.5},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"use_cache": False},
    ]
    with steer(tiny_llama, package) as session:
        for way in ways:
            try:
                generate(tiny_llama, batch(PROMPTS[:1]), **way)
            except SteerbridgeError:
                continue
            except (ValueError, OSError, ImportError, NotImplementedError):
                continue  # transformers itself does not do it (any more)
            assert session.outcomes[0].fired, way
