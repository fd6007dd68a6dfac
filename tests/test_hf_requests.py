"""Which calls of a transformers model start a new request: threads, loops, turns, caches."""

from __future__ import annotations

import copy
import threading

import pytest

import helpers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from steerbridge.errors import (  # noqa: E402
    RowMappingLost,
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
    trim,
)

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("no_grad")]


def test_streaming_and_threads(tiny_llama):
    package, _ = half_fired(tiny_llama)
    with steer(tiny_llama, package) as session:
        want = [generate(tiny_llama, batch([p]))[0] for p in PROMPTS]
        got = {}

        def run(i):
            seen = []

            class Streamer:
                def put(self, value):
                    seen.extend(value.flatten().tolist())

                def end(self):
                    pass

            generate(tiny_llama, batch([PROMPTS[i]]), streamer=Streamer())
            got[i] = trim(seen[len(PROMPTS[i]) :])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert [got[i] for i in range(4)] == want
    assert session.outcomes


def test_a_loop_of_forward_calls_is_one_request(tiny_llama):
    package, fired = half_fired(tiny_llama)
    with steer(tiny_llama, package) as session:
        want = [
            generate(tiny_llama, batch([p]), min_new_tokens=3, max_new_tokens=3)[0] for p in PROMPTS
        ]
        for i, p in enumerate(PROMPTS):
            ids = torch.tensor([p])
            with session.request(torch.ones_like(ids)):
                out = tiny_llama(ids)
                tokens = [int(out.logits[0, -1].argmax())]
                while len(tokens) < 3:
                    out = tiny_llama(torch.tensor([tokens[-1:]]), **{CACHE: out[CACHE]})
                    tokens.append(int(out.logits[0, -1].argmax()))
            assert session.outcomes[0].fired == fired[i]
            if 2 not in tokens:
                assert tokens == want[i]
        with pytest.raises(UnsupportedFeature, match=r"session\.request"):
            tiny_llama(torch.tensor([[4, 5]]), **{CACHE: out[CACHE]})


def test_a_follow_up_turn_is_probed_anew(tiny_llama):
    ends = {**PROBE, "readings": PROBE["readings"][:1]}
    package, _ = half_fired(tiny_llama, probes=[ends])
    prefix, whole = PROMPTS[2], PROMPTS[2] + PROMPTS[0]
    with steer(tiny_llama, package) as session:
        cold = generate(tiny_llama, batch([whole]))
        verdict = session.outcomes
        cache = forward(session, tiny_llama, batch([prefix]))[CACHE]
        warm = generate(tiny_llama, batch([whole]), **{CACHE: copy.deepcopy(cache)})
        assert warm == cold
        assert session.outcomes[0].fired == verdict[0].fired
        unmasked = {"input_ids": torch.tensor([whole])}
        assert generate(tiny_llama, unmasked, **{CACHE: copy.deepcopy(cache)}) == cold
        assert session.outcomes[0].fired == verdict[0].fired
    means, _ = half_fired(tiny_llama)
    with steer(tiny_llama, means), pytest.raises(RowMappingLost, match="needs every row"):
        generate(tiny_llama, batch([whole]), **{CACHE: copy.deepcopy(cache)})


def test_head_steering_leaves_the_cache_alone_and_layers_taint_it(tiny_llama):
    always = {"probes": [{**PROBE, "threshold": -1e9, "readings": PROBE["readings"][:1]}]}
    options = {"return_dict_in_generate": True, "max_new_tokens": 1, "pad_token_id": 0}
    plain = tiny_llama.generate(**batch(), **options)[CACHE]
    with steer(tiny_llama, helpers.package(facts(tiny_llama), **always)):
        headed = tiny_llama.generate(**batch(), **options)[CACHE]
    for a, b in zip(plain.layers, headed.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    layers = helpers.package(
        facts(tiny_llama), **always, interventions=[ADD], rules=[helpers.rule(["p"], ["v"])]
    )
    with steer(tiny_llama, layers):
        used = tiny_llama.generate(**batch(), **options)[CACHE]
        more = batch([[*p, 9] for p in PROMPTS])
        with pytest.raises(SteeredCache):
            tiny_llama.generate(**more, **{CACHE: copy.deepcopy(used)}, **options)
