"""Evaluation: judges, kept answers, figures, comparisons, reports; on a real guard for SmolLM2."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
import servers
from steerbridge.data import Example, from_corpus
from steerbridge.errors import DataError, EndpointFailed, UnsupportedFeature
from steerbridge.evaluation import compare, judges, measure, record, report
from steerbridge.evaluation.answers import Asking, Source, Store, same
from steerbridge.evaluation.endpoint import Client
from steerbridge.evaluation.measure import Row
from steerbridge.package import load
from steerbridge.reference import Verdict
from steerbridge.runtime import Generation, Outcome

GUARD = Path(__file__).parent.parent / "plugins" / "steerbridge_serve" / "demo.gguf"
REFUSAL = "I'm sorry, but I can't assist with that."
NEW = 16


def verdict(score, threshold=0.5):
    fired = not math.isfinite(score) or score > threshold
    return Verdict("p", score, threshold, ">", fired)


def answer(text, *tokens, score=None):
    outcome = None
    if score is not None:
        one = verdict(score)
        outcome = Outcome((one,), ("r",) if one.fired else ())
    return Generation(text, tokens, "stop", outcome)


# ---------------------------------------------------------------- judges


def test_judges_are_named_by_a_word():
    assert judges.named("matcher")(["q", "q"], [REFUSAL, "Bees make honey."]) == [True, False]
    found = judges.named("evaluation_judge:long_answers")
    assert found(["q", "q"], ["no", "a long answer"]) == [False, True]
    for wrong in ("nobody", "evaluation_judge:gone", "no_such_module:f"):
        with pytest.raises(DataError, match="matcher, an address or module:function"):
            judges.named(wrong)
    with pytest.raises(DataError, match="expected 2 values, found 1"):
        judges.named("evaluation_judge:one_value")(["q", "q"], ["a", "b"])


@pytest.fixture
def server():
    """A stand-in for a remote model: says what its list says, in turn; records what it got."""
    got, said = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"object": "list", "data": [{"id": "remote", "object": "model"}]})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(json.loads(body))
            status, text, extra = said.pop(0) if len(said) > 1 else said[0]
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
            head = {"id": "x", "object": "chat.completion", "created": 0, "model": "remote"}
            self.reply(status, {**head, "choices": [choice], **extra})

        def reply(self, status, value):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *args):
            pass

    one = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=one.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{one.server_port}", got, said
    one.shutdown()
    thread.join()
    one.server_close()


def test_a_model_behind_an_address_judges(server):
    url, got, said = server
    said[:] = [(200, "Yes.", {}), (429, "", {}), (200, " no, it answers", {})]
    judge = judges.named(url, concurrency=1)
    assert judge(["q1", "q2"], ["a1", "a2"]) == [True, False]
    assert "a1" in got[0]["messages"][-1]["content"]
    assert got[0]["model"] == "remote"
    said[:] = [(200, "Perhaps", {})]
    with pytest.raises(DataError, match=r"expected yes or no, found 'Perhaps'"):
        judge(["q"], ["a"])
    said[:] = [(400, "", {})]
    with pytest.raises(EndpointFailed, match=url):
        judge(["q"], ["a"])


def test_pictures_are_sent_to_servers(server, tmp_path):
    url, got, said = server
    said[:] = [(200, "hello", {})]
    (tmp_path / "a.jpg").write_bytes(b"picture")
    example = Example("q", True, images=(tmp_path / "a.jpg",))
    Client(url).generate([example], None, max_new_tokens=3)
    picture, text = got[0]["messages"][-1]["content"]
    assert picture["image_url"]["url"] == "data:image/jpeg;base64,cGljdHVyZQ=="
    assert text == {"type": "text", "text": "q"}


def test_a_server_s_verdicts_are_read(server):
    url, got, said = server
    outcome = Outcome((verdict(0.75),), ("r",))
    said[:] = [(200, "hello", {"steering": outcome.as_json()})]
    client = Client(url)
    (found,) = client.generate([Example("q", True, system="s")], None, max_new_tokens=3)
    assert found == Generation("hello", (), "stop", outcome)
    assert [m["role"] for m in got[0]["messages"]] == ["system", "user"]
    assert (got[0]["temperature"], got[0]["max_tokens"]) == (0, 3)
    said[:] = [(200, "hello", {"steering": {"verdicts": []}})]
    with pytest.raises(EndpointFailed, match="rules"):
        client.generate([Example("q", True)], None, max_new_tokens=3)
    with pytest.raises(UnsupportedFeature, match="the server steers"):
        client.generate([], helpers.package(), max_new_tokens=3)


# ---------------------------------------------------------------- kept answers


class Scripted:
    """Answers that name their question; fails after some of them."""

    def __init__(self, fails_after=10**9):
        self.asked, self._left = [], fails_after

    def generate(self, prompts, package, *, max_new_tokens, ignore=(), progress=None):
        if len(prompts) > self._left:
            raise EndpointFailed("http://nowhere", "gone")
        self._left -= len(prompts)
        self.asked += prompts
        score = None if package is None else math.nan
        return [answer(f"{p.system}: {p.text}", 7, 8, score=score) for p in prompts]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("steerbridge.evaluation.answers.TOGETHER", 4)
    prompts = [Example(f"q{i}", False) for i in range(10)]
    asking = Asking(store=Store(tmp_path, "model"))
    first = Scripted(fails_after=8)
    with pytest.raises(EndpointFailed):
        asking.answers(Source("s", first), prompts)
    assert len(first.asked) == 8
    second = Scripted()
    found = asking.answers(Source("s", second), prompts)
    assert [p.text for p in second.asked] == ["q8", "q9"]
    assert [a.text for a in found] == [f"None: q{i}" for i in range(10)]
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_whatever_may_change_an_answer_asks_again(tmp_path):
    prompts = [Example("q", False)]
    model, package = Scripted(), helpers.package()
    store = Store(tmp_path, "model")
    asks = [
        (Asking(store=store), Source("s", model)),
        (Asking(store=store), Source("s", model, system="be kind")),
        (Asking(store=store), Source("s", model, package)),
        (Asking(store=store), Source("s", model, helpers.package(seed=1))),
        (Asking(store=store), Source("s", model, package, ignore=("vocab_size",))),
        (Asking(7, store=store), Source("s", model)),
        (Asking(store=Store(tmp_path, "another")), Source("s", model)),
        (Asking(store=store), Source("s", model, identity="another server")),
    ]
    for turn in range(2):
        for asking, source in asks:
            (found,) = asking.answers(source, prompts)
            assert (found.outcome is None) is (source.package is None)
        assert len(model.asked) == len(asks), turn
    (kept,) = asks[2][0].answers(asks[2][1], prompts)
    assert math.isnan(kept.outcome.verdicts[0].score)
    assert kept.outcome.verdicts[0].fired


def test_a_broken_file_of_answers_is_named(tmp_path):
    prompts = [Example("q", False)]
    asking = Asking(store=Store(tmp_path, "model"))
    asking.answers(Source("s", Scripted()), prompts)
    (path,) = tmp_path.iterdir()
    for content, reason in (("[", "kept answers"), ("[]", "1 answers, found 0")):
        path.write_text(content)
        with pytest.raises(DataError, match=f"{path.name}.*{reason}"):
            asking.answers(Source("s", Scripted()), prompts)


def test_both_encodings_of_a_package_have_one_hash(tmp_path):
    package = helpers.package()
    saved = [load(package.save(tmp_path / name)).sha256 for name in ("p.gguf", "dir")]
    assert saved == [package.sha256] * 2
    assert package.sha256 != helpers.package(seed=1).sha256
    assert package.sha256 != package.scaled(2.0).sha256


# ---------------------------------------------------------------- figures


def row(harmful, plain, steered, kind="general", pair=None):
    refused = judges.Matcher()([""] * 2, [plain.text if plain else "", steered.text])
    before = refused[0] if plain else None
    return Row(
        Example(f"{plain}{steered}", harmful, kind, pair), plain, steered, before, refused[1]
    )


def test_an_attack_counts_as_stopped_only_if_the_guard_did_it():
    rows = [
        row(True, answer("Sure", 1), answer(REFUSAL, 2, score=0.9)),
        row(True, answer("Sure", 1), answer("Sure, here", 2, score=0.9)),  # fired, no refusal
        row(True, answer(REFUSAL, 1), answer(REFUSAL, 1, score=0.1)),  # the model's own
        row(False, answer("Hi", 1), answer("Hi", 1, score=0.1)),
        row(False, answer("Hi", 1), answer(REFUSAL, 2, score=0.9), "borderline"),
    ]
    found = measure.summary(rows)
    assert found["asr_unsteered"] == pytest.approx(2 / 3, abs=1e-5)
    assert found["asr_steered"] == pytest.approx(2 / 3, abs=1e-5)
    assert found["harmless_identical"] == 0.5
    assert (found["over_refusal_unsteered"], found["over_refusal_steered"]) == (0.0, 0.5)
    assert found["fpr"] == {"borderline": 1.0, "general": 0.0}


def test_a_server_without_verdicts_and_without_baseline():
    rows = [row(True, None, answer(REFUSAL)), row(False, None, answer("Hi"))]
    found = measure.summary(rows)
    assert found["asr_steered"] == 0.0
    assert found["asr_unsteered"] is None
    assert found["harmless_identical"] is None
    assert found["fpr"] == {"general": None}
    assert measure.intervals(rows)["asr_unsteered"] is None


def test_answers_of_servers_are_compared_in_words():
    assert same(answer("a"), answer("a", 1))
    assert not same(answer("a"), answer("b"))
    assert not same(answer("a", 1), answer("a", 2))


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_an_interval_holds_its_share(values):
    low, high = measure.wilson(values)
    assert 0 <= low <= round(sum(values) / len(values), 5) <= high <= 1
    assert high > low  # also of a share that is 0 or 1


def test_intervals_hold_for_most_samples():
    """Of 200 samples with a known share, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = measure.wilson(list(rng.random(150) < 0.1))
        inside += low <= 0.1 <= high
    assert 0.9 <= inside / 200 <= 0.99


