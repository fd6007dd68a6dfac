"""Token readings for users: the package made by hand, `steerbridge score`, answers held back."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

import helpers
from steerbridge.errors import InvalidSpec, NotRepresentable
from steerbridge.format import formats
from steerbridge.package import parse
from steerbridge.reference import Verdict
from steerbridge.runtime import Outcome

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
READING = {
    "sites": [helpers.site("layer_input[2]")],
    "scope": "both",
    "window": 4,
    "skip": 1,
    "rows": "all",
}


def probe(**fields):
    reading = READING | {k: fields.pop(k) for k in list(fields) if k in READING}
    return helpers.linear_probe(**{"link": "sigmoid", "token_reading": reading, **fields})


# ---------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sites": [helpers.site("layer_input[0]")]}, r"sites\[0\]: expected layer_input\[1\]"),
        ({"sites": [helpers.site("layer_input[4]")]}, r"sites\[0\]: expected layer_input\[1\]"),
        ({"sites": [helpers.site("layer_input[2]")] * 2}, "each site once"),
        ({"link": "identity"}, "a sigmoid or softmax"),
        ({"comparator": "<"}, "> or >="),
        ({"readings": [helpers.reading("layer_input[2]")]}, "either readings or a token_reading"),
        ({"window": 0}, "greater than or equal to 1"),
        ({"scope": "all"}, "'prompt', 'answer' or 'both'"),
    ],
)
def test_an_unsound_reading_names_the_field(fields, message):
    with pytest.raises(InvalidSpec, match=message):
        helpers.package(probes=[probe(**fields)])


def test_a_probe_that_reads_nothing_is_refused():
    reads_nothing = helpers.linear_probe(readings=[])
    with pytest.raises(InvalidSpec, match="a token_reading, found neither"):
        helpers.package(probes=[reads_nothing])


def test_what_is_new_says_so():
    with pytest.raises(InvalidSpec, match=r"spec_version: expected 1\.1 or later"):
        helpers.package(spec_version="1.0", probes=[probe()])


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"probes": [helpers.linear_probe(later=1)]}, r"probes\[0\]\.linear\.later"),
        ({"interventions": [helpers.head(later=1)]}, r"interventions\[0\]\.head_matrix\.later"),
        ({"rules": [helpers.rule(["p"], ["h"], later=1)]}, r"rules\[0\]\.later"),
        ({"probes": [probe(token_reading=READING | {"later": 1})]}, r"token_reading\.later"),
    ],
)
def test_an_unknown_field_that_decides_is_refused_by_its_path(part, path):
    with pytest.raises(InvalidSpec, match=path):
        parse(helpers.raw_spec(**part))


def test_a_reading_that_is_not_known_is_refused_by_its_name():
    reading = helpers.reading("layer_input[2]", {"type": "prompt_median"})
    with pytest.raises(InvalidSpec, match="prompt_median"):
        parse(helpers.raw_spec(probes=[helpers.linear_probe(readings=[reading])]))


# ---------------------------------------------------------------- other tools


def test_no_other_format_takes_a_token_reading_or_a_sentence_in_silence(tmp_path):
    say = {"id": "h", "type": "say", "text": "No.", "tokens": [1, 2]}
    package = helpers.package(probes=[probe()], interventions=[helpers.head(), say | {"id": "s"}])
    for name, format in formats().items():
        if name.startswith("steerbridge"):
            assert format.losses(package, None) == []
            continue
        try:
            lost = [str(loss) for loss in format.losses(package, None)]
        except NotRepresentable:
            continue
        assert any("probe p" in text for text in lost), name
        assert any("intervention s (say)" in text for text in lost), name


# ---------------------------------------------------------------- where it fired


@pytest.mark.parametrize(
    ("how", "places", "expected"),
    [
        ("any", ("prompt", "answer"), "prompt"),
        ("all", ("prompt", "answer"), "answer"),
        ("any", ("", "answer"), "answer"),
    ],
)
def test_where_a_rule_began(how, places, expected):
    rules = [helpers.rule(["p", "q"], ["h"], condition={"type": how, "probes": ["p", "q"]})]
    spec = helpers.package(probes=[helpers.linear_probe(), helpers.linear_probe("q")], rules=rules)
    told = [
        Verdict(id, 0.0, 0.0, ">", bool(place), fired_in=place)
        for id, place in zip("pq", places, strict=True)
    ]
    outcome = Outcome(tuple(told), ("r",))
    assert outcome.fired_in(spec.spec) == expected
    assert Outcome(tuple(told), ()).fired_in(spec.spec) == ""
    assert Outcome.from_json(outcome.to_json()) == outcome


# ---------------------------------------------------------------- answers held back


class Watching:
    """An engine whose rule fires before its sixth token."""

    name, context, vision = "watching", 100, False

    def __init__(self, package):
        self.package = package

    def answer(self, question, sampling, emit, check):
        from steerbridge.serving import Ended, Token

        quiet = Outcome((Verdict("p", 0.1, 0.5, ">", False),), ())
        fired = Outcome((Verdict("p", 0.9, 0.5, ">", True, fired_in="answer", row=9),), ("r",))
        fires = "harm" in question.prompt
        for n in range(8):
            outcome = fired if fires and n >= 5 else quiet
            if not emit(Token(n, b"No"[n - 5 : n - 4] if fires and n >= 5 else b"x"), outcome):
                break
            if fires and n == 6:
                break
        return Ended("eos_token", 3, fired if fires else quiet)


@pytest.mark.parametrize(
    ("hold_back", "prompt", "shown"),
    [
        (0, "harm", "xxxxxNo"),
        (3, "harm", "xxNo"),
        (99, "harm", "No"),
        (None, "harm", "xNo"),  # the probe's window is 4
        (99, "calm", "xxxxxxxx"),
    ],
)
def test_tokens_in_which_a_probe_fires_are_not_shown(hold_back, prompt, shown):
    serving = pytest.importorskip("steerbridge_serve.worker")
    from steerbridge.serving import Question, Sampling

    worker = serving.Worker(Watching(helpers.package(probes=[probe()])), hold_back)

    async def run():
        job = serving.Job(lambda: Question(prompt=prompt), Sampling(8))
        worker.submit(job)
        seen = []
        while not seen or not isinstance(seen[-1], serving.Finish):
            seen.append(await asyncio.wait_for(job.event(), 5))
        return seen

    *steps, finish = asyncio.run(run())
    worker.close()
    assert "".join(step.text for step in steps) + finish.text == shown
    assert finish.outcome.fired == (prompt == "harm")


# ---------------------------------------------------------------- the example, and looking


@pytest.mark.hf
@pytest.mark.llama_cpp
@pytest.mark.slow
def test_the_answer_of_the_example_is_stopped_in_its_middle(smollm2_hf, smollm2_path, tmp_path):
    pytest.importorskip("llama_cpp")
    import steerbridge

    sys.path.insert(0, str(EXAMPLES))
    import watched

    package = watched.made(smollm2_hf)
    rows = []
    for model in (smollm2_hf, steerbridge.open_model("llama.cpp", smollm2_path)):
        question = steerbridge.Example(watched.QUESTION, False)
        [plain] = model.generate([question], None, max_new_tokens=100)
        [answer] = model.generate([question], package, max_new_tokens=100)
        begun, sentence, behind = answer.text.partition(watched.SENTENCE)
        assert plain.text.startswith(begun)
        assert (len(begun) > 20, sentence, behind) == (True, watched.SENTENCE, "")
        assert answer.finish == "stop"
        [verdict] = answer.outcome.verdicts
        assert verdict.fired_in == "answer"
        rows.append(verdict.row)
    assert rows[0] == rows[1]
    _looks(package.save(tmp_path / "food.gguf"), tmp_path, smollm2_path)


def _looks(package, folder, model):
    text = "Bake the bread with butter, salt and a little sugar in a hot oven."
    (folder / "text.txt").write_text(text)
    rows = {}
    for runtime in ("hf", "llama.cpp"):
        args = ["score", package, model, folder / "text.txt", "--runtime", runtime, "--json"]
        done = helpers.run_cli(*args, "--html", folder / "page.html")
        assert done.returncode == 0, done.stderr
        [told] = helpers.last_json(done.stdout)["probes"]
        assert told["fired"]
        rows[runtime] = told
    assert rows["hf"]["row"] == rows["llama.cpp"]["row"]
    tokens = [[row["token"] for row in rows[r]["rows"]] for r in rows]
    assert tokens[0] == tokens[1]
    assert "Bake" in "".join(tokens[0])
    page = (folder / "page.html").read_text()
    assert page.count("<mark") == len(tokens[0])
    assert "<script" not in page
    shown = helpers.run_cli("score", package, model, "--text", text, "--runtime", "llama.cpp")
    assert f"{rows['llama.cpp']['row']:>6} " in shown.stdout
    assert "food: fired" in shown.stdout
    both = helpers.run_cli("score", package, model, folder / "text.txt", "--text", text)
    assert both.returncode == 1
    assert "a file or --text, found both" in both.stderr
