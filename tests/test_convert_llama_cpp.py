"""Files for llama.cpp: its own adapters give the same logits as our package."""

from __future__ import annotations

import ctypes
import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from artifacts import ALWAYS, DENSE_HEAD, LOW_HEAD, vector
from helpers import last_json, linear_probe, package, run_cli
from steerbridge_convert import convert

pytest.importorskip("llama_cpp", reason="needs the extra `llama-cpp`")

import llama_cpp

from conftest import MODELS
from steerbridge.fingerprint import ModelFacts
from steerbridge_convert.base import base_model
from steerbridge_llama_cpp import steer
from steerbridge_llama_cpp.dequantise import copy_metadata

pytestmark = pytest.mark.llama_cpp

BLOCKS = 4
TOKENS = [504, 1125, 6404, 282, 260, 6117, 359]


@pytest.fixture(scope="module")
def untied(smollm2_f32_path):
    """Four blocks of SmolLM2 whose output embedding is separate from the input embedding."""
    path = MODELS / f"SmolLM2-{BLOCKS}-blocks-untied.F32.gguf"
    if path.is_file():
        return path
    reader = GGUFReader(smollm2_f32_path)
    temporary = path.with_suffix(".part")
    writer = GGUFWriter(temporary, "llama")
    copy_metadata(reader, writer, without=("llama.block_count",))
    writer.add_block_count(BLOCKS)
    for tensor in reader.tensors:
        number = tensor.name.removeprefix("blk.").partition(".")[0]
        if number.isdecimal() and int(number) >= BLOCKS:
            continue
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=GGMLQuantizationType.F32)
        if tensor.name == "token_embd.weight":
            writer.add_tensor("output.weight", np.ascontiguousarray(tensor.data[:, ::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return temporary.replace(path)


@pytest.fixture(scope="module")
def known(untied):
    base = base_model(untied)
    return ModelFacts("llama", base.hidden_size, base.num_layers, base.vocab_size, name=base.name)


def opened(path, **options):
    return llama_cpp.Llama(str(path), n_ctx=64, n_threads=2, verbose=False, **options)


def logits(llama):
    llama.reset()
    llama.eval(TOKENS)
    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy()


def ours(path, package):
    llama = opened(path)
    plain = logits(llama)
    with steer(llama, package):
        return plain, logits(llama)


def assert_alike(actual, expected, plain):
    size = np.abs(plain).max()
    assert np.abs(expected - plain).max() > 1e-2 * size
    assert np.abs(actual - expected).max() < 1e-5 * size


def test_a_control_vector_acts_like_the_package(untied, known, tmp_path):
    """llama.cpp applies the buffer that its common_control_vector_load makes from the file."""
    acts = vector("layer_output[1]", "layer_output[3]", alpha=3.0)
    steering = package(known, **{**ALWAYS, "interventions": [acts]})
    convert(steering.save(tmp_path / "p.gguf"), tmp_path / "v.gguf", to="control-vector")
    buffer = np.zeros((BLOCKS - 1, known.hidden_size), np.float32)
    for tensor in GGUFReader(tmp_path / "v.gguf").tensors:
        kind, _, number = tensor.name.partition(".")
        assert (kind, tensor.tensor_type.name, tensor.data.ndim) == ("direction", "F32", 1)
        assert int(number) >= 1  # otherwise llama.cpp rejects the whole file
        buffer[int(number) - 1] += tensor.data
    llama = opened(untied)
    data = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert not llama_cpp.llama_set_adapter_cvec(
        llama._ctx.ctx, data, buffer.size, known.hidden_size, 1, BLOCKS
    )
    plain, steered = ours(untied, steering)
    assert_alike(logits(llama), steered, plain)


@pytest.mark.parametrize("fields", [DENSE_HEAD, LOW_HEAD], ids=["dense", "low_rank"])
def test_a_head_lora_acts_like_the_package(fields, untied, known, tmp_path):
    steering = package(known, scale=0.05, free=8, **fields)
    convert(steering.save(tmp_path / "p.gguf"), tmp_path / "l.gguf", to="lora-gguf", model=untied)
    plain, steered = ours(untied, steering)
    assert_alike(logits(opened(untied, lora_path=str(tmp_path / "l.gguf"))), steered, plain)


def test_facts_are_read_from_a_gguf_model(untied, known, smollm2_path):
    assert base_model(untied).num_layers == BLOCKS
    assert base_model(smollm2_path).vocab_size == known.vocab_size == 49152
    assert base_model(smollm2_path).chat_template_sha256 is not None


def test_a_tied_gguf_takes_no_lora(smollm2_path, tmp_path):
    from steerbridge.errors import NotRepresentable

    base = base_model(smollm2_path)
    facts = ModelFacts("llama", base.hidden_size, base.num_layers, base.vocab_size, name="SmolLM2")
    path = package(facts, **LOW_HEAD).save(tmp_path / "p.gguf")
    with pytest.raises(
        NotRepresentable, match=r"shares token_embd.weight between input and output"
    ):
        convert(path, tmp_path / "l.gguf", to="lora-gguf", model=smollm2_path)


def test_a_lower_rank_is_measured_on_prompts(smollm2_path, tmp_path):
    """`--data` reports how many harmful prompts are refused before and after."""
    base = base_model(smollm2_path)
    facts = ModelFacts("llama", base.hidden_size, base.num_layers, base.vocab_size, name="SmolLM2")
    always = package(facts, scale=0.01, probes=[linear_probe(threshold=-1e9)])
    always.save(tmp_path / "p.gguf")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Say a rude word.", "harmful": True}))
    done = run_cli(
        *("convert", tmp_path / "p.gguf", tmp_path / "q.gguf", "--rank", "4"),
        *("--model", smollm2_path, "--runtime", "llama.cpp"),
        *("--data", tmp_path / "p.jsonl", "--json"),
    )
    assert done.returncode == 0, done.stderr
    report = last_json(done.stdout)
    assert set(report["refused"]) == {"before", "after"}
    assert 0.9 < report["truncations"][0]["error"] < 1