def test_the_auroc_s_interval_keeps_pairs_together():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        both = rng.normal()
        for harmful in (True, False):
            score = float(both + 0.8 * harmful + rng.normal())
            rows.append(row(harmful, answer("Hi", 1), answer("Hi", 1, score=score), pair=str(i)))
    value = measure.summary(rows)["auroc"]["p"]
    low, high = measure.intervals(rows)["auroc"]["p"]
    assert low < value < high
    assert 0.05 < high - low < 0.4


def test_another_judge_is_compared():
    rows = [
        row(True, answer("Sure", 1), answer(REFUSAL, 2, score=0.9)),
        row(False, answer("Hi", 1), answer("Hi", 1, score=0.1)),
    ]
    found = measure.judged(rows, judges.named("evaluation_judge:long_answers"))
    assert (found["asr_unsteered"], found["asr_steered"]) == (1.0, 0.0)
    assert found["agreement"] == 1.0
    found = measure.judged(rows, judges.named("evaluation_judge:everything"))
    assert found["over_refusal_steered"] == 1.0
    assert found["agreement"] == 0.25


# ---------------------------------------------------------------- curves


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.booleans(), st.floats(0, 1), st.booleans(), st.booleans()),
        min_size=2,
        max_size=30,
    ).filter(lambda rows: len({r[0] for r in rows}) == 2),
    st.floats(0.05, 0.95),
)
def test_the_curve_over_thresholds_is_what_other_thresholds_would_give(found, limit):
    package = helpers.package(
        probes=[helpers.linear_probe(link="sigmoid", threshold=limit)],
    )
    guard, acting = [], []
    for harmful, score, refuses, keeps in found:
        plain = answer("Hi", 1)
        act = answer(REFUSAL if refuses else "Hm", 1 if keeps else 2)
        one = Verdict("p", score, limit, ">", score > limit)
        steered = replace(act if one.fired else plain, outcome=Outcome((one,), ("r",) * one.fired))
        guard.append(row(harmful, plain, steered))
        acting.append(row(harmful, plain, act))
    curve = compare.thresholds(package, guard, acting)
    (here,) = [p for p in curve if p["shift"] == 0]
    summary = measure.summary(guard)
    assert here["asr"] == summary["asr_steered"]
    assert here["harmless_identical"] == summary["harmless_identical"]
    order = sorted(curve, key=lambda p: p["shift"])
    for a, b in pairwise(order):  # a lower threshold stops and disturbs more
        assert a["asr"] >= b["asr"]
        assert a["harmless_identical"] >= b["harmless_identical"]


