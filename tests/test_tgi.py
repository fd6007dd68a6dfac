"""The TGI plugin on a simulator of the server's flash classes, against the numpy oracle."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import helpers
from helpers import LOW_RANK, MEAN, add_vector, head, linear_probe, reading, rule, site

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent / "tgi"))
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig

import flash
from oracle import oracle
from steerbridge.errors import (
    HookLost,
    ModelMismatch,
    RowMappingLost,
    UnsupportedFeature,
)
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge.spec import Calibration
from steerbridge_hf.sites import facts as hf_facts
from steerbridge_tgi import attach, continued
from steerbridge_torch import quantisation

pytestmark = pytest.mark.hf

NEW = 6
VECTOR = add_vector(2, alpha=3.0)


@pytest.fixture(autouse=True)
def server_modules(monkeypatch, tmp_path):
    """Fake modules of the server, and the file for the plugin's events."""
    for name, module in flash.server_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("STEERBRIDGE_EVENTS", str(tmp_path / "events.jsonl"))


@pytest.fixture(scope="module")
def llama():
    return helpers.tiny("llama")


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, 64, (length,), generator=generator).tolist()
        for length in (5, 9, 14, 6, 11, 7)
    ]


def made(llama, prompts, acts, readings=None):
    """A package that fires on half of the prompts, and the oracle's answers to all of them."""
    readings = readings or [reading("layer_input[2]"), reading("layer_input[1]", MEAN)]
    first = helpers.package(
        hf_facts(llama),
        seed=3,
        probes=[linear_probe(readings=readings)],
        interventions=acts,
        rules=[rule(["p"], [a["id"] for a in acts])],
    )
    scores = sorted(oracle(llama, first, p, 0)[0][0].score for p in prompts)
    middle = len(scores) // 2
    probe = first.spec.probes[0].replace(threshold=(scores[middle - 1] + scores[middle]) / 2)
    package = SteeringPackage(first.spec.replace(probes=(probe,)), first.tensors)
    return package, [oracle(llama, package, p, NEW, eos=-1) for p in prompts]


def attached(llama, package, tmp_path, graphs=()):
    """A service with the plugin attached, warmed up as TGI does."""
    model = flash.FlashCausalLM(llama, graphs)
    service = flash.service(model)
    attach.attach(service, str(package.save(tmp_path / "guard.gguf")))
    model.warmup()
    return service


def events(tmp_path):
    return helpers.json_lines((tmp_path / "events.jsonl").read_text())


@pytest.fixture(scope="module", params=["head", "vector", "both"])
def case(request, llama, prompts):
    acts = {"head": [head(weight=LOW_RANK, eps=2.0)], "vector": [VECTOR]}
    acts["both"] = [*acts["head"], *acts["vector"]]
    package, want = made(llama, prompts, acts[request.param])
    fired = [v[0].fired for v, _ in want]
    assert set(fired) == {True, False}
    changed = [oracle(llama, without(package), p, NEW, eos=-1)[1] for p in prompts]
    assert [a != t for a, (_, t) in zip(changed, want, strict=True)] == fired
    return package, want


def without(package):
    """The same package with a probe that never fires."""
    probe = package.spec.probes[0].replace(threshold=1e9)
    return SteeringPackage(package.spec.replace(probes=(probe,)), package.tensors)


