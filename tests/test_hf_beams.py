"""Beams and token readings: logits go with the rows, and each returned sequence has its outcome."""

from __future__ import annotations

import pytest

from steerbridge.testing import cases
from steerbridge.testing.cases import linear, of_rows
from steerbridge.testing.driver import Files
from steerbridge.testing.model import PAD, TinyModel
from steerbridge.testing.oracle import Guard

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from steerbridge_hf import steer  # noqa: E402

pytestmark = pytest.mark.hf
NEW = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(TinyModel(), tmp_path_factory.mktemp("beams"))


@pytest.fixture(scope="module")
def model(files):
    return transformers.AutoModelForCausalLM.from_pretrained(files.transformers).eval()


def outcome(files, package, prompt, answer):
    """What the reference says of a sequence: its last token is evaluated nowhere."""
    guard = Guard(files.model, package, prompt)
    whole = [*prompt, *answer[:-1]]
    guard.rows(whole)
    files.model.forward(whole, edit=guard)
    return guard.outcome


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 4},
        {"num_return_sequences": 2, "use_cache": False},
        {"num_return_sequences": 3, "do_sample": True, "temperature": 2.0},
        {"num_return_sequences": 1, "cache_implementation": "static"},
    ],
)
def test_each_returned_sequence_has_its_outcome(files, model, options):
    """The probe acts on nothing, so what the reference makes of the sequence itself is right."""
    probe = of_rows(linear(), window=1, scope="answer", skip=0)
    case = cases.case(files.model, [probe], [], [], seed=41)
    texts = [*case.fired[:3], *case.quiet[:2]]
    prompts = [files.model.encode(text) for text in texts]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = (ids != PAD).long()
    torch.manual_seed(1)
    with steer(model, case.package) as session:
        out = model.generate(
            ids,
            attention_mask=mask,
            num_beams=4,
            max_new_tokens=NEW,
            pad_token_id=PAD,
            **{"do_sample": False, **options},
        )
    each = options["num_return_sequences"]
    assert len(session.outcomes) == len(out) == each * len(prompts)
    fired = set()
    for i, (told, row) in enumerate(zip(session.outcomes, out.tolist(), strict=True)):
        expected = outcome(files, case.package, prompts[i // each], row[width:])
        [got], [want] = told.verdicts, expected.verdicts
        assert (got.fired, got.fired_in, got.row) == (want.fired, want.fired_in, want.row)
        assert got.score == pytest.approx(want.score, rel=1e-4)
        fired.add(got.row)
    assert len(fired) > 1  # they are not all alike


def test_an_answer_that_ended_is_judged_no_further(files, model):
    """In a batch the padding behind the end of one answer is nobody's."""
    case = cases.case(
        files.model,
        [of_rows(linear(), scope="answer", window=1, skip=0)],
        [cases.says(id="s")],
        [cases.rule(["p"], ["s"])],
        seed=23,
    )
    early = next(p for p in case.fired if len(case.expected(p, NEW).tokens) < NEW)
    late = case.quiet[0]
    prompts = [files.model.encode(p) for p in (early, late)]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    with steer(model, case.package) as session:
        model.generate(
            ids,
            attention_mask=(ids != PAD).long(),
            max_new_tokens=NEW,
            pad_token_id=PAD,
            do_sample=False,
        )
    for told, prompt in zip(session.outcomes, (early, late), strict=True):
        [want] = case.expected(prompt, NEW).outcome.verdicts
        assert told.verdicts[0].row == want.row
        assert told.verdicts[0].score == pytest.approx(want.score, rel=1e-4)
