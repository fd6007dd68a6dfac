"""Without torch: GGUF and safetensors formats work, `torch.save` files name the missing extra."""

from __future__ import annotations

import subprocess
import sys

from artifacts import ALWAYS, vector
from helpers import package

PROGRAM = """
import sys
from pathlib import Path

sys.modules["torch"] = None  # importing it raises ImportError
from steerbridge.errors import RuntimeMissing
from steerbridge.format import detect, formats
from steerbridge_convert import convert

folder = Path(sys.argv[1])
assert len(formats()) >= 18
targets = {"control-vector": "v.gguf", "svec-ibm": "v.svec", "steerkit": "v.safetensors"}
for name, target in targets.items():
    convert(folder / "package", folder / target, to=name)
    options = {"positions": "all_positions"}
    if name != "steerkit":
        options |= {"strength": "1", "layers": "all"}
    convert(folder / target, folder / name, answers=options, base=folder / "package")
(folder / "v.pt").write_bytes(b"")
for attempt in (
    lambda: detect(folder / "v.pt"),
    lambda: convert(folder / "package", folder / "w.pt", to="steering-vectors"),
):
    try:
        attempt()
    except RuntimeMissing as error:
        assert error.command == "pip install 'steerbridge[convert]'", error.command
    else:
        raise AssertionError("no error")
assert not (folder / "w.pt").exists()
"""


def test_only_torch_save_files_need_torch(tmp_path):
    steering = package(**{**ALWAYS, "interventions": [vector("layer_output[1]")]})
    steering.save(tmp_path / "package")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
