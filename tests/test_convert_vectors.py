"""Vectors of other tools change the logits as the tool itself does."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors import safe_open

from artifacts import read_as_package

torch = pytest.importorskip("torch", reason="needs the extra `convert`")
pytest.importorskip("transformers", reason="needs the extra `hf`")

from tiny_logits import assert_alike, logits  # noqa: E402

VECTORS = ["control-vector", "repeng", "easysteer", "steering-vectors", "easyedit", "hotwire"]


def hooked(model, changes, side):
    """Logits with vectors added at the outputs (or inputs) of blocks, as the tools do it."""
    handles = []
    for k, values in changes.items():
        block = model.model.layers[k]
        v = torch.from_numpy(np.array(values))
        if side == "output":
            handles.append(
                block.register_forward_hook(
                    lambda m, a, out, v=v: out[0] + v if isinstance(out, tuple) else out + v
                )
            )
        else:
            handles.append(block.register_forward_pre_hook(lambda m, a, v=v: (a[0] + v, *a[1:])))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def raw_vectors(name, path):
    """The vectors that the tool itself would read from its file, by key."""
    if name in ("control-vector", "repeng", "easysteer"):
        return {int(t.name.split(".")[1]): np.array(t.data) for t in GGUFReader(path).tensors}
    if name.startswith("svec"):
        directions = json.loads(path.read_text())["directions"]
        return {int(k): np.array(v, "f4").reshape(-1) for k, v in directions.items()}
    if name == "easyedit":
        return {int(p.stem[6:]): torch.load(p).numpy() for p in path.glob("layer_*.pt")}
    content = torch.load(path)
    if name == "hotwire":
        return {k: content[k].numpy() for k in (1, 2)}
    return {k: v.numpy() for k, v in content["layer_activations"].items()}


@pytest.mark.parametrize(
    ("name", "side"),
    [(n, "output") for n in VECTORS] + [("svec-ibm", "input"), ("svec-aisteer360", "input")],
)
def test_vectors_change_the_logits_as_their_tool_does(
    name, side, artifact_paths, tiny_weights, tiny_llama
):
    path = artifact_paths[name]
    raw = raw_vectors(name, path)
    expected = hooked(tiny_llama, raw, side)
    assert (expected - logits(tiny_llama)).abs().max() > 0.1
    assert_alike(logits(tiny_llama, read_as_package(name, path, tiny_weights)), expected)
    twice = hooked(tiny_llama, {k: 2 * v for k, v in raw.items()}, side)
    doubled = read_as_package(name, path, tiny_weights, strength="2")
    assert_alike(logits(tiny_llama, doubled), twice)


def test_steerkit_s_direction_and_alpha(artifact_paths, tiny_weights, tiny_llama):
    with safe_open(artifact_paths["steerkit"], "numpy") as file:
        metadata, values = file.metadata(), file.get_tensor("direction.mass_mean")
    assert abs(np.linalg.norm(values) - 1) < 1e-6
    assert metadata["hook_name"] == "blocks.2.hook_resid_post"
    expected = hooked(tiny_llama, {2: float(metadata["auto_alpha"]) * values}, "output")
    package = read_as_package("steerkit", artifact_paths["steerkit"], tiny_weights)
    assert_alike(logits(tiny_llama, package), expected)
