"""Options that the files leave open, base models, unknown formats and files."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFWriter

from artifacts import ALL_LAYERS, SAMPLES
from helpers import package
from steerbridge import gguf_file
from steerbridge.errors import (
    InvalidOption,
    MissingOption,
    NotRepresentable,
    UnknownFormat,
)
from steerbridge.fingerprint import ModelFacts
from steerbridge_convert import convert, read


def test_missing_and_invalid_options(tmp_path, artifact_paths, tiny_weights):
    with pytest.raises(MissingOption, match="layers is not in the files"):
        convert(artifact_paths["repeng"], tmp_path / "a", base=tiny_weights)
    with pytest.raises(MissingOption, match=r"base is not in the files .* give --base "):
        convert(artifact_paths["repeng"], tmp_path / "a", answers=ALL_LAYERS)
    with pytest.raises(MissingOption, match=r"eps is not in the files .* give --set eps="):
        convert(artifact_paths["autosteer"], tmp_path / "a", base=tiny_weights)
    with pytest.raises(InvalidOption, match="found 'one'"):
        convert(
            artifact_paths["repeng"],
            tmp_path / "a",
            answers={**ALL_LAYERS, "strength": "one"},
            base=tiny_weights,
        )
    with pytest.raises(InvalidOption, match="polarity: unknown; known options: hint, layers"):
        convert(
            artifact_paths["repeng"], tmp_path / "a", answers={"polarity": "up"}, base=tiny_weights
        )
    assert not (tmp_path / "a").exists()


def test_a_file_for_another_model_is_refused(tmp_path, artifact_paths):
    other = package(ModelFacts("qwen2", 16, 4, 64, name="other")).save(tmp_path / "base.gguf")
    with pytest.raises(NotRepresentable, match=r"not made for other: model_type.*hint=ignore"):
        convert(artifact_paths["repeng"], tmp_path / "a", answers=ALL_LAYERS, base=other)
    narrow = package(ModelFacts("llama", 8, 4, 64, name="narrow")).save(tmp_path / "n.gguf")
    with pytest.raises(NotRepresentable, match="width 8"):
        convert(artifact_paths["repeng"], tmp_path / "a", answers=ALL_LAYERS, base=narrow)


def test_unknown_formats_and_files(tmp_path, artifact_paths):
    with pytest.raises(UnknownFormat, match="no format is called 'x'"):
        convert(artifact_paths["repeng"], tmp_path / "a", to="x")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "none", tmp_path / "a")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnknownFormat, match="no known format matches"):
        convert(tmp_path / "notes.txt", tmp_path / "a")


@pytest.mark.parametrize(
    ("hint", "model_type"),
    [
        ("mistral", "llama"),  # a GGUF file says llama.cpp's word
        ("gemma3", "gemma3_text"),
        ("qwen2_5_vl", "qwen2_5_vl_text"),
        ("qwen2_5_vl", "qwen2vl"),
        ("qwen3_moe", "qwen3moe"),
    ],
)
def test_two_words_for_one_architecture(hint, model_type, tmp_path):
    facts = ModelFacts(model_type, 16, 4, 64, name="other")
    base = package(facts).save(tmp_path / "base.gguf")

    def fill(writer: GGUFWriter) -> None:
        writer.add_string("controlvector.model_hint", hint)
        writer.add_tensor("direction.1", np.ones(16, "f4"))

    gguf_file.write(tmp_path / "v.gguf", "controlvector", fill)
    convert(tmp_path / "v.gguf", tmp_path / "p", answers=ALL_LAYERS, base=base)


VECTORS = [name for name, sample in SAMPLES.items() if "layers" in sample.read and name != "cast"]


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("left_out", ["layers", "positions", "strength"])
def test_where_and_how_strongly_is_asked_for(
    name, left_out, artifact_paths, tmp_path, tiny_weights
):
    pytest.importorskip("torch")
    said = {k: v for k, v in SAMPLES[name].read.items() if k != left_out}
    with pytest.raises(MissingOption, match=f"{left_out} is not in the files"):
        convert(artifact_paths[name], tmp_path / "a", answers=said, base=tiny_weights)


@pytest.mark.parametrize("name", VECTORS)
def test_what_was_said_is_in_the_package(name, artifact_paths, tmp_path, tiny_weights):
    pytest.importorskip("torch")
    whole, _ = read(artifact_paths[name], answers=SAMPLES[name].read, base=tiny_weights)
    first, second = (t.site.layer for t in whole.spec.interventions[0].targets)
    answers = {**SAMPLES[name].read, "positions": "from_prompt_end", "layers": f"{second}"}
    one, _ = read(artifact_paths[name], answers=answers, base=tiny_weights)
    (vector,) = one.spec.interventions
    assert [t.site.layer for t in vector.targets] == [second]
    assert vector.position == "from_prompt_end"
    answers |= {"layers": f"{first}-{second}", "strength": f"{first}:1.5,{second}:-2"}
    if second - first == 1:
        both, _ = read(artifact_paths[name], answers=answers, base=tiny_weights)
        acting = {v.targets[0].site.layer: v.alpha for v in both.spec.interventions}
        assert acting == {first: 1.5, second: -2.0}
        assert both.spec.rules[0].interventions == ("vector-1", "vector-2")


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        ({"layers": "0,7"}, r"layers: layers \[7\]: the file has \[0, 2\]"),
        ({"layers": "2-1"}, "the range 2-1 is none"),
        ({"layers": "2,2"}, "named twice"),
        ({"layers": "-1"}, "found '-1'"),
        ({"strength": "0:1"}, r"a number for each of the layers \[0, 2\], found \[0\]"),
        ({"strength": "0:1,0:2"}, "named twice"),
        ({"positions": "after"}, "one of all_positions, from_prompt_end"),
        ({"like": "caa"}, "one of"),
    ],
)
def test_a_scope_that_cannot_be_is_refused(answers, match, artifact_paths, tmp_path, tiny_weights):
    said = {**ALL_LAYERS, **answers}
    with pytest.raises(InvalidOption, match=match):
        convert(artifact_paths["repeng"], tmp_path / "a", answers=said, base=tiny_weights)


def test_the_examples_of_tools(tmp_path):
    facts = ModelFacts("llama", 16, 32, 64, name="deep")
    base = package(facts).save(tmp_path / "base.gguf")

    def fill(writer: GGUFWriter) -> None:
        for k in range(1, 32):
            writer.add_tensor(f"direction.{k}", np.full(16, k, "f4"))

    gguf_file.write(tmp_path / "v.gguf", "controlvector", fill)

    def read_like(like: str, **more: str) -> tuple[list[int], float]:
        got, _ = read(tmp_path / "v.gguf", answers={"like": like, **more}, base=base)
        (vector,) = got.spec.interventions
        return [t.site.layer for t in vector.targets], vector.alpha

    assert read_like("llama.cpp") == (list(range(1, 32)), 1.0)
    assert read_like("repeng") == ([32 + k for k in range(-17, -4)], 1.0)
    assert read_like("repeng", strength="2.2")[1] == 2.2
    assert read_like("ibm-quickstart") == (list(range(15, 24)), 1.5)
    assert read_like("ibm-paper", layers="20") == ([20], 0.1)