class Schedule:
    """Draws which requests take part in the next step, in which order."""

    def __init__(self, draw, prompts, chunks, drafts):
        self.draw, self.chunks, self.drafts = draw, chunks, drafts
        order = draw(st.permutations(range(len(prompts))))
        slots = iter(range(1, flash.SLOTS))
        self.waiting = [
            flash.Request(
                i, list(prompts[i]), [next(slots) for _ in range(len(prompts[i]) + NEW + 3)]
            )
            for i in order
        ]
        self.live = []
        self.done = {}

    def admit(self):
        for _ in range(self.draw(st.integers(0, 2))):
            if self.waiting:
                self.live.append(self.waiting.pop())
        if not self.live and self.waiting:
            self.live.append(self.waiting.pop())

    def step(self, model):
        self.admit()
        self.live = list(self.draw(st.permutations(self.live)))
        prefilling = [r for r in self.live if r.rows < len(r.prompt)]
        drafts = 0 if prefilling or not self.drafts else self.draw(st.integers(0, 2))
        work = []
        for request in self.live:
            left = len(request.prompt) - request.rows
            if left > 0:
                rows = self.draw(st.integers(1, left)) if self.chunks else left
                work.append(flash.Work(request, rows))
            else:
                guesses = self.draw(st.lists(st.integers(3, 63), min_size=drafts, max_size=drafts))
                work.append(flash.Work(request, 1 + drafts, tuple(guesses)))
        flash.step(model, work)
        for request in self.live:
            if len(request.answer) >= NEW:
                self.done[request.id] = request.answer[:NEW]
        self.live = [r for r in self.live if r.id not in self.done]


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [(), (2, 8)], ids=["eager", "graphs"])
@pytest.mark.parametrize("shape", ["whole", "chunks", "drafts"])
def test_every_schedule_answers_as_the_oracle(case, llama, prompts, tmp_path, graphs, shape):
    """Batches are merged, filtered and reordered at random; prompts may arrive in chunks."""
    package, want = case
    service = attached(llama, package, tmp_path, graphs)

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def run(data):
        (tmp_path / "events.jsonl").write_text("")
        asyncio.run(service.ClearCache(None, None))
        schedule = Schedule(data.draw, prompts, shape == "chunks", shape == "drafts")
        while schedule.waiting or schedule.live:
            schedule.step(service.model)
        told = {e["request"]: e for e in events(tmp_path)}
        assert len(told) == len(prompts)
        for i, (verdicts, tokens) in enumerate(want):
            assert schedule.done[i] == list(tokens), i
            [probe] = told[i]["probes"]
            assert probe["fired"] == verdicts[0].fired
            assert probe["score"] == pytest.approx(verdicts[0].score, rel=1e-3, abs=1e-3)

    run()


def request(prompt, id=0):
    return flash.Request(id, list(prompt), list(range(1 + 64 * id, 64 * (id + 1))))


def whole(one):
    return flash.Work(one, len(one.prompt) - one.rows)


def test_requests_are_forgotten_with_their_batch(case, llama, prompts, tmp_path):
    service = attached(llama, case[0], tmp_path)
    one, two = request(prompts[0]), request(prompts[1], 1)
    flash.step(service.model, [whole(one), whole(two)])
    service.cache.cache[1] = SimpleNamespace(requests=[one])
    asyncio.run(service.FilterBatch(None, None))
    flash.step(service.model, [flash.Work(one, 1)])
    with pytest.raises(RowMappingLost, match="request 1: an answer without a verdict"):
        flash.step(service.model, [flash.Work(two, 1)])


def test_an_id_that_comes_again_is_a_new_request(case, llama, prompts, tmp_path):
    """A restarted router counts from 0."""
    package, want = case
    service = attached(llama, package, tmp_path)
    for i in (0, 1, 0):
        again = request(prompts[i])
        flash.step(service.model, [whole(again)])
        while len(again.answer) < NEW:
            flash.step(service.model, [flash.Work(again, 1)])
        assert again.answer == list(want[i][1])
    assert [bool(e["fired"]) for e in events(tmp_path)[1:]] == [
        want[i][0][0].fired for i in (0, 1, 0)
    ]


def answered(service, one, tokens):
    """Run a request until it has so many tokens, as the router limits it."""
    one.most = tokens
    while len(one.answer) < tokens:
        rows = len(one.prompt) - one.rows
        flash.step(service.model, [flash.Work(one, rows if rows > 0 else 1)])
    return one.answer


