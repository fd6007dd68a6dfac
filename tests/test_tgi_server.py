"""`make test-tgi`: the plugin inside TGI's own Python server, unmodified (docs/tgi.md sets it up).

STEERBRIDGE_TGI_PYTHON is the Python that it is installed for. Its flash classes run on a CPU with
the stand-ins for kernels in tests/tgi/kernels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import helpers
import tgi_shard
from helpers import MEAN, reading

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from steerbridge_hf import HfModel, open_model

KERNELS = Path(__file__).parent / "tgi" / "kernels"
pytestmark = [
    pytest.mark.tgi_server,
    pytest.mark.skipif(not tgi_shard.PYTHON, reason="STEERBRIDGE_TGI_PYTHON names no server"),
]

FLOAT32 = Path(__file__).parent / "tgi" / "float32.py"
CLIENT = Path(__file__).parent / "tgi" / "client.py"
NEW = 10


@dataclass
class Guarded:
    """A model's folder, prompts as text, a guard, and our HF adapter's answers."""

    model: Path
    harmful: list[bool]
    texts: list[str]
    guard: Path
    answers: list[list[int]]


def guarded(folder, model, path, readings) -> Guarded:
    prompts = helpers.corpus_prompts(4)
    guard, answers = helpers.fitted(model, prompts, readings, NEW)
    texts = [model.tokenizer.decode(model.render(p)) for p in prompts]
    return Guarded(
        path,
        [p.harmful for p in prompts],
        texts,
        guard.save(folder / "guard.gguf"),
        [list(a.tokens) for a in answers],
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory, smollm2_path):
    folder = tmp_path_factory.mktemp("tgi")
    model = open_model(smollm2_path)
    readings = [reading("layer_input[18]"), reading("layer_input[8]", MEAN)]
    case = guarded(folder, model, folder / "model", readings)
    tgi_shard.exported(model, folder / "model")
    return case


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, smollm2_path):
    """A tiny random GPT-2. With transformers 4.51 TGI can filter and concatenate its batches; for
    a Llama it passes a list where the model expects a cache."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tgi-gpt2")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=4, n_head=4, n_positions=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    inner = GPT2LMHeadModel(config).eval()
    for parameter in inner.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model = HfModel(inner, tokenizer)
    case = guarded(folder, model, folder / "model", [reading("layer_input[2]", MEAN)])
    tgi_shard.exported(model, folder / "model")
    return case


def served(case: Guarded, folder, **settings):
    """A shard of the server: its socket, and the events of the plugin."""
    return tgi_shard.shard(case.model, folder, case.guard, **settings)


def asked(case: Guarded, socket: Path, *scenarios: str) -> Any:
    """The answers of each scenario of tests/tgi/client.py."""
    question = {"model": str(case.model), "prompts": case.texts, "new": NEW, "scenarios": scenarios}
    return tgi_shard.asked(CLIENT, [socket], question)


def verdicts(log: Path) -> dict[int, bool]:
    events = helpers.json_lines(log.read_text())
    assert events[0]["event"] == "active"
    return {e["request"]: bool(e["fired"]) for e in events if e["event"] == "verdict"}


def check(case: Guarded, answers: Any, log: Path) -> None:
    """What fires is right, and every token is that of our HF adapter."""
    judged = verdicts(log)
    for name, got in answers.items():
        assert [judged[i] for i in got["requests"]] == case.harmful, name
        for i, (tokens, wanted) in enumerate(zip(got["tokens"], case.answers, strict=True)):
            assert tokens[: len(wanted)] == wanted, (name, i)


def test_padded_batches(smollm2, tmp_path):
    """`CausalLM`: the server's class for machines without a GPU."""
    with served(smollm2, tmp_path) as (socket, log):
        answers = asked(smollm2, socket, "alone", "batched")
        check(smollm2, answers, log)


def test_joined_and_filtered_batches(gpt2, tmp_path):
    with served(gpt2, tmp_path) as (socket, log):
        answers = asked(gpt2, socket, "alone", "batched", "filtered", "concatenated")
        check(gpt2, answers, log)


@pytest.mark.parametrize("speculate", ["0", "2"])
def test_flash_batches(smollm2, tmp_path, speculate):
    """The server's own `FlashCausalLM`, in float32."""
    settings = {"ATTENTION": "flashdecoding-ipex", "PREFILL_CHUNKING": "1", **flash_path()}
    settings["options"] = ["--speculate", speculate] if speculate != "0" else []
    names = ["alone", "batched", "filtered", "concatenated"]
    names += ["chunked"] if speculate == "0" else []
    with served(smollm2, tmp_path, script=FLOAT32, **settings) as (socket, log):
        check(smollm2, asked(smollm2, socket, *names), log)


def flash_path():
    return {"PYTHONPATH": os.pathsep.join([str(KERNELS), tgi_shard.SETTINGS["PYTHONPATH"]])}


def test_cached_prefixes_are_refused_for_means(smollm2, tmp_path):
    settings = {"ATTENTION": "flashdecoding-ipex", "PREFIX_CACHING": "1", **flash_path()}
    with (
        pytest.raises(RuntimeError, match="PREFIX_CACHING=0"),
        served(smollm2, tmp_path, **settings),
    ):
        pass


def test_another_model_is_refused(gpt2, smollm2, tmp_path):
    other = Guarded(gpt2.model, [], [], smollm2.guard, [])
    with pytest.raises(RuntimeError, match="does not fit this model"), served(other, tmp_path):
        pass
