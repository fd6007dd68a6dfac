"""Hostile, truncated and malformed files."""

from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest
from gguf import GGUFWriter

from artifacts import ALL_LAYERS, FORMAT_NAMES, SAMPLES
from steerbridge import gguf_file
from steerbridge.errors import ConversionError, UnreadableSource
from steerbridge_convert import convert, publishing

torch = pytest.importorskip("torch", reason="needs the extra `convert`")


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # by torch, for the raw pickle
@pytest.mark.parametrize("name", ["steering-vectors", "hotwire", "lm-steer"])
def test_a_hostile_pickle_runs_nothing(name, tmp_path, monkeypatch, tiny_weights):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lm_steer_vector.pt"
    bombs = {
        "zip": lambda: torch.save({"layer_activations": _Bomb(), "projector1": 1}, path),
        "raw": lambda: path.write_bytes(pickle.dumps(_Bomb())),
        "list": lambda: torch.save([_Bomb(), {}, 0], path),
    }
    for make in bombs.values():
        make()
        with pytest.raises(UnreadableSource, match=r"plain containers|archive of torch\.save"):
            convert(
                path,
                tmp_path / "out",
                source_format=name,
                answers=SAMPLES[name].read,
                base=tiny_weights,
            )
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "name", [n for n in FORMAT_NAMES if n not in ("steerbridge", "steerbridge-gguf")]
)
def test_truncated_files_are_one_clear_error(name, artifact_paths, tmp_path, tiny_weights):
    source = artifact_paths[name]
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    files = [p for p in files if p.name != publishing.LIST]
    for file in files:
        copy = tmp_path / "copy" / source.name
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
            broken = copy / file.relative_to(source)
        else:
            copy.parent.mkdir(exist_ok=True)
            broken = copy
        whole = file.read_bytes()
        for size in (0, 3, len(whole) // 2, len(whole) - 1):
            broken.write_bytes(whole[:size])
            if file.suffix == ".json" and size == len(whole) - 1:
                continue  # only the final newline is missing
            with pytest.raises(ConversionError):
                convert(
                    copy,
                    tmp_path / "out",
                    source_format=name,
                    answers=SAMPLES[name].read,
                    base=tiny_weights,
                    model=tiny_weights,
                )
        broken.write_bytes(whole)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"direction.1": np.array([1, np.nan], "f4")}, "finite values"),
        ({"direction.1": np.ones((2, 2), "f4")}, "one dimension"),
        ({"direction.1": np.ones(2, "f4"), "other": np.ones(2, "f4")}, "direction.N"),
        ({"direction.-1": np.ones(2, "f4")}, "direction.N"),
        ({}, "found none"),
    ],
)
def test_broken_directions(tensors, match, tmp_path, tiny_weights):
    path = tmp_path / "v.gguf"

    def fill(writer: GGUFWriter) -> None:
        for name, values in tensors.items():
            writer.add_tensor(name, values)

    gguf_file.write(path, "controlvector", fill)
    with pytest.raises(UnreadableSource, match=match):
        convert(path, tmp_path / "a", answers=ALL_LAYERS, base=tiny_weights)