@pytest.mark.parametrize("chunk", [100, 4])
def test_an_answer_that_the_router_asks_for_in_parts_is_one(case, llama, prompts, tmp_path, chunk):
    """Its rows are steered as if they had stayed in the cache, and it is judged once."""
    package, want = case
    service = attached(llama, package, tmp_path)
    for i, (prompt, (verdicts, tokens)) in enumerate(zip(prompts, want, strict=True)):
        said = list(answered(service, request(prompt, 3 * i), 2))
        for part in (1, 2):
            one = request([*prompt, *said], 3 * i + part)
            while len(one.prompt) - one.rows > chunk:
                flash.step(service.model, [flash.Work(one, chunk)])
            said += answered(service, one, 2)
        assert said == list(tokens)
        told = events(tmp_path)[-3:]
        assert {bool(e["fired"]) for e in told} == {verdicts[0].fired}
        assert len({e["probes"][0]["score"] for e in told}) == 1


def test_nothing_can_be_appended_to_an_answer_that_did_not_fire(case, llama, prompts, tmp_path):
    package, want = case
    service = attached(llama, package, tmp_path)
    fires = next(i for i, (v, _) in enumerate(want) if v[0].fired)
    quiet = next(i for i, (v, _) in enumerate(want) if not v[0].fired)
    for i in (fires, quiet):
        one = request(prompts[i])
        said = answered(service, one, 2)
        more = request([*prompts[i], *said, 7, 8, 9], 1)
        flash.step(service.model, [whole(more)])
        first, then = events(tmp_path)[-2:]
        alone = oracle(llama, package, more.prompt, 0)[0][0].score
        held = first["probes"][0]["score"]
        expected = held if i == fires else alone
        assert then["probes"][0]["score"] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_the_last_requests_that_ended_for_length_are_remembered():
    known, quiet = continued.Continued(), Outcome((), ())
    fired = Outcome((), ("r",))
    for i in range(continued.REMEMBERED + 5):
        known.add(f"prompt {i}".encode(), continued.Verdict(3, 5, fired, {0: 1.0}))
    assert known.find(b"prompt 4", 5) is None
    assert known.find(b"prompt 5000", 5) is not None
    assert known.find(b"prompt 5000 and more", 7) is not None
    known.add(b"harmless", continued.Verdict(3, 5, quiet, {}))
    assert known.find(b"harmless", 5) is not None
    assert known.find(b"harmless and more", 7) is None
    assert known.find(b"harmless", 4) is None


def test_nothing_can_be_cut_off_an_answer_that_did_not_fire(case, llama, prompts, tmp_path):
    """`truncate` leaves the end of a text; one that fired is steered from its last row at least."""
    package, want = case
    service = attached(llama, package, tmp_path)
    for i, (prompt, (verdicts, _)) in enumerate(zip(prompts, want, strict=True)):
        said = list(answered(service, request(prompt, 2 * i), 2))
        whole_text = [*prompt, *said]
        one = request(whole_text[-4:], 2 * i + 1)
        one.sent = whole_text
        flash.step(service.model, [whole(one)])
        told = events(tmp_path)[-1]
        if verdicts[0].fired:
            assert told["fired"] == ["r"]
        else:
            alone = oracle(llama, package, one.prompt, 0)[0][0].score
            assert told["probes"][0]["score"] == pytest.approx(alone, rel=1e-3, abs=1e-3)


def test_prompts_that_do_not_follow_on_are_refused(case, llama, prompts, tmp_path):
    service = attached(llama, case[0], tmp_path)
    one = request(prompts[2])
    flash.step(service.model, [flash.Work(one, 4)])
    one.rows += 1
    with pytest.raises(RowMappingLost, match="expected row 4 of its prompt, found 5"):
        flash.step(service.model, [whole(one)])
    two = request(prompts[2], 1)
    two.rows = 3
    with pytest.raises(RowMappingLost, match="lies in a cached prefix of 3 tokens"):
        flash.step(service.model, [whole(two)])


