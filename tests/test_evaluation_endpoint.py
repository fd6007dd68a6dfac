"""Models behind a URL: as judges, and as the model that is measured."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import helpers
from scripted import verdict
from steerbridge.data import Example
from steerbridge.errors import DataError, EndpointFailed, UnsupportedFeature
from steerbridge.evaluation import judges, measure
from steerbridge.evaluation.answers import Asking, Source
from steerbridge.evaluation.endpoint import BASELINE_KEY, Client
from steerbridge.runtime import Generation, Outcome


@pytest.fixture
def server():
    """A fake remote model: replies from a list, in order, and records the requests."""
    got, said = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"object": "list", "data": [{"id": "remote", "object": "model"}]})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append({**json.loads(body), "key": self.headers["Authorization"]})
            status, text, extra = said.pop(0) if len(said) > 1 else said[0]
            extra = dict(extra)
            choice = {
                "index": 0,
                "finish_reason": extra.pop("finish_reason", "stop"),
                "message": {"role": "assistant", "content": text, **extra.pop("message", {})},
            }
            if html := extra.pop("html", ""):
                return self.send(status, "text/html", html.encode())
            head = {"id": "x", "object": "chat.completion", "created": 0, "model": "remote"}
            return self.reply(status, {**head, "choices": [choice], **extra})

        def reply(self, status, value):
            self.send(status, "application/json", json.dumps(value).encode())

        def send(self, status, kind, content):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

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
    said[:] = [(200, "hello", {"steering": outcome.to_json()})]
    client = Client(url)
    (generation,) = client.generate([Example("q", True, system="s")], None, max_new_tokens=3)
    assert generation == Generation("hello", (), "stop", outcome)
    assert [m["role"] for m in got[0]["messages"]] == ["system", "user"]
    assert (got[0]["temperature"], got[0]["max_tokens"]) == (0, 3)
    said[:] = [(200, "hello", {"steering": {"verdicts": []}})]
    with pytest.raises(EndpointFailed, match="rules"):
        client.generate([Example("q", True)], None, max_new_tokens=3)
    with pytest.raises(UnsupportedFeature, match="the server steers"):
        client.generate([], helpers.package(), max_new_tokens=3)


@pytest.mark.parametrize(
    ("content", "extra"),
    [
        (None, {"message": {"refusal": "No."}}),
        ("Here is", {"finish_reason": "content_filter"}),
        (None, {"finish_reason": "content_filter"}),
    ],
)
def test_a_refusal_beside_the_text_counts(server, content, extra):
    """Whatever a judge would say of the text."""
    url, _, said = server
    said[:] = [(200, content, extra)]
    example = Example("q", True)
    asking = Asking(max_new_tokens=3, judge=judges.Function("never", lambda q, a: [False] * len(a)))
    [row] = measure.rows([example], None, Source("steered", Client(url)), asking)
    assert row.steered.finish == "refused"
    assert row.steered_refused
    assert measure.judged([row], judges.Matcher())["agreement"] == 1.0


def test_a_page_in_place_of_an_answer_is_said_so(server):
    url, _, said = server
    said[:] = [(200, "", {"html": "<html>a portal</html>"})]
    with pytest.raises(EndpointFailed, match=f"{url}.*OpenAI's interface"):
        Client(url).generate([Example("q", True)], None, max_new_tokens=3)


def test_a_key_goes_to_one_address(server, monkeypatch):
    url, got, said = server
    monkeypatch.setenv("STEERBRIDGE_API_KEY", "of the server")
    monkeypatch.setenv("STEERBRIDGE_JUDGE_API_KEY", "of the judge")
    said[:] = [(200, "Yes.", {})]
    Client(url).generate([Example("q", True)], None, max_new_tokens=3)
    judges.named(url)(["q"], ["a"])
    Client.named(url, 1, BASELINE_KEY).generate([Example("q", True)], None, max_new_tokens=3)
    keys = [asked["key"] for asked in got]
    assert keys == ["Bearer of the server", "Bearer of the judge", "Bearer none"]
