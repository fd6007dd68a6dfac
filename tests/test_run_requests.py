"""What `steerbridge run` takes for a request, in programs that use llama.cpp's C API."""

from __future__ import annotations

import pytest

pytest.importorskip("elftools", reason="needs the extra `run`")
pytest.importorskip("llama_cpp")
import sliding_model
from c_api import ALWAYS, NEVER, Runs, scores
from helpers import MEAN, add_vector, reading

SCRIPT = """
if kind in ("greedy", "argmax", "whole"):
    decode(prompt, 0)
    told = loop({"greedy": greedy, "argmax": argmax, "whole": whole}[kind], len(prompt))
elif kind == "split":  # all but the last token, then that one
    decode(prompt[:-1], 0)
    decode(prompt[-1:], len(prompt) - 1)
    told = loop(greedy, len(prompt))
elif kind == "one by one":
    for i, token in enumerate(prompt):
        decode([token], i)
    told = loop(greedy, len(prompt))
elif kind == "earlier":  # an answer from the logits of a row before the last
    decode(prompt, 0, outputs=(len(prompt) - 3, len(prompt) - 1))
    token = greedy(len(prompt) - 3)
    c.llama_memory_seq_rm(memory, 0, len(prompt) - 2, -1)
    decode([token], len(prompt) - 2)
    told = loop(greedy, len(prompt) - 1)
elif kind == "twice":  # two answers from one row
    decode(prompt, 0)
    first = greedy()
    c.llama_memory_seq_cp(memory, 0, 1, -1, -1)
    told = [first, greedy()]
    for seq in (0, 1):
        decode([first], len(prompt), seq=seq)
        told.append(greedy())
elif kind == "embeddings":
    decode(prompt, 0, outputs=range(len(prompt)))
    told = [bool(c.llama_get_embeddings_ith(context, -1))]
elif kind in ("behind", "behind, all"):  # the answer's token and more of the prompt, in one batch
    decode(prompt, 0)
    more = [greedy(), *prompt[1:8]]
    decode(more, len(prompt), outputs=range(len(more)) if kind == "behind, all" else None)
    told = loop(greedy, len(prompt) + len(more), 3)
elif kind == "appended":  # text behind an answer, and behind a token that ends one
    decode(prompt, 0)
    tokens = loop(greedy, len(prompt), 2)
    more = prompt[1:8]
    decode(more, len(prompt) + 2)
    told = loop(greedy, len(prompt) + 2 + len(more), 2)
    at = len(prompt) + 4 + len(more)
    decode([c.llama_vocab_eos(vocab), *more], at)
    told += loop(greedy, at + 1 + len(more), 2)
elif kind.startswith("turns"):  # an answer, more behind it, and the next turn; all their tokens
    end, more = c.llama_vocab_eos(vocab), prompt[1:8]
    if kind == "turns, long":  # small enough caches that rows slide out
        c.llama_free(context)
        params.n_ubatch, params.swa_full = 16, False
        context = c.llama_init_from_model(model, params)
        memory = c.llama_get_memory(context)
    decode(prompt, 0)
    told = prompt + loop(greedy, len(prompt), 300 if kind == "turns, long" else 3)
    if kind == "turns, held":
        decode(more, len(told))
        told += more + loop(greedy, len(told) + len(more), 2)
    if kind == "turns, split":  # the token that ends the turn is the last of its batch
        decode([end], len(told), outputs=())
        decode(more, len(told) + 1)
    else:
        decode([end, *more], len(told))
    told += [end, *more]
    greedy()
elif kind == "whole twice":
    for _ in range(2):
        c.llama_memory_clear(memory, True)
        decode(prompt, 0)
        told += loop(whole, len(prompt), 3)
elif kind.startswith("given "):
    decode(json.loads(kind[6:]), 0)
    told = [greedy()]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, smollm2_path):
    return Runs(tmp_path_factory.mktemp("requests"), smollm2_path, SCRIPT)


@pytest.fixture(scope="module")
def layer(tmp_path_factory, smollm2_path):
    """A guard that steers rows in a block: they stay in the cache."""
    folder = tmp_path_factory.mktemp("layer")
    readings = [reading("layer_input[25]", MEAN)]
    return Runs(folder, smollm2_path, SCRIPT, readings=readings, act=add_vector(24, alpha=4.0))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sliding")
    path = sliding_model.save(folder / "sliding.gguf")
    readings = [reading("layer_input[4]", MEAN)]
    return Runs(folder, path, SCRIPT, readings=readings, act=add_vector(4, alpha=4.0))


@pytest.mark.parametrize("kind", ["split", "one by one"])
@pytest.mark.parametrize("limit", [NEVER, ALWAYS])
def test_a_prompt_ends_where_its_logits_are_used(run, kind, limit):
    """It came in parts, each of which asked for logits."""
    (tokens, events), (want, told) = run(kind, limit), run("greedy", limit)
    assert tokens == want
    assert scores(events) == pytest.approx(scores(told), rel=1e-3)
    assert len(events) == len(told) == 1


def test_a_program_that_chooses_by_itself_is_steered(run):
    """Which token it chose is not seen: each is judged as more of the prompt; what fired stays."""
    (tokens, events), (want, told) = run("argmax", ALWAYS), run("greedy", ALWAYS)
    assert tokens == want
    assert scores(events)[0] == scores(told)[0]
    assert all(event["fired"] for event in events)
    assert run("argmax")[0] == run("greedy")[0]


def test_a_program_that_reads_all_logits_at_once_is_not_trusted(run):
    """Nothing tells its answer from a prompt that comes token by token: its probes fire."""
    tokens, events = run("whole")
    assert [e["probes"][0]["score"] for e in events] == [None]
    assert "unknown history" in events[0]["probes"][0]["unjudged"]
    assert events[0]["fired"]
    assert run("whole", ALWAYS)[0] == run("greedy", ALWAYS)[0]
    assert tokens[:2] == run("greedy")[0][:2]


def test_each_prompt_of_such_a_program_is_told(run):
    _, events = run("whole twice")
    assert [bool(e["probes"][0].get("unjudged")) for e in events] == [True, True]


def test_an_answer_from_an_earlier_row_is_not_trusted(run):
    _, events = run("earlier")
    assert [bool(e["fired"]) for e in events] == [True]
    assert events[0]["probes"][0]["unjudged"]


@pytest.mark.parametrize("limit", [NEVER, ALWAYS])
def test_two_answers_from_one_row_share_its_verdict(run, limit):
    tokens, events = run("twice", limit)
    assert tokens[0] == tokens[1]
    assert tokens[2] == tokens[3]
    assert tokens[:1] + tokens[2:3] == run("greedy", limit)[0][:2]
    assert len(events) == 1


def test_embeddings_of_steered_rows_are_none(run):
    assert run("embeddings")[0] == [True]
    given, events = run("embeddings", ALWAYS)
    assert given == [False]
    assert "embeddings" in events[0]["reason"]


@pytest.mark.parametrize("limit", [NEVER, ALWAYS])
def test_rows_that_look_like_drafts_are_judged_when_their_last_is_used(run, limit):
    (tokens, events), (want, told) = run("behind, all", limit), run("behind", limit)
    assert tokens == want
    assert scores(events) == pytest.approx(scores(told), rel=1e-3)
    assert len(events) == 2


def test_what_fired_stays_behind_an_answer_that_nothing_ended(run):
    """A new verdict is added to it; behind a token that ends generation it is the only one."""
    first, behind, ended = scores(run("appended")[1])
    limit = (first + max(behind, ended)) / 2
    assert first > limit, "the probe tells these prompts apart"
    _, events = run("appended", limit)
    assert [bool(e["fired"]) for e in events] == [True, True, False]
    assert [e["probes"][0]["fired"] for e in events] == [True, False, False]


@pytest.mark.parametrize("kind", ["turns", "turns, held", "turns, split"])
def test_a_turn_behind_steered_rows_is_judged_as_if_they_were_not(layer, kind):
    """They are evaluated again, those of a request that was held included."""
    tokens, events = layer(kind, ALWAYS)
    _, alone = layer(f"given {tokens}", ALWAYS)
    assert scores(events)[-1] == pytest.approx(scores(alone)[0], rel=1e-3)
    held = [event["probes"][0].get("unjudged") for event in events]
    assert [bool(why) for why in held] == ([False, True, False] if "held" in kind else [False] * 2)


def test_steered_rows_whose_window_has_slid_away_are_not_evaluated_again(sliding):
    tokens, events = sliding("turns", ALWAYS)
    _, alone = sliding(f"given {tokens}", ALWAYS)
    assert scores(events)[-1] == pytest.approx(scores(alone)[0], rel=1e-3)
    _, events = sliding("turns, long", ALWAYS)
    assert "unknown history" in events[-1]["probes"][0]["unjudged"]
