"""Every format: detection, contents, exact round trips, and conversion to every other."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts import (
    ALL_LAYERS,
    ALWAYS,
    FORMAT_NAMES,
    SAMPLES,
    WRITABLE,
    answers_between,
    read_as_package,
    sample,
    vector,
)
from helpers import FACTS, package
from steerbridge.errors import NotRepresentable, WouldLose
from steerbridge.format import detect, formats, get_format
from steerbridge.tensors import Tensor
from steerbridge_convert import convert, read
from steerbridge_convert.table import table

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_every_format_has_a_sample_and_a_row_in_the_docs():
    assert sorted(formats()) == FORMAT_NAMES
    assert table() in (DOCS / "formats.md").read_text("utf-8")


@pytest.mark.parametrize("name", [n for n in FORMAT_NAMES if n != "cast"])
def test_a_format_knows_its_own_files_alone(name, artifact_paths):
    assert detect(artifact_paths[name]).name == name


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_contents_are_shown_without_answers(name, artifact_paths):
    assert json.dumps(get_format(name).contents(artifact_paths[name]), allow_nan=False)


@pytest.mark.parametrize("name", [n for n in WRITABLE if formats()[n].exact and n != "cast"])
def test_exact_formats_give_back_every_bit(name, artifact_paths, tiny_weights, tmp_path):
    first = read_as_package(name, artifact_paths[name], tiny_weights)
    again = tmp_path / artifact_paths[name].name
    convert(first.path, again, to=name, answers=SAMPLES[name].write, model=tiny_weights)
    second = read_as_package(name, again, tiny_weights)
    assert first.tensors == second.tensors
    assert first.spec.interventions == second.spec.interventions
    assert first.spec.rules == second.spec.rules
    assert first.spec.probes == second.spec.probes


@pytest.mark.parametrize("source", FORMAT_NAMES)
def test_every_pair_converts_or_says_why_not(source, artifact_paths, tiny_weights, tmp_path):
    spec = sample(source).spec
    for target in FORMAT_NAMES:
        path = tmp_path / f"{target}.{SAMPLES[target].name}{SAMPLES[target].suffix}"
        options = {
            "to": target,
            "source_format": source,
            "answers": answers_between(source, target),
            "base": tiny_weights,
            "model": tiny_weights,
        }
        status, error = attempt(artifact_paths[source], path, options)
        if status == "lossy":
            report = convert(artifact_paths[source], path, **options, allow_loss=True)
            assert report.losses == error.losses
        elif status == "ok":
            holds = formats()[target].holds
            assert {p.type for p in spec.probes} <= holds.probes
            assert {x.type for x in spec.interventions} <= holds.interventions
        assert path.exists() == (status != "impossible")


def attempt(source, path, options):
    """The status of a conversion and its error; nothing is written unless it succeeds."""
    try:
        assert not convert(source, path, **options).losses
    except WouldLose as error:
        assert not path.exists()
        return "lossy", error
    except NotRepresentable as error:
        return "impossible", error
    return "ok", None


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.integers(1, 3),
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16
        ),
        min_size=1,
    ),
    st.sampled_from(
        ["control-vector", "repeng", "svec-aisteer360", "steering-vectors", "easyedit"]
    ),
)
def test_any_vector_comes_back_bit_for_bit(values, name):
    places = [f"layer_output[{k}]" for k in values]
    original = package(FACTS, **{**ALWAYS, "interventions": [vector(*places)]})
    tensors = {f"v{i}": Tensor.of(np.array(v)) for i, v in enumerate(values.values())}
    answers = {**ALL_LAYERS, "applied_at": "layer_output"}
    format = get_format(name)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        original.replace(tensors=tensors).save(root / "p")
        artifact = root / f"artifact{SAMPLES[name].suffix}"
        convert(
            root / "p",
            artifact,
            to=name,
            answers={o.name: answers[o.name] for o in format.write_options},
        )
        restored, losses = read(
            artifact,
            source_format=name,
            answers={o.name: answers[o.name] for o in format.options if o.name in answers},
            base=FACTS.info(),
        )
        assert not losses
        stored = {
            t.site.layer: restored.tensors[t.vector].float32().tobytes()
            for t in restored.spec.interventions[0].targets
        }
    assert stored == {k: np.array(v, np.float32).tobytes() for k, v in values.items()}
