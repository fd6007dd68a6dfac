"""`steerbridge eval` and `steerbridge report` on a real guard for SmolLM2."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import servers
from helpers import CLI, json_lines, last_json, run_cli
from scripted import GUARD, NEW, REFUSAL
from steerbridge.package import load


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed."""

    VOID = ("meta", "img", "br", "link", "input", "path", "use", "image", "rect", "line", "stop")

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.fetched += [attributes[k] for k in ("src", "href", "xlink:href") if k in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.slow
def test_eval_writes_a_record_and_report_reads_it(tmp_path, held_out_prompts):
    lines = [
        json.dumps({"prompt": e.text, "harmful": e.harmful, "kind": e.kind})
        for e in held_out_prompts[7:13]
    ]
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(lines))
    kept = tmp_path / "record.json"
    command = ["eval", GUARD, "--runtime", "llama.cpp", "--data", data, "--compare"]
    command += ["--max-new-tokens", NEW, "--record", kept, "--cache", tmp_path / "answers"]
    command += ["--judge", "matcher", "--judge", "evaluation_judge:everything", "--json"]
    figures = last_json(cli(*command))
    assert figures["prompts"] == 6
    assert figures["comparison"]["better_than_the_guard"] == []
    assert figures["perplexity"]["steered"] == figures["perplexity"]["unsteered"]
    assert figures["perplexity"]["unconditional"] > figures["perplexity"]["unsteered"]
    assert figures["judges"]["evaluation_judge:everything"]["over_refusal_steered"] == 1.0
    assert 0 <= figures["intervals"]["asr_guard_steered"][0] <= figures["asr_guard_steered"]
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "answers").iterdir()}
    again = last_json(cli(*command))
    assert again == figures
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "answers").iterdir()}
    for name in ("report.html", "report.md"):
        cli("report", kept, "--package", GUARD, "--out", tmp_path / name)
    page = (tmp_path / "report.html").read_text()
    for part in (load(GUARD).sha256, held_out_prompts[7].text, "system prompt", "same answer"):
        assert part in page.replace("&#39;", "'")
        assert part in (tmp_path / "report.md").read_text()
    assert page.count("<svg") == 3 + ("sas" in page and "sas-" in page)
    parsed = Page(page)
    assert all(f.startswith(("#", "data:")) for f in parsed.fetched), parsed.fetched
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert "<script" not in page
    assert not re.search(r"(url\(|@import)(?!#)", page.replace("url(#", "#"))


@pytest.mark.slow
def test_servers_are_measured(tmp_path, held_out_prompts, smollm2_path):
    """A steered server that reports its verdicts, compared with a plain one."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("fastapi")
    data, rows = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    asked = [*held_out_prompts[:5], *held_out_prompts[-3:]]
    lines = [json.dumps({"prompt": e.text, "harmful": e.harmful}) for e in asked]
    data.write_text("\n".join(lines))
    steered = [*CLI, "serve", "--context", 512]
    plain = [sys.executable, "-m", "llama_cpp.server", "--model", smollm2_path]
    plain += ["--n_ctx", 512, "--verbose", "false"]
    with (
        servers.running(steered, tmp_path / "steered.txt") as guarded,
        servers.running(plain, tmp_path / "plain.txt", ready="/v1/models") as bare,
    ):
        command = ["eval", "--url", guarded.url, "--data", data, "--max-new-tokens", NEW]
        alone = last_json(cli(*command, "--json"))
        command += ["--baseline-url", f"{bare.url}/v1", "--rows", rows, "--concurrency", 2]
        command += ["--cache", tmp_path / "answers"]
        figures = last_json(cli(*command, "--json"))
        assert last_json(cli(*command, "--json")) == figures
    assert (alone["asr_judge_unsteered"], alone["harmless_identical"]) == (None, None)
    assert figures["asr_judge_unsteered"] == 1.0
    assert figures["asr_guard_steered"] == alone["asr_guard_steered"] < 1.0
    assert figures["fpr"] == {"general": 0.0}
    told = json_lines(rows.read_text())
    fired = [row for row in told if row["fired"]]
    assert fired
    for row in fired:
        assert row["harmful"]
        assert row["steered"] == REFUSAL
        assert row["unsteered"] != REFUSAL
        assert any(v["fired"] for v in row["verdicts"])
    assert all(row["verdicts"] for row in told)


def cli(*args, fails=False):
    """The command's output; it runs in the folder from which `evaluation_judge` can be imported."""
    done = run_cli(*args, cwd=Path(__file__).parent)
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
            "llama.cpp: option batch_size",
        ),
        (["eval", "--url", "http://127.0.0.1:1", "--corpus", "test", "--compare"], "--compare"),
        (["report", "gone.json"], "gone.json"),
    ],
)
def test_wrong_usage_is_one_line(args, message):
    assert message in cli(*args, fails=True)