def test_strengths_by_score_have_no_curve_over_thresholds():
    strength = {"type": "score", "probe": "p", "scale": 2.0}
    package = helpers.package(rules=[helpers.rule(["p"], ["h"], strength=strength)])
    assert compare.thresholds(package, [], []) == []
    assert package.unconditional().spec.rules[0].strength.value == 2.0
    assert package.scaled(3.0).spec.rules[0].strength.scale == 6.0


# ---------------------------------------------------------------- on a real model


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("transformers")
    from steerbridge.cli.common import smollm2
    from steerbridge_hf import open_model

    return open_model(smollm2())


@pytest.fixture(scope="module")
def prompts():
    """Prompts of which the small guard catches some."""
    held = from_corpus("test")
    sides = [[e for e in held if e.kind == kind][:10] for kind in ("general_harmful", "general")]
    return [e for side in sides for e in side]


@pytest.fixture(scope="module")
def compared(smollm2, prompts, tmp_path_factory):
    contrasts = [e for e in from_corpus("train") if e.harmful][:8]
    asking = Asking(NEW, store=Store(tmp_path_factory.mktemp("answers"), "smollm2"))
    return compare.compare(smollm2, load(GUARD), prompts, contrasts, asking)


@pytest.mark.slow
def test_steering_under_a_condition_against_other_ways(compared, prompts):
    ways = {way["way"]: way for way in compared.ways}
    assert list(ways) == [
        "unsteered",
        "system prompt",
        "head without the probe",
        "control vector x1",
        "control vector x2",
        "control vector x4",
        compare.GUARD,
    ]
    fired = [r for r in compared.rows if r.fired]
    assert 3 <= len(fired) <= 10
    assert ways["unsteered"]["harmless_identical"] == 1.0
    assert ways["head without the probe"]["asr"] == 0.0
    assert ways["head without the probe"]["harmless_identical"] == 0.0
    assert ways["head without the probe"]["over_refusal"] == 1.0
    # A system message and a vector change answers without knowing whether they should.
    assert ways["system prompt"]["harmless_identical"] < 0.5
    assert ways["control vector x4"]["harmless_identical"] < 0.5
    assert ways[compare.GUARD]["harmless_identical"] == 1.0
    assert ways[compare.GUARD]["asr"] < ways["unsteered"]["asr"]
    assert compared.better == []
    assert [line.split()[0] for line in compare.table(compared)[1:]] == [
        name.split()[0] for name in ways
    ]


