"""The application of `steerbridge serve` over real sockets, with a scripted engine."""

from __future__ import annotations

import base64
import io
import json
import time

import pytest
import requests

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from serving import in_process
from steerbridge import SteeringPackage
from steerbridge_serve.admission import Limits
from steerbridge_serve.service import Settings

WORDS = "one two three four five"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def plain():
    """A server as it comes."""
    with in_process() as server:
        yield server


@pytest.fixture(scope="module")
def open_to_all():
    """A server that answers raw prompts and shows scores."""
    with in_process(Settings(unsteered=True, raw_prompts=True, show_scores=True)) as server:
        yield server


def eventually(condition, seconds=10.0):
    """Waits until it is true, and says whether it was in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# ---------------------------------------------------------------- answers


def test_header_and_body_agree_when_one_of_two_probes_fires(plain):
    """Rules decide: a probe that fires alone steers nothing where a rule needs all."""
    for text, fired in (("hi", False), ("harm", True)):
        answer = plain.chat(text)
        assert answer.headers["X-Steerbridge-Fired"] == str(fired).lower()
        assert answer.json()["steering"]["fired"] is fired
        assert answer.json()["steering"]["verdicts"][1]["fired"] is True


def test_scores_are_told_only_by_a_server_that_shows_them(plain, open_to_all):
    hidden = plain.chat("harm").json()["steering"]["verdicts"][0]
    assert hidden == {"probe": "harm", "fired": True, "unjudged": "", "fired_in": ""}
    shown = open_to_all.chat("harm").json()["steering"]["verdicts"][0]
    assert (shown["score"], shown["threshold"]) == (0.9, 0.5)
    body = {"input": ["hi", "harm"]}
    scores = [
        [r["category_scores"]["harm"] for r in s.post("/v1/moderations", body).json()["results"]]
        for s in (plain, open_to_all)
    ]
    assert scores == [[0.0, 1.0], [0.1, 0.9]]
    for server, told in ((plain, False), (open_to_all, True)):
        probe = requests.get(f"{server.url}/info", timeout=9).json()["steering"]["probes"][0]
        assert ("threshold" in probe) is told


def test_the_role_is_told_once_except_to_tgis_old_client(plain):
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    events = plain.events(CHAT, body)
    deltas = [e["choices"][0]["delta"] for e in events[:-2]]
    assert [d.get("role") for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(d.get("content", "") for d in deltas) == WORDS
    assert events[-2]["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert events[-1] == "[DONE]"
    old = plain.events(CHAT, {**body, "model": "tgi"})
    assert all(e["choices"][0]["delta"]["role"] == "assistant" for e in old[:-2])
    assert all("tool_calls" in e["choices"][0]["delta"] for e in old[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_gives_one_reason_and_exact_counts(plain, stream):
    body = {"messages": USER, "stop": ["three"], "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
        *events, used, _ = plain.events(CHAT, body)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        reason, usage = events[-1]["choices"][0]["finish_reason"], used["usage"]
    else:
        answer = plain.post(CHAT, body).json()
        choice = answer["choices"][0]
        text, reason, usage = (
            choice["message"]["content"],
            choice["finish_reason"],
            answer["usage"],
        )
    assert (text, reason, usage["completion_tokens"]) == ("one two ", "stop", 4)


def test_several_answers_and_log_probabilities(plain):
    body = {"messages": USER, "n": 3, "max_tokens": 2, "logprobs": True}
    answer = plain.post(CHAT, body).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 6
    content = answer["choices"][2]["logprobs"]["content"]
    assert [(t["token"], t["logprob"]) for t in content] == [("one", -0.5), (" two", -0.5)]
    events = plain.events(CHAT, {**body, "stream": True})
    ends = [e["choices"][0] for e in events[:-1] if e["choices"][0]["finish_reason"]]
    assert [(c["index"], c["finish_reason"]) for c in ends] == [(i, "length") for i in range(3)]


def test_an_answer_is_not_cut_without_a_word(plain):
    whole = plain.chat("hi").json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == (WORDS, "stop")
    assert plain.chat("hi", max_tokens=2).json()["choices"][0]["finish_reason"] == "length"


def test_a_refused_turn_is_left_out_of_the_next_and_that_is_said(plain):
    refused = plain.chat("some harm").json()["choices"][0]["message"]["content"]
    answer = plain.chat("some harm", refused, "and bees?").json()
    assert answer["steering"]["fired"] is False
    assert answer["steering"]["dropped_turns"] == 1
    said = [part.text for m in plain.engine.asked[-1].messages for part in m.parts]
    assert said == ["and bees?"]
    # Also where a stream brought it, and a client trimmed it.
    events = plain.events(
        CHAT, {"messages": [{"role": "user", "content": "harm 2"}], "stream": True}
    )
    refused = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
    again = plain.chat("harm 2", f" {refused}\n", "hi").json()
    assert again["steering"]["dropped_turns"] == 1
    # But not what this server never said, and never what is only to be judged.
    other = plain.chat("some harm", "Sure!", "and bees?").json()["steering"]
    assert other["fired"]
    assert "dropped_turns" not in other
    turns = [{"role": "user", "content": "some harm"}, {"role": "assistant", "content": refused}]
    messages = [*turns, {"role": "user", "content": "hi"}]
    judged = plain.post("/v1/moderations", {"messages": messages}).json()["results"][0]
    assert judged["flagged"] is True


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "x"}),
        ("/generate_stream", {"inputs": "x"}),
        ("/", {"inputs": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/api/generate", {"prompt": "x", "raw": True}),
        (CHAT, {"messages": [*USER, {"role": "assistant", "content": "Sure, here"}]}),
        ("/api/chat", {"messages": [*USER, {"role": "assistant", "content": "Sure, here"}]}),
    ],
)
def test_raw_prompts_and_begun_answers_need_the_flag(plain, open_to_all, path, body):
    answer = plain.post(path, body)
    assert answer.status_code == 422
    assert "--raw-prompts" in answer.text
    assert "/v1/chat/completions" in answer.text
    answer = open_to_all.post(path, {**body, **({"stream": False} if "api" in path else {})})
    assert answer.status_code == 200, answer.text
    if path != "/generate_stream":
        told = answer.json()[0] if path == "/" else answer.json()
        form = "prefill" if "messages" in body else "raw"
        assert told["steering"]["untrained_form"] == form
    assert open_to_all.engine.asked[-1].prefill == ("Sure, here" if "messages" in body else "")


def test_forms_that_a_guard_knows_are_not_called_untrained(plain):
    assert "untrained_form" not in plain.chat("hi").json()["steering"]
    assert plain.chat("a", "b", "c").json()["steering"]["untrained_form"] == "turns"
    package = plain.engine.package
    evidence = package.spec.evidence.replace(forms=("chat", "turns"))
    trained = SteeringPackage(package.spec.replace(evidence=evidence), package.tensors)
    with in_process(package=trained) as server:
        assert "untrained_form" not in server.chat("a", "b", "c").json()["steering"]
        messages = [{"role": "system", "content": "x"}, *USER]
        told = server.post(CHAT, {"messages": messages}).json()["steering"]
        assert told["untrained_form"] == "system"


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("path", "kind"),
    [(CHAT, "openai"), ("/v1/nothing", "openai"), ("/api/chat", "ollama"), ("/generate", "tgi")],
)
@pytest.mark.parametrize("status", [404, 405, 422, 500])
def test_every_error_has_the_form_of_its_dialect(plain, path, kind, status):
    if status == 404:
        answer = plain.post(path.replace("chat", "nix").replace("generate", "nix"), {})
    elif status == 405:
        answer = requests.delete(plain.url + path, timeout=9)
    elif status == 422:
        answer = plain.post(path, b"{")
    else:
        bodies = {"messages": [{"role": "user", "content": "broken"}], "stream": False}
        answer = plain.post(path, bodies)
    if path in ("/v1/nothing", "/generate") and status == 500:
        return  # there is no model behind the one, and a flag before the other
    if path == "/v1/nothing":
        status = 404
    assert answer.status_code == status, answer.text
    assert "secret" not in answer.text
    error = answer.json()["error"]
    if kind == "openai":
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")
    elif kind == "tgi":
        assert answer.json()["error_type"]
    assert isinstance(error["message"] if kind == "openai" else error, str)


def test_an_error_in_the_middle_of_a_stream_is_an_event_of_it(plain):
    body = {"messages": [{"role": "user", "content": "break"}], "stream": True}
    events = plain.events(CHAT, body)
    assert events[-1]["error"]["type"] == "server_error"
    lines = plain.post("/api/chat", body).text.splitlines()
    assert "error" in json.loads(lines[-1])
    assert "secret" not in json.dumps(events) + lines[-1]


def test_unknown_paths_say_what_to_use(plain):
    for path, hint in (
        ("/v1/responses", "POST /v1/chat/completions"),
        ("/v1/embeddings", "llama-server"),
        ("/api/pull", "chosen when this server is started"),
        ("/somewhere", "there are GET /api/ps"),
    ):
        answer = plain.post(path, {})
        assert answer.status_code == 404
        assert hint in answer.text


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": -1}',
        b'{"messages": [{"role": "assistant", "content": null}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"a": 1}}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"messages": [' + b"[]," * 60_000 + b"[]]}",
        b'{"messages": [{"role": "user", "content": "' + b" " * 100_000 + b'"}]}',
    ],
)
def test_bodies_that_are_none_are_refused_at_once(plain, content):
    start = time.monotonic()
    answer = plain.post(CHAT, content)
    assert answer.status_code in (413, 422), answer.text[:300]
    assert answer.json()["error"]["message"]
    assert time.monotonic() - start < 10


def test_nothing_is_loaded_from_elsewhere(plain):
    assert requests.get(f"{plain.url}/docs", timeout=9).status_code == 404
    for path in ("/", "/page/index.html", "/page/page.js", "/info", "/nix"):
        headers = requests.get(plain.url + path, timeout=9).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"], path
        assert headers["X-Content-Type-Options"] == "nosniff"


# ---------------------------------------------------------------- pictures


def picture(kind="PNG", size=(8, 8), mode="RGB", **options):
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, size, **options).save(file, kind)
    return file.getvalue()


def shown(*files, kind="image/png"):
    urls = [f"data:{kind};base64,{base64.b64encode(file).decode()}" for file in files]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_pictures_of_five_formats_arrive_as_rgb(plain, kind):
    file = picture(kind, color=(255, 0, 0))
    assert plain.post(CHAT, shown(file)).status_code == 200
    [seen] = plain.engine.asked[-1].pictures
    assert (seen.width, seen.height, len(seen.rgb)) == (8, 8, 192)
    assert seen.rgb[0] > 250
    assert seen.rgb[1] < 5
    body = {
        "messages": [{"role": "user", "content": "?", "images": [base64.b64encode(file).decode()]}]
    }
    assert plain.post("/api/chat", body).status_code == 200
    assert plain.engine.asked[-1].pictures == [seen]


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "ICO", "PPM", "PDF", "TGA"])
def test_other_formats_never_reach_a_decoder(plain, kind):
    answer = plain.post(CHAT, shown(picture(kind, size=(32, 32))))
    assert answer.status_code == 422
    assert "PNG, JPEG, GIF, BMP, WEBP" in answer.json()["error"]["message"]


def test_pictures_are_bounded_in_number_pixels_and_form(plain):
    start = time.monotonic()
    many = plain.post(CHAT, shown(*[picture(mode="1", size=(64, 64))] * 300))
    assert many.status_code == 422
    assert "16 pictures at most" in many.text
    large = plain.post(CHAT, shown(picture(mode="1", size=(20_000, 20_000))))
    assert large.status_code == 422
    assert "pixels at most in all" in large.text
    sum_of_them = plain.post(CHAT, shown(*[picture(mode="1", size=(2_000, 2_000))] * 5))
    assert sum_of_them.status_code == 422
    assert "pixels at most in all" in sum_of_them.text
    cut = plain.post(CHAT, shown(picture()[:45]))
    assert cut.status_code == 422
    for url in ("http://127.0.0.1/x.png", "file:///etc/passwd", "data:text/html;base64,AAAA"):
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        answer = plain.post(CHAT, {"messages": [{"role": "user", "content": parts}]})
        assert answer.status_code == 422
        assert "nothing is fetched" in answer.text
    assert time.monotonic() - start < 10


def test_a_picture_in_a_begun_answer_is_not_ignored(open_to_all):
    """Such an answer goes on as text: the picture had no effect, and no error."""
    begun = {"role": "assistant", "content": shown(picture())["messages"][0]["content"]}
    image = base64.b64encode(picture()).decode()
    other = {"role": "assistant", "content": "Sure", "images": [image]}
    for path, last in ((CHAT, begun), ("/api/chat", other)):
        answer = open_to_all.post(path, {"messages": [*USER, last]})
        assert answer.status_code == 422
        assert "begins with text" in answer.text


# ---------------------------------------------------------------- who is let in


def test_hosts_and_origins_of_others_are_refused(plain):
    chat = {"messages": USER}
    assert plain.post(CHAT, chat, headers={"Host": "evil.example"}).status_code == 403
    assert plain.post(CHAT, chat, headers={"Host": "192.168.0.7:80"}).status_code == 403
    assert plain.post(CHAT, chat, headers={"Origin": "http://evil.example"}).status_code == 403
    assert plain.post(CHAT, chat, headers={"Origin": "null"}).status_code == 403
    ours = {"Origin": plain.url}
    assert plain.post(CHAT, chat, headers=ours).status_code == 200
    hosts, origins = ("guard.example", "*"), ("http://app.example",)
    with in_process(hosts=hosts, origins=origins) as server:
        for host in ("guard.example", "192.168.0.7:80", "localhost:1"):
            assert server.post(CHAT, chat, headers={"Host": host}).status_code == 200
        answer = server.post(CHAT, chat, headers={"Origin": origins[0]})
        assert answer.headers["Access-Control-Allow-Origin"] == origins[0]
        asking = {
            "Origin": origins[0],
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        assert requests.options(server.url + CHAT, headers=asking, timeout=9).status_code == 200


def test_a_key_is_asked_for_before_a_byte_of_the_body():
    with in_process(api_key="secret") as server:
        head = HEAD % 8_000_000
        start = time.monotonic()
        half = [server.connect(head + b" " * 100_000) for _ in range(30)]
        assert all(b" 401 " in one.recv(100) for one in half)
        assert time.monotonic() - start < 10
        for one in half:
            one.close()
        for path in ("/info", "/metrics", "/openapi.json", "/v1/models", "/api/tags"):
            assert requests.get(server.url + path, timeout=9).status_code == 401
        for path in ("/", "/health", "/page/page.js"):
            assert requests.get(server.url + path, timeout=9).status_code == 200
        key = {"Authorization": "Bearer secret"}
        assert server.post(CHAT, {"messages": USER}, headers=key).status_code == 200
        wrong = {"Authorization": "Bearer sécret".encode()}
        assert server.post(CHAT, {"messages": USER}, headers=wrong).status_code == 401


def test_bodies_are_bounded_in_size_time_and_sum():
    limits = Limits(body_bytes=100_000, held_bodies=2, read_seconds=0.5)
    with in_process(limits=limits) as server:
        assert server.post(CHAT, b" " * 200_000).status_code == 413
        assert (
            requests.post(server.url + CHAT, data=iter([b" " * 60_000] * 4), timeout=9).status_code
            == 413
        )
        head = HEAD % 90_000
        slow = server.connect(head + b" " * 10)
        assert b" 408 " in slow.recv(100)
        held = [server.connect(head + b" " * 80_000) for _ in range(3)]
        assert sorted(one.recv(12)[9:12] for one in held) == [b"408", b"408", b"429"]
        assert server.chat("hi").status_code == 200
        for one in (slow, *held):
            one.close()


def test_rate_and_requests_at_once_of_one_client():
    with in_process(limits=Limits(rate=3)) as server:
        codes = [server.chat("hi").status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        assert int(server.chat("hi").headers["Retry-After"]) >= 1
    with in_process(limits=Limits(per_client=2)) as server:
        slow = [server.leaves({"messages": [{"role": "user", "content": "slow"}]}) for _ in "ab"]
        assert eventually(lambda: len(server.engine.asked) == 1)
        assert eventually(lambda: server.worker.waiting == 1)
        assert server.chat("hi").status_code == 429
        for one in slow:
            one.close()
        assert eventually(lambda: server.chat("hi").status_code == 200)


# ---------------------------------------------------------------- who leaves


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_free_queue_and_model_at_once(stream):
    """Queued, and while the prompt is evaluated: nobody waits, and nothing stays."""
    slow = {"messages": [{"role": "user", "content": "slow"}], "stream": stream}
    with in_process(limits=Limits(waiting=4)) as server:
        running = server.leaves(slow)
        assert eventually(lambda: len(server.engine.asked) == 1)
        queued = [server.leaves(slow) for _ in range(4)]
        assert eventually(lambda: server.worker.waiting == 4)
        assert server.chat("hi").status_code == 429
        for one in queued[:3]:
            one.close()
        assert eventually(lambda: server.worker.waiting == 1)
        running.close()
        assert eventually(lambda: server.engine.cancelled == 1)
        assert eventually(lambda: len(server.engine.asked) == 2)
        queued[3].close()
        assert eventually(lambda: server.engine.cancelled == 2)
        assert server.chat("hi").json()["choices"][0]["message"]["content"] == WORDS
        metrics = requests.get(f"{server.url}/metrics", timeout=9).text
        assert 'steerbridge_requests_total{status="cancelled"} 5.0' in metrics


def test_the_server_ends_while_clients_wait():
    """`in_process` fails if it does not."""
    with in_process() as server:
        slow = {"messages": [{"role": "user", "content": "slow"}]}
        waiting = [server.leaves(slow) for _ in range(5)]
        assert eventually(lambda: server.worker.waiting == 4)
    for one in waiting:
        one.close()
    assert not server.worker.alive


# ---------------------------------------------------------------- other dialects


def test_ollamas_forms(plain):
    body = {"model": "any", "messages": [{"role": "user", "content": "hi"}]}
    lines = [json.loads(line) for line in plain.post("/api/chat", body).text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == WORDS
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert (lines[-1]["done_reason"], lines[-1]["eval_count"]) == ("stop", 6)
    body = {"prompt": "hi", "system": "Be short.", "stream": False, "options": {"num_predict": 2}}
    answer = plain.post("/api/generate", body).json()
    assert (answer["response"], answer["done_reason"]) == ("one two", "length")
    assert [m.role for m in plain.engine.asked[-1].messages] == ["system", "user"]
    loaded = plain.post("/api/generate", {"model": "any"}).json()
    assert (loaded["done"], loaded["done_reason"]) == (True, "load")
    assert requests.head(plain.url, timeout=9).status_code == 200
    assert plain.post("/api/show", {"model": "other"}).status_code == 404
    assert plain.post("/api/show", {"model": "scripted:latest"}).json()["capabilities"]


def test_tgis_forms(open_to_all):
    body = {"inputs": "hi", "parameters": {"stop_sequences": ["three"], "details": True}}
    answer = open_to_all.post("/generate", body).json()
    assert answer["generated_text"] == "one two three"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["generated_tokens"] == len(answer["details"]["tokens"]) == 4
    events = open_to_all.events("/generate_stream", body)
    assert "".join(e["token"]["text"] for e in events) == events[-1]["generated_text"]
    spans = open_to_all.post("/tokenize", {"inputs": "ab c"}).json()
    assert (spans[0]["start"], spans[0]["stop"]) == (0, 2)
    whole = open_to_all.post("/chat_tokenize", {"messages": USER}).json()
    assert whole["templated_text"] == "hi"


def test_moderation_judges_and_answers_nothing(plain):
    for given, flagged in (
        ({"input": "harm"}, [True]),
        ({"input": ["hi", "harm"]}, [False, True]),
        ({"input": [{"type": "text", "text": "harm"}]}, [True]),
        ({"input": shown(picture())["messages"][0]["content"]}, [False]),
        ({"messages": [{"role": "system", "content": "x"}, *USER]}, [False]),
    ):
        answer = plain.post("/v1/moderations", given)
        assert [r["flagged"] for r in answer.json()["results"]] == flagged
        assert answer.headers["X-Steerbridge-Fired"] == str(any(flagged)).lower()
    for bad in ({}, {"input": []}, {"input": "x", "messages": USER}, {"input": 3}):
        assert plain.post("/v1/moderations", bad).status_code == 422
