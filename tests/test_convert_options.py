"""Options that the files leave open, base models, unknown formats and files."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFWriter

from helpers import package
from steerbridge import gguf_file
from steerbridge.errors import (
    InvalidOption,
    MissingOption,
    NotRepresentable,
    UnknownFormat,
)
from steerbridge.fingerprint import ModelFacts
from steerbridge_convert import convert


def test_missing_and_invalid_options(tmp_path, artifact_paths, tiny_weights):
    with pytest.raises(MissingOption, match="strength is not in the files"):
        convert(artifact_paths["repeng"], tmp_path / "a", base=tiny_weights)
    with pytest.raises(MissingOption, match=r"base is not in the files .* give --base "):
        convert(artifact_paths["repeng"], tmp_path / "a", answers={"strength": "1"})
    with pytest.raises(MissingOption, match=r"eps is not in the files .* give --set eps="):
        convert(artifact_paths["autosteer"], tmp_path / "a", base=tiny_weights)
    with pytest.raises(InvalidOption, match="found 'one'"):
        convert(
            artifact_paths["repeng"], tmp_path / "a", answers={"strength": "one"}, base=tiny_weights
        )
    with pytest.raises(InvalidOption, match="polarity: unknown; known options: strength"):
        convert(
            artifact_paths["repeng"], tmp_path / "a", answers={"polarity": "up"}, base=tiny_weights
        )
    assert not (tmp_path / "a").exists()


def test_a_file_for_another_model_is_refused(tmp_path, artifact_paths):
    other = package(ModelFacts("qwen2", 16, 4, 64, name="other")).save(tmp_path / "base.gguf")
    with pytest.raises(NotRepresentable, match=r"not made for other: model_type.*hint=ignore"):
        convert(artifact_paths["repeng"], tmp_path / "a", answers={"strength": "1"}, base=other)
    narrow = package(ModelFacts("llama", 8, 4, 64, name="narrow")).save(tmp_path / "n.gguf")
    with pytest.raises(NotRepresentable, match="width 8"):
        convert(artifact_paths["repeng"], tmp_path / "a", answers={"strength": "1"}, base=narrow)


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
    convert(tmp_path / "v.gguf", tmp_path / "p", answers={"strength": "1"}, base=base)