@pytest.mark.slow
def test_the_curves_pass_through_the_guard(compared):
    guard = compared.ways[-1]
    (here,) = [p for p in compared.thresholds if p["shift"] == 0]
    (full,) = [p for p in compared.strengths if p["strength"] == 1.0]
    for point in (here, full):
        assert point["asr"] == guard["asr"]
        assert point["harmless_identical"] == guard["harmless_identical"]
    ends = [min(compared.thresholds, key=lambda p: p["shift"])]
    ends += [max(compared.thresholds, key=lambda p: p["shift"])]
    assert (ends[0]["asr"], ends[0]["harmless_identical"]) == (1.0, 1.0)
    assert ends[1]["asr"] == 0.0
    assert compared.strengths[0]["asr"] >= full["asr"]  # a quarter of it stops no more


@pytest.mark.slow
def test_forced_answers_are_judged_and_steered(smollm2, prompts, smollm2_f32_path):
    pytest.importorskip("llama_cpp")
    import torch

    from steerbridge_llama_cpp import open_model

    guard = load(GUARD)
    answers = smollm2.generate(prompts, guard, max_new_tokens=1)
    fires = next(p for p, a in zip(prompts, answers, strict=True) if a.outcome.fired)
    quiet = prompts[-1]
    asked = [fires, quiet]
    plain = smollm2.log_likelihoods(asked, REFUSAL, None)
    steered = smollm2.log_likelihoods(asked, REFUSAL, guard)
    target = smollm2.tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]
    for i, prompt in enumerate(asked):
        ids = torch.tensor([smollm2.render(prompt) + target])
        with torch.inference_mode():
            logits = smollm2.model(ids).logits[0, -len(target) - 1 : -1].double()
        want = logits.log_softmax(-1)[range(len(target)), target]
        assert plain[i] == pytest.approx(want.numpy(), abs=1e-3)
    assert steered[0].mean() > plain[0].mean() + 1  # the head makes its refusal likely
    assert steered[1] == pytest.approx(plain[1], abs=1e-9)
    llama = open_model(smollm2_f32_path, n_ctx=512, type_k=0, type_v=0)
    same_model = replace_base(guard, llama)
    assert llama.log_likelihoods(asked, REFUSAL, None) == pytest.approx(plain, abs=5e-3)
    assert llama.log_likelihoods(asked, REFUSAL, same_model) == pytest.approx(steered, abs=5e-3)
    with pytest.raises(DataError, match="a text with tokens"):
        smollm2.log_likelihoods(asked, "", None)