def test_the_router_s_own_check_is_not_judged(case, llama, tmp_path):
    service = attached(llama, case[0], tmp_path)
    health = flash.Request(2**64 - 1, [5], [0])
    flash.step(service.model, [whole(health)])
    assert [e["event"] for e in events(tmp_path)] == ["active"]


def test_a_prompt_shorter_than_a_probe_looks_back_fires(llama, prompts, tmp_path):
    back = {"site": site("layer_input[2]"), "position": {"type": "prompt_end", "offset": -3}}
    package, _ = made(llama, prompts, [head(weight=LOW_RANK)], [back])
    service = attached(llama, package, tmp_path)
    flash.step(service.model, [whole(request([7, 8]))])
    told = events(tmp_path)[-1]
    assert told["fired"] == ["r"]
    assert told["probes"][0]["score"] is None


def test_a_lost_hook_stops_the_batch(case, llama, prompts, tmp_path):
    service = attached(llama, case[0], tmp_path)
    service.model.model.model.layers[2]._forward_pre_hooks.clear()
    with pytest.raises(HookLost, match="depths"):
        flash.step(service.model, [whole(request(prompts[0]))])


def test_a_head_that_is_not_passed_stops_the_batch(case, llama, prompts, tmp_path):
    """This holds even if the package does not act at the head."""
    service = attached(llama, case[0], tmp_path)
    service.model.model.lm_head._forward_pre_hooks.clear()
    with pytest.raises(HookLost, match="depths"):
        flash.step(service.model, [whole(request(prompts[0]))])


def test_rows_that_are_missing_at_the_head_stop_the_batch(case, llama, prompts, tmp_path):
    service = attached(llama, case[0], tmp_path)
    forward = service.model.model.forward
    service.model.model.forward = lambda *inputs: forward(*inputs[:-1], inputs[-1][:1])
    with pytest.raises(RowMappingLost, match="expected 2 rows at the head, found 1"):
        flash.step(service.model, [whole(request(prompts[i], i)) for i in (0, 1)])


def test_the_model_may_not_run_behind_the_plugin(case, llama, prompts, tmp_path):
    service = attached(llama, case[0], tmp_path)
    inputs = flash._inputs([whole(request(prompts[0]))])
    with pytest.raises(HookLost, match="outside a pass"), torch.no_grad():
        service.model.model(*inputs, None)


@pytest.mark.slow
def test_every_rank_decides_as_the_first_one(llama, prompts, tmp_path):
    """Two ranks that round differently, on each side of the threshold."""
    readings = [reading("layer_input[2]")]
    first_package = helpers.package(
        hf_facts(llama),
        probes=[linear_probe(readings=readings)],
        interventions=[head(weight=LOW_RANK)],
    )
    own = oracle(llama, first_package, prompts[0], 0)[0][0].score
    other = oracle(ranks.perturbed(helpers.tiny("llama")), first_package, prompts[0], 0)[0][0].score
    assert abs(own - other) > 1e-4
    probe = first_package.spec.probes[0].replace(threshold=(own + other) / 2)
    spec = first_package.spec.replace(probes=(probe,))
    SteeringPackage(spec, first_package.tensors).save(tmp_path / "guard.gguf")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "events.jsonl").touch()
    running = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = (helpers.last_json(r.communicate(timeout=120)[0]) for r in running)
    assert first == second
    assert first[1][0] == (own > other)
    # Answers that go on as new requests keep what fired, on every rank.
    was, now = first[1][: len(prompts)], first[1][len(prompts) :]
    assert len(set(was)) == 2
    assert all(n for w, n in zip(was, now, strict=True) if w)
    told = [e for e in events(tmp_path) if e["event"] == "verdict"]
    assert len(told) == 2 * len(prompts)  # the first rank alone tells


