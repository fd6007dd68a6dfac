"""The tools themselves, in their own environment, on the same model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import helpers
from artifacts import read_as_package
from steerbridge_convert import read

torch = pytest.importorskip("torch", reason="needs the extra `convert`")
pytest.importorskip("transformers", reason="needs the extra `hf`")

from tiny_logits import TOKENS, assert_alike, logits  # noqa: E402

PEERS = Path(__file__).resolve().parent.parent / ".venv-peers" / "bin" / "python"
READERS = ("repeng", "control-vector", "steering-vectors", "hotwire")


@pytest.mark.peers
@pytest.mark.skipif(not PEERS.is_file(), reason="needs .venv-peers (make setup-peers)")
def test_the_tools_read_ours_and_we_read_theirs(tmp_path, artifact_paths, tiny_weights, tiny_llama):
    """repeng, steering-vectors and hotwire in their own environment, on the same model."""
    script = Path(__file__).parent / "peers.py"
    paths = {name: str(artifact_paths[name]) for name in READERS}
    deep = helpers.tiny(num_hidden_layers=20)
    deep.save_pretrained(tmp_path / "deep")
    job = {
        "model": str(tiny_weights),
        "artifacts": paths,
        "deep": str(tmp_path / "deep"),
        "ids": TOKENS.tolist(),
        "out": str(tmp_path),
    }
    subprocess.run([PEERS, script, json.dumps(job)], check=True, timeout=300)
    by_tool = np.load(tmp_path / "logits.npz")
    plain = logits(tiny_llama)
    assert_alike(torch.from_numpy(by_tool["plain"]), plain)
    for name in READERS:
        ours = logits(tiny_llama, read_as_package(name, artifact_paths[name], tiny_weights))
        assert (ours - plain).abs().max() > 0.1
        assert_alike(torch.from_numpy(by_tool[name]), ours)
    theirs = {"repeng": "theirs.gguf", "steering-vectors": "theirs.pt"}
    for name, file in theirs.items():
        ours = logits(tiny_llama, read_as_package(name, tmp_path / file, tiny_weights))
        assert_alike(ours, torch.from_numpy(by_tool[f"{name} theirs"]))
    # Their READMEs: a vector for every layer, and the layers that the tool then steers.
    files = {"repeng": "quick.gguf", "steering-vectors": "quick.pt"}
    plain = logits(deep)
    assert_alike(torch.from_numpy(by_tool["plain quick"]), plain)
    for name, file in files.items():
        package, losses = read(tmp_path / file, answers={"like": name}, base=tmp_path / "deep")
        assert not losses
        ours = logits(deep, package)
        assert (ours - plain).abs().max() > 0.1
        assert_alike(ours, torch.from_numpy(by_tool[f"{name} quick"]))