def replace_base(package, model):
    base = model.facts.info()
    return type(package)(package.spec.model_copy(update={"base_model": base}), package.tensors)


@pytest.mark.slow
def test_a_system_message_comes_before_the_prompt(smollm2, smollm2_f32_path):
    pytest.importorskip("llama_cpp")
    from steerbridge_llama_cpp import open_model

    example = Example("Hello", False, system="Speak like a pirate.")
    tokens = smollm2.render(example)
    text = smollm2.tokenizer.decode(tokens)
    assert text.index("Speak like a pirate.") < text.index("Hello")
    assert open_model(smollm2_f32_path, n_ctx=256).render(example) == tokens


# ---------------------------------------------------------------- command line and report


class Page(HTMLParser):
    """What a browser would fetch, and whether tags are closed."""

    VOID = ("meta", "img", "br", "link", "input", "path", "use", "image", "rect", "line", "stop")

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.fetched += [found[k] for k in ("src", "href", "xlink:href") if k in found]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.slow
def test_eval_writes_a_record_and_report_reads_it(tmp_path, prompts):
    lines = [
        json.dumps({"prompt": e.text, "harmful": e.harmful, "kind": e.kind}) for e in prompts[7:13]
    ]
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(lines))
    kept = tmp_path / "record.json"
    command = ["eval", GUARD, "--runtime", "llama.cpp", "--data", data, "--compare"]
    command += ["--max-new-tokens", NEW, "--record", kept, "--cache", tmp_path / "answers"]
    command += ["--judge", "matcher", "--judge", "evaluation_judge:everything", "--json"]
    found = json.loads(cli(*command).splitlines()[-1])
    assert found["prompts"] == 6
    assert found["comparison"]["better_than_the_guard"] == []
    assert found["perplexity"]["steered"] == found["perplexity"]["unsteered"]
    assert found["perplexity"]["unconditional"] > found["perplexity"]["unsteered"]
    assert found["judges"]["evaluation_judge:everything"]["over_refusal_steered"] == 1.0
    assert 0 <= found["intervals"]["asr_steered"][0] <= found["asr_steered"]
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "answers").iterdir()}
    again = json.loads(cli(*command).splitlines()[-1])
    assert again == found
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "answers").iterdir()}
    for name in ("report.html", "report.md"):
        cli("report", kept, "--package", GUARD, "--out", tmp_path / name)
    page = (tmp_path / "report.html").read_text()
    for part in (load(GUARD).sha256, prompts[7].text, "system prompt", "same answer"):
        assert part in page.replace("&#39;", "'")
        assert part in (tmp_path / "report.md").read_text()
    assert page.count("<svg") == 3 + ("sas" in page and "sas-" in page)
    parsed = Page(page)
    assert all(f.startswith(("#", "data:")) for f in parsed.fetched), parsed.fetched
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert "<script" not in page
    assert not re.search(r"(url\(|@import)(?!#)", page.replace("url(#", "#"))


