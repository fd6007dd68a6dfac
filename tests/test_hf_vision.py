"""The HF adapter on prompts with images, against the numpy oracle, on tiny random models."""

from __future__ import annotations

import numpy as np
import pytest

import helpers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import vision  # noqa: E402
from oracle import oracle  # noqa: E402
from steerbridge.errors import UnsupportedFeature  # noqa: E402
from steerbridge_hf import steer  # noqa: E402
from steerbridge_hf.sites import facts  # noqa: E402
from tiny_requests import forward  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("no_grad")]
NEW = 6
SEEDS = [3, 4, None, 5]  # the third prompt has no image

PROBE = helpers.linear_probe(
    readings=[
        helpers.reading("layer_input[2]"),
        helpers.reading("layer_input[1]", helpers.MEAN),
        helpers.reading("layer_input[2]", helpers.IMAGE),
    ],
    input_mean="p.mean",
    input_scale="p.scale",
)
ADD = helpers.add_vector(2, alpha=3.0)


def prompts(rows):
    image = [vision.IMAGE] * rows
    return [[5, *image, 9, 13, 7], [7, 3, 11, *image, 21], [30, 31, 35], [*image, 17, 18, 19, 8]]


def padded(all_ids):
    width = max(map(len, all_ids))
    ids, mask = (torch.zeros(len(all_ids), width, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(all_ids):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def images_of(family, seed):
    return lambda ids: vision.inputs(family, ids, [] if seed is None else [seed])


QUICK = ("idefics3", "llava")  # `make check` runs these
EACH_FAMILY = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in vision.FAMILIES
]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_scores_verdicts_and_tokens_equal_the_oracle(family):
    model = vision.tiny(family)
    asked = prompts(vision.rows_per_image(model, family))

    def package(limit):
        return helpers.package(
            facts(model),
            scale=0.3,
            probes=[{**PROBE, "threshold": limit}],
            interventions=[helpers.head(), ADD],
            rules=[helpers.rule(["p"], ["v", "h"])],
        )

    def want(made, i, new):
        return oracle(model, made, asked[i], new, images=images_of(family, SEEDS[i]))

    scores = [want(package(0.0), i, 0)[0][0].score for i in range(len(asked))]
    assert len(set(np.round(scores, 3))) == len(scores)
    limit = float(np.mean(sorted(scores)[1:3]))
    batch = padded(asked)
    seeds = [s for s in SEEDS if s is not None]
    batch |= vision.inputs(family, batch["input_ids"], seeds)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**batch, **options)
    with steer(model, package(limit)) as session:
        output = model.generate(**batch, **options)
    assert [o.fired for o in session.outcomes] == [s > limit for s in scores]
    width = batch["input_ids"].shape[1]
    for i in range(len(asked)):
        verdicts, tokens = want(package(limit), i, NEW)
        got = session.outcomes[i].verdicts[0].score
        assert got == pytest.approx(verdicts[0].score, abs=1e-4)
        assert output[i, width:].tolist()[: len(tokens)] == tokens
        if scores[i] <= limit:
            assert torch.equal(output[i], plain[i])
    assert not torch.equal(output, plain)


def test_an_image_that_is_missing_counts_as_the_mean_of_the_inputs():
    model = vision.tiny("idefics3")
    package = helpers.package(facts(model), probes=[PROBE])
    with steer(model, package) as session:
        forward(session, model, {"input_ids": torch.tensor([[30, 31, 35]])})
        without = session.outcomes[0].verdicts[0].score
    want, _ = oracle(model, package, [30, 31, 35], 0)
    assert without == pytest.approx(want[0].score, abs=1e-4)


def test_the_token_of_an_image_is_found_in_every_configuration():
    for family in vision.FAMILIES:
        from steerbridge_hf.sites import has_vision, media_tokens

        model = vision.tiny(family)
        assert vision.IMAGE in media_tokens(model.config), family
        assert has_vision(model.config)
    assert not has_vision(helpers.tiny().config)


def test_images_that_cannot_be_told_from_text_are_refused():
    model = vision.tiny("idefics3")
    vars(model.config)["image_token_id"] = None  # as a configuration that calls it otherwise
    with pytest.raises(UnsupportedFeature, match="names no token for images"):
        steer(model, helpers.package(facts(model), probes=[PROBE]))
    steer(model, helpers.package(facts(model))).remove()  # reads the prompt end only
