"""Any valid spec survives a round trip through both encodings, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import helpers
from steerbridge import encodings
from steerbridge.errors import PackageError
from steerbridge.package import SteeringPackage, load, parse
from steerbridge.spec import tensor_shapes
from steerbridge.tensors import Tensor

LAYERS = helpers.FACTS.num_layers

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | finite | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
positions = st.sampled_from([helpers.MEAN, helpers.IMAGE]) | st.fixed_dictionaries(
    {"type": st.just("prompt_end")}, optional={"offset": st.integers(-9, 0)}
)
readings = st.builds(
    helpers.reading, st.integers(0, LAYERS).map(lambda n: f"layer_input[{n}]"), positions
)


token_readings = st.fixed_dictionaries(
    {
        "sites": st.lists(st.integers(1, LAYERS - 1), min_size=1, max_size=3, unique=True).map(
            lambda layers: [helpers.site(f"layer_input[{n}]") for n in layers]
        ),
        "scope": st.sampled_from(["prompt", "answer", "both"]),
        "window": st.integers(1, 4096),
        "skip": st.integers(0, 9),
        "rows": st.sampled_from(["all", "text", "image"]),
    }
)


@st.composite
def probes(draw, id):
    common = {"threshold": draw(finite), "bias": draw(finite)}
    if draw(st.booleans()):
        common |= {
            "readings": draw(st.lists(readings, min_size=1, max_size=3)),
            "comparator": draw(st.sampled_from([">", ">=", "<", "<="])),
            "link": draw(st.sampled_from(["identity", "sigmoid"])),
        }
    else:
        common |= {
            "token_reading": draw(token_readings),
            "comparator": draw(st.sampled_from([">", ">="])),
            "link": "sigmoid",
        }
    if draw(st.booleans()):
        common |= {"input_mean": f"{id}.mean", "input_scale": f"{id}.scale"}
    return helpers.linear_probe(id, **common)


tokens = st.lists(st.integers(0, helpers.FACTS.vocab_size - 1), min_size=1, max_size=5)


@st.composite
def interventions(draw, id):
    if draw(st.booleans()):
        marks = {"open": draw(tokens), "close": draw(tokens)}
        says = {"id": id, "type": "say", "text": "No.", "tokens": draw(tokens)}
        return says | draw(st.sampled_from([{}, {"header": draw(tokens)}, {"reasoning": marks}]))
    if draw(st.booleans()):
        low = {"form": "low_rank", "u": f"{id}.u", "v": f"{id}.v"}
        dense = {"form": "dense", "matrix": f"{id}.W"}
        return helpers.head(id, eps=draw(finite), weight=draw(st.sampled_from([low, dense])))
    layers = draw(st.lists(st.integers(LAYERS - 1, LAYERS - 1), min_size=1, max_size=2))
    targets = [
        {"site": helpers.site(f"layer_output[{n}]"), "vector": f"{id}.{i}"}
        for i, n in enumerate(layers)
    ]
    kind = draw(st.sampled_from(["add_vector", "project_out"]))
    return {
        "id": id,
        "type": kind,
        "position": "from_prompt_end",
        "alpha": draw(finite),
        "targets": targets,
    }


@st.composite
def packages(draw):
    ids = [f"p{i}" for i in range(draw(st.integers(1, 3)))]
    acts = [f"i{i}" for i in range(draw(st.integers(1, 3)))]
    condition = {"type": draw(st.sampled_from(["any", "all"])), "probes": ids}
    strength = draw(
        st.builds(lambda v: {"type": "constant", "value": v}, finite)
        | st.builds(lambda v: {"type": "score", "probe": ids[0], "scale": v}, finite)
    )
    fields = {
        "name": draw(text),
        "probes": [draw(probes(id)) for id in ids],
        "interventions": [draw(interventions(id)) for id in acts],
        "rules": [
            helpers.rule(None, acts, condition=draw(st.sampled_from([condition, None])))
            | {"strength": strength}
        ],
        **draw(st.dictionaries(text.map(lambda key: "x_" + key), json_values, max_size=2)),
    }
    if draw(st.booleans()):
        fields["evidence"] = {"sas": draw(json_values)}
    spec = parse(helpers.raw_spec(**fields))
    dtypes = st.sampled_from(["F32", "F16", "BF16"])
    tensors = {}
    for where, name, shape in tensor_shapes(spec):
        size = [2 if isinstance(n, str) else n for n in shape]
        seed = draw(st.integers(0, 99))
        values = helpers.np.random.default_rng(seed).normal(size=size)
        positive = helpers.np.abs(values) + 0.5 if "input_scale" in where else values
        tensors[name] = Tensor.of(positive, draw(dtypes))
    return SteeringPackage(spec, tensors)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(packages())
def test_directory_and_gguf_hold_the_same_bits(package):
    with tempfile.TemporaryDirectory() as name:
        directory = load(package.save(Path(name) / "dir"))
        file = load(directory.save(Path(name) / "one.gguf"))
        assert file == directory == package
        assert file.spec.to_json() == package.spec.to_json()
        file.save(Path(name) / "again")
        for part in (encodings.CONFIG_NAME, encodings.TENSORS_NAME):
            assert (Path(name) / "dir" / part).read_bytes() == (
                Path(name) / "again" / part
            ).read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["one.gguf", "dir"]))
def test_damaged_files_load_or_end_in_a_typed_error(data, name):
    with tempfile.TemporaryDirectory() as folder:
        target = helpers.package().save(Path(folder) / name)
        part = data.draw(st.sampled_from(sorted(target.iterdir()))) if target.is_dir() else target
        raw = bytearray(part.read_bytes())
        for _ in range(data.draw(st.integers(1, 6))):
            at = data.draw(st.integers(0, min(len(raw), 4096) - 1))
            raw[at] = data.draw(st.integers(0, 255))
        part.write_bytes(raw)
        try:
            loaded = load(target)
        except PackageError:
            return
        assert isinstance(loaded, SteeringPackage)
