"""Saved states under `steerbridge run`: what is known of their rows goes with them."""

from __future__ import annotations

import pytest

pytest.importorskip("elftools", reason="needs the extra `run`")
pytest.importorskip("llama_cpp")
import sliding_model
from c_api import ALWAYS, NEVER, Runs, scores
from helpers import MEAN, add_vector, reading

SCRIPT = """
import pathlib
PARTIAL = 1
folder = pathlib.Path(sys.argv[0]).parent
other = [7] * 40

def save(seq=0, flags=None):
    if flags is None:
        size = c.llama_state_seq_get_size(context, seq)
        buffer = (ctypes.c_uint8 * size)()
        assert c.llama_state_seq_get_data(context, buffer, size, seq) == size
    else:
        size = c.llama_state_seq_get_size_ext(context, seq, flags)
        buffer = (ctypes.c_uint8 * size)()
        assert c.llama_state_seq_get_data_ext(context, buffer, size, seq, flags) == size
    return buffer

def restore(buffer, seq=0, flags=None):
    size = len(buffer)
    if flags is None:
        read = c.llama_state_seq_set_data(context, buffer, size, seq)
    else:
        read = c.llama_state_seq_set_data_ext(context, buffer, size, seq, flags)
    assert read > 0 and (read == size) == (not kind.startswith("damaged"))

def last_again(seq=0):  # as servers do: one row must be evaluated
    c.llama_memory_seq_rm(memory, seq, len(prompt) - 1, -1)
    decode(prompt[-1:], len(prompt) - 1, seq=seq)
    return greedy()

def forgotten():  # the state's rows have left the cache, and others were there
    c.llama_memory_clear(memory, True)
    decode(other, 0)
    c.llama_memory_clear(memory, True)

path = str(folder / kind.split(":")[0]).encode()
if kind == "fresh":
    decode(prompt, 0)
    told = loop(greedy, len(prompt))
elif kind in ("memory", "another sequence", "damaged", "damaged, saved again"):
    decode(prompt, 0)
    greedy()
    state = save()
    forgotten()
    if kind.startswith("damaged"):
        state[len(state) - 100] ^= 1
    seq = 1 if kind == "another sequence" else 0
    restore(state, seq)
    if kind == "damaged, saved again":
        state, kind = save(), "saved"
        forgotten()
        restore(state)
    told = [last_again(seq)]
elif kind == "whole context":
    decode(prompt, 0)
    decode(prompt, 0, seq=2)
    size = c.llama_state_get_size(context)
    state = (ctypes.c_uint8 * size)()
    assert c.llama_state_get_data(context, state, size) == size
    forgotten()
    assert c.llama_state_set_data(context, state, size) == size
    told = [last_again(0), last_again(2)]
elif kind == "a part of the bytes":  # of a program that knows llama.cpp's own size
    decode(prompt, 0)
    small = c.llama_state_seq_get_size(context, 3) and save()
    cut = (ctypes.c_uint8 * (len(small) - 64)).from_buffer_copy(bytes(small)[:-64])
    forgotten()
    assert c.llama_state_seq_set_data(context, cut, len(cut), 0) > 0
    told = [last_again()]
elif kind == "in an answer":
    decode(prompt, 0)
    told = loop(greedy, len(prompt), 3)
    chosen = greedy()
    state = save()
    forgotten()
    restore(state)
    decode([chosen], len(prompt) + 3)
    told += [chosen, greedy()]
elif kind == "earlier in an answer":
    decode(prompt, 0)
    told = loop(greedy, len(prompt), 2)
    state = save()
    tokens = loop(greedy, len(prompt) + 2, 3)
    restore(state)
    for i, token in enumerate(tokens):
        decode([token], len(prompt) + 2 + i)
    told += [*tokens, greedy()]
elif kind == "earlier, partial":
    decode(prompt, 0)
    told = loop(greedy, len(prompt), 2)
    state = save(flags=PARTIAL)
    tokens = loop(greedy, len(prompt) + 2, 3)
    restore(state, flags=PARTIAL)
    c.llama_memory_seq_rm(memory, 0, len(prompt) + 2, -1)
    for i, token in enumerate(tokens):
        decode([token], len(prompt) + 2 + i)
    told += [*tokens, greedy()]
elif kind == "a new prompt, partial":
    start = len(prompt) - 4
    decode(prompt[:start], 0)
    state = save(flags=PARTIAL)
    decode(other, start)
    loop(greedy, start + len(other))
    restore(state, flags=PARTIAL)
    c.llama_memory_seq_rm(memory, 0, start, -1)
    decode(prompt[start:], start)
    told = [greedy()]
elif kind == "of other rows, partial":
    start = len(prompt) - 1
    decode(prompt[:start], 0)
    state = save(flags=PARTIAL)
    c.llama_memory_clear(memory, True)
    decode(other[:1] + prompt[1:start], 0)
    restore(state, flags=PARTIAL)
    decode(prompt[start:], start)
    told = [greedy()]
elif kind.startswith("file"):
    tokens = (c.llama_token * 8)()
    count = ctypes.c_size_t()
    if kind.endswith("saved"):
        decode(prompt, 0)
        greedy()
        assert c.llama_state_seq_save_file(context, path, 0, tokens, 8)
    else:
        assert c.llama_state_seq_load_file(context, path, 0, None, 0, ctypes.byref(count))
        assert c.llama_state_seq_load_file(context, path, 0, tokens, 8, ctypes.byref(count))
        told = [last_again()]
elif kind.startswith("session"):
    tokens = (c.llama_token * 8)()
    count = ctypes.c_size_t()
    if kind.endswith("saved"):
        decode(prompt, 0)
        assert c.llama_state_save_file(context, path, tokens, 8)
    else:
        assert c.llama_state_load_file(context, path, tokens, 8, ctypes.byref(count))
        told = [last_again()]
"""
UNKNOWN = "unknown history"


