"""steerkit and SAELens themselves, in their own environment (`make test-lens`)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from artifacts import SAMPLES, read_as_package

torch = pytest.importorskip("torch", reason="needs the extra `convert`")
pytest.importorskip("transformers", reason="needs the extra `hf`")

from tiny_logits import TOKENS, assert_alike, logits  # noqa: E402

LENS = Path(__file__).resolve().parent.parent / ".venv-lens" / "bin" / "python"
READERS = ("steerkit", "sae-lens")


@pytest.mark.lens
def test_tools_on_transformer_lens_steer_as_we_do(
    tmp_path, artifact_paths, tiny_weights, tiny_llama
):
    model = tmp_path / "model"
    shutil.copytree(tiny_weights, model)
    job = {
        "model": str(model),
        "artifacts": {name: str(artifact_paths[name]) for name in READERS},
        "ids": TOKENS.tolist(),
        "out": str(tmp_path),
    }
    script = Path(__file__).parent / "lens.py"
    subprocess.run([LENS, script, json.dumps(job)], check=True, timeout=300)
    by_tool = np.load(tmp_path / "logits.npz")
    plain = logits(tiny_llama)
    assert_alike(torch.from_numpy(by_tool["plain"]), plain)
    theirs = {"steerkit": "theirs.probe.safetensors", "sae-lens": "theirs"}
    for name in READERS:
        answers = {**SAMPLES[name].read} | ({"strength": "2.5"} if name == "sae-lens" else {})
        files = {name: artifact_paths[name], f"{name} theirs": tmp_path / theirs[name]}
        for key, file in files.items():
            ours = logits(tiny_llama, read_as_package(name, file, tiny_weights, **answers))
            assert (ours - plain).abs().max() > 0.1
            assert_alike(torch.from_numpy(by_tool[key]), ours)
