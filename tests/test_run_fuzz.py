"""A short pass of the fuzzer of sessions; `make fuzz` is the long one."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("elftools", reason="needs the extra `run`")
pytest.importorskip("llama_cpp")
import fuzz_sessions
from steerbridge_run import preload

pytestmark = [
    pytest.mark.native,
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler"),
]


@pytest.mark.parametrize(("kind", "steps"), [("stub", 8_000), ("real", 1_000)])
def test_random_use_is_judged_as_it_was_meant(tmp_path, kind, steps):
    """Each reading of the fuzzer once; seeds and steps are the same everywhere."""
    backend = {"real": fuzz_sessions.real, "stub": fuzz_sessions.stub}[kind](tmp_path)
    for seed in range(5):
        ran, findings = fuzz_sessions.run(backend, seed, steps, preload.library(), tmp_path)
        assert not findings, findings
        assert ran >= steps