@pytest.fixture(scope="module")
def mean(tmp_path_factory, smollm2_path):
    """A guard that reads a mean: it needs every row."""
    folder = tmp_path_factory.mktemp("mean")
    return Runs(folder, smollm2_path, SCRIPT, readings=[reading("layer_input[22]", MEAN)])


@pytest.fixture(scope="module")
def layer(tmp_path_factory, smollm2_path):
    """A guard that steers rows in a block, from the prompt's end on."""
    folder = tmp_path_factory.mktemp("layer")
    return Runs(folder, smollm2_path, SCRIPT, act=add_vector(24, alpha=4.0))


@pytest.fixture(scope="module")
def last(tmp_path_factory, smollm2_path):
    """A guard that reads the prompt's last row, and steers none before the head."""
    return Runs(tmp_path_factory.mktemp("last"), smollm2_path, SCRIPT)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """A model whose blocks but one see sixteen rows, and a guard that reads a mean."""
    folder = tmp_path_factory.mktemp("sliding")
    path = sliding_model.save(folder / "sliding.gguf")
    return Runs(folder, path, SCRIPT, readings=[reading("layer_input[4]", MEAN)])


def unjudged(events):
    return [event["probes"][0].get("unjudged", "") for event in events]


@pytest.mark.parametrize("kind", ["memory", "another sequence", "whole context"])
@pytest.mark.parametrize("limit", [NEVER, ALWAYS])
def test_rows_of_a_state_are_read_as_if_they_had_stayed(mean, kind, limit):
    (tokens, events), (want, told) = mean(kind, limit), mean("fresh", limit)
    assert set(tokens) == {want[0]}
    assert scores(events)[-1] == pytest.approx(scores(told)[0], rel=1e-4)
    assert not any(unjudged(events))


@pytest.mark.parametrize("kind", ["damaged", "damaged, saved again", "a part of the bytes"])
@pytest.mark.parametrize("guard", ["mean", "last"])
def test_a_state_of_unknown_rows_is_unjudged(request, guard, kind):
    """Also by a guard that reads one row: the last may be an answer's."""
    _, events = request.getfixturevalue(guard)(kind)
    assert unjudged(events)[-1]
    assert events[-1]["fired"]


@pytest.mark.parametrize("limit", [NEVER, ALWAYS])
@pytest.mark.parametrize("kind", ["in an answer", "earlier in an answer"])
@pytest.mark.parametrize("guard", ["mean", "layer"])
def test_an_answer_goes_on_behind_its_own_state(request, guard, kind, limit):
    """Its verdict and what fired come back: it is no new request."""
    runs = request.getfixturevalue(guard)
    (tokens, events), (want, told) = runs(kind, limit), runs("fresh", limit)
    assert tokens == want[: len(tokens)]
    mine = [e for e in events if e["event"] == "verdict"]
    assert scores(mine)[0] == pytest.approx(scores(told)[0], rel=1e-4)
    assert len(mine) == 1


@pytest.mark.parametrize("limit", [NEVER, ALWAYS])
@pytest.mark.parametrize("name", ["file", "session"])
def test_a_file_is_known_to_a_later_process(mean, name, limit):
    name = f"{name} {limit:g}"
    mean(f"{name}: saved", limit)
    (tokens, events), (want, told) = mean(f"{name}: loaded", limit), mean("fresh", limit)
    assert tokens == want[:1]
    assert scores(events) == pytest.approx(scores(told), rel=1e-4)


@pytest.mark.parametrize("change", ["gone", "another's", "damaged"])
def test_a_file_without_its_rows_is_unjudged(mean, change):
    name = f"file {change}"
    mean(f"{name}: saved")
    beside = mean.folder / f"{name}.steerbridge"
    if change == "gone":
        beside.unlink()
    elif change == "damaged":
        content = bytearray(beside.read_bytes())
        content[len(content) // 2] ^= 1
        beside.write_bytes(content)
    else:
        mean(f"{name} 2: saved", text="Another prompt of some words, which has its own rows.")
        beside.write_bytes((mean.folder / f"{name} 2.steerbridge").read_bytes())
    assert UNKNOWN in unjudged(mean(f"{name}: loaded")[1])[-1]


@pytest.mark.parametrize("limit", [NEVER, ALWAYS])
def test_a_model_with_a_sliding_window_goes_back_to_a_checkpoint(sliding, limit):
    """Its partial states replace the rows that have slid out; the others are still there."""
    want, told = sliding("fresh", limit)
    tokens, events = sliding("earlier, partial", limit)
    assert tokens == want[: len(tokens)]
    assert len(events) == len(told) == 1
    tokens, events = sliding("a new prompt, partial", limit)
    assert tokens == want[:1]
    assert scores(events)[-1] == pytest.approx(scores(told)[0], rel=1e-4)


def test_a_partial_state_of_other_rows_is_unjudged(sliding):
    assert UNKNOWN in unjudged(sliding("of other rows, partial")[1])[-1]
