"""The native hook's own C tests, built with sanitizers and fed by the numpy oracle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "adapters" / "steerbridge_llama_cpp" / "native"


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("sanitize", ["", "address,undefined"], ids=["plain", "sanitized"])
def test_native_hook_agrees_with_the_oracle(tmp_path, sanitize):
    golden, build = tmp_path / "golden", tmp_path / "build"
    golden.mkdir()
    run(sys.executable, ROOT / "tests" / "native" / "make_golden.py", golden)
    flags = [f"-DCMAKE_C_FLAGS=-fsanitize={sanitize}"] if sanitize else []
    options = ["-DSTEERHOOK_TESTS=ON", f"-DSTEERHOOK_GOLDEN={golden}", *flags]
    run("cmake", "-S", NATIVE, "-B", build, *options)
    run("cmake", "--build", build)
    output = run("ctest", "--verbose", cwd=build)
    assert "ok: 15 packages" in output


def run(*command, cwd=ROOT):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