def test_another_model_unless_its_difference_is_ignored(llama, prompts, tmp_path, monkeypatch):
    package, _ = made(llama, prompts, [head(weight=LOW_RANK)], [reading("layer_input[1]")])
    base = package.spec.base_model.replace(model_type="other")
    other = SteeringPackage(package.spec.replace(base_model=base), package.tensors)
    with pytest.raises(ModelMismatch, match="model_type"):
        attached(llama, other, tmp_path)
    monkeypatch.setenv("STEERBRIDGE_IGNORE", "model_type")
    attached(llama, other, tmp_path)


@pytest.mark.parametrize(
    ("acts", "readings", "reason"),
    [
        (
            [head(weight=LOW_RANK)],
            [reading("layer_input[1]", MEAN)],
            "needs rows that a cached prefix",
        ),
        ([VECTOR], [reading("layer_input[1]")], "would stay in the prefix cache"),
    ],
)
def test_cached_prefixes(llama, prompts, tmp_path, monkeypatch, acts, readings, reason):
    package, _ = made(llama, prompts, acts, readings)
    attached(llama, package, tmp_path)
    monkeypatch.setenv("PREFIX_CACHING", "1")
    with pytest.raises(UnsupportedFeature, match=reason):
        attached(llama, package, tmp_path)


@pytest.mark.slow
def test_a_head_guard_takes_cached_prefixes(llama, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIX_CACHING", "1")
    package, want = made(
        llama, prompts, [head(weight=LOW_RANK, eps=2.0)], [reading("layer_input[2]")]
    )
    service = attached(llama, package, tmp_path)
    for i, prompt in enumerate(prompts):
        first, again = request(prompt), request(prompt, 1 + i)
        again.slots[:3] = first.slots[:3]
        flash.step(service.model, [whole(first)])
        again.rows = 3
        flash.step(service.model, [whole(again)])
        while len(again.answer) < NEW:
            flash.step(service.model, [flash.Work(again, 1)])
        assert again.answer == list(want[i][1])


@pytest.mark.parametrize(
    ("quantize", "calibrated"), [(None, False), ("gptq", True), ("bitsandbytes-nf4", False)]
)
def test_thresholds_are_those_of_the_weights(llama, prompts, tmp_path, quantize, calibrated):
    package, _ = made(llama, prompts, [head(weight=LOW_RANK)], [reading("layer_input[1]")])
    fitted = Calibration(runtime="tgi", quantisation="GPTQ", thresholds={"p": 1e9})
    package = package.replace(calibrations=(fitted,))
    model = flash.FlashCausalLM(llama)
    model.model.config = SimpleNamespace(**llama.config.to_dict(), quantize=quantize)
    service = flash.service(model)
    attach.attach(service, str(package.save(tmp_path / "guard.gguf")))
    flash.step(model, [whole(request(prompts[0]))])
    active, verdict = events(tmp_path)
    assert active["calibrated"] == calibrated
    assert (verdict["probes"][0]["threshold"] == 1e9) == calibrated


def test_quantised_weights_have_a_name_of_their_own():
    """In both runtimes on torch: thresholds calibrated for one are not those of another."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    known = [
        (None, "BF16"),
        (four, "NF4"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "gguf"}, "BF16"),  # dequantised when it was read
    ]
    for settings_of, name in known:
        config = SimpleNamespace(quantization_config=settings_of)
        assert quantisation(torch.bfloat16, config) == name


def test_adapters_that_a_request_may_choose_are_refused(case, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_ADAPTERS", "other/adapter")
    with pytest.raises(UnsupportedFeature, match="LoRA"):
        attached(llama, case[0], tmp_path)


@pytest.mark.parametrize("name", ["Seq2SeqLM", "Mamba", "IdeficsCausalLM", "Model"])
def test_other_classes_of_models(case, llama, tmp_path, name):
    kind = type(name, (), {})
    model = kind()
    model.__dict__ |= flash.FlashCausalLM(llama).__dict__
    service = SimpleNamespace(model=model)
    with pytest.raises(UnsupportedFeature, match=f"models of the class {name}"):
        attach.attach(service, str(case[0].save(tmp_path / "guard.gguf")))
