"""The C tests of the native hook, built with sanitizers, on expectations of the numpy oracle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "adapters" / "steerbridge_llama_cpp" / "native"


pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("cc"), reason="no C compiler"),
]
FUZZED = 200_000  # inputs of the short pass; `make fuzz` runs ten millions


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Packages and states, with the results of the numpy oracle."""
    folder = tmp_path_factory.mktemp("golden")
    run(sys.executable, ROOT / "tests" / "native" / "make_golden.py", folder)
    return folder


@pytest.fixture(scope="module", params=["OFF", "ON"], ids=["plain", "sanitized"])
def build(request, golden, tmp_path_factory):
    """A build of the C tests; the sanitizers are address and undefined."""
    folder = tmp_path_factory.mktemp("build")
    options = ["-DSTEERHOOK_TESTS=ON", f"-DSTEERHOOK_GOLDEN={golden}"]
    run("cmake", "-S", NATIVE, "-B", folder, *options, f"-DSTEERHOOK_SANITIZE={request.param}")
    run("cmake", "--build", folder, "--parallel", "2")
    return folder


def test_the_native_hook_agrees_with_the_oracle(build):
    assert "ok: 15 packages" in run("ctest", "--verbose", cwd=build)


def test_the_package_reader_survives_strangers(build, golden):
    seeds = sorted((golden / "seeds").glob("*.gguf"))
    assert f"ok: {FUZZED} inputs" in run(build / "fuzz_short", FUZZED, 1, *seeds)


def run(*command, cwd=ROOT):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