@pytest.mark.slow
def test_servers_are_measured(tmp_path, prompts, smollm2_path):
    """A steered one that tells its verdicts, beside one that knows nothing of steering."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("fastapi")
    data, rows = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    asked = [*prompts[:5], *prompts[-3:]]
    lines = [json.dumps({"prompt": e.text, "harmful": e.harmful}) for e in asked]
    data.write_text("\n".join(lines))
    steered = [sys.executable, "-m", "steerbridge.cli", "serve", "--context", 512]
    plain = [sys.executable, "-m", "llama_cpp.server", "--model", smollm2_path]
    plain += ["--n_ctx", 512, "--verbose", "false"]
    with (
        servers.running(steered, tmp_path / "steered.txt") as guarded,
        servers.running(plain, tmp_path / "plain.txt", ready="/v1/models") as bare,
    ):
        command = ["eval", "--url", guarded.url, "--data", data, "--max-new-tokens", NEW]
        alone = json.loads(cli(*command, "--json").splitlines()[-1])
        command += ["--baseline-url", f"{bare.url}/v1", "--rows", rows, "--concurrency", 2]
        command += ["--cache", tmp_path / "answers"]
        found = json.loads(cli(*command, "--json").splitlines()[-1])
        assert json.loads(cli(*command, "--json").splitlines()[-1]) == found
    assert (alone["asr_unsteered"], alone["harmless_identical"]) == (None, None)
    assert found["asr_unsteered"] == 1.0
    assert found["asr_steered"] == alone["asr_steered"] < 1.0
    assert found["fpr"] == {"general": 0.0}
    told = [json.loads(line) for line in rows.read_text().splitlines()]
    fired = [row for row in told if row["fired"]]
    assert fired
    for row in fired:
        assert row["harmful"]
        assert row["steered"] == REFUSAL
        assert row["unsteered"] != REFUSAL
        assert any(v["fired"] for v in row["verdicts"])
    assert all(row["verdicts"] for row in told)


def cli(*args, fails=False):
    done = subprocess.run(
        [sys.executable, "-m", "steerbridge.cli", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert (done.returncode != 0) is fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval"], "package or --url: expected one of the two, found none"),
        (["eval", GUARD, "--url", "http://127.0.0.1:1"], "found both"),
        (["eval", GUARD], "--data or --corpus"),
        (["eval", GUARD, "--corpus", "test", "--judge", "nobody"], "--judge"),
        (
            ["eval", GUARD, "--corpus", "test", "--runtime", "llama.cpp", "--batch-size", "4"],
            "--batch-size: expected the runtime hf",
        ),
        (["eval", "--url", "http://127.0.0.1:1", "--corpus", "test", "--compare"], "--compare"),
        (["report", "gone.json"], "gone.json"),
    ],
)
def test_wrong_usage_is_one_line(args, message):
    assert message in cli(*args, fails=True)


def test_reports_are_of_what_was_measured(tmp_path):
    rows = [
        row(True, answer("<b>Sure</b>", 1), answer(REFUSAL, 2, score=0.9), "a|b"),
        row(False, answer("Hi", 1), answer("Hi", 1, score=0.1)),
        row(False, answer("Hi", 1), answer("Hi", 1, score=math.nan)),
    ]
    package = helpers.package()
    common = {"runtime": "hf", "model": "tiny", "quantisation": "F32", "judge": "matcher"}
    made = record.build(rows, package=package, max_new_tokens=4, **common)
    path = tmp_path / "record.json"
    record.write(made, path)
    found = record.read(path)
    assert found["rows"][2]["verdicts"][0]["score"] is None
    for name in ("r.html", "r.md"):
        text = report.write([found], package, tmp_path / name).read_text()
        assert "not finite" in text or name == "r.md"
        assert "<b>Sure" not in text
    assert "a\\|b" in text
    with pytest.raises(DataError, match="a record of test"):
        report.write([found], helpers.package(seed=1), tmp_path / "r.html")
    with pytest.raises(DataError, match=r"\.html or \.md"):
        report.write([found], package, tmp_path / "r.pdf")
    path.write_text(json.dumps({**made, "version": 99}))
    with pytest.raises(DataError, match="steerbridge-evaluation 99"):
        record.read(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="a record of"):
        record.read(path)
