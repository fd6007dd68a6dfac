"""The house itself: what is shipped, what imports what, what the docs say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

import helpers
import house
from steerbridge.schema import build

ROOT = Path(__file__).resolve().parent.parent
SHELVES = ["adapters", "converters", "plugins"]


def packages_on_disk():
    homes = [ROOT / "steerbridge", *(p for s in SHELVES for p in (ROOT / s).glob("steerbridge_*"))]
    return sorted(str(p.relative_to(ROOT)) for p in homes if (p / "__init__.py").is_file())


def test_every_package_on_disk_is_shipped_and_typed():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(config["tool"]["scikit-build"]["wheel"]["packages"]) == packages_on_disk()
    for package in packages_on_disk():
        assert (ROOT / package / "py.typed").is_file(), package
    for shelf in SHELVES:
        assert not (ROOT / shelf / "__init__.py").exists(), shelf


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for package in packages_on_disk():
        name = Path(package).name
        source = {
            str(p.relative_to((ROOT / package).parent)) for p in (ROOT / package).rglob("*.py")
        }
        assert source <= set(names), name
    for data in (
        "steerbridge/corpus/data/pairs.txt",
        "steerbridge/evaluation/report.html.j2",
        "steerbridge/evaluation/report.md.j2",
        "steerbridge_serve/page/index.html",
        "steerbridge_serve/page/page.css",
        "steerbridge_serve/page/page.js",
    ):
        assert data in names
    assert not any(n.startswith(("tests/", "benchmarks/")) for n in names)


# What each room may import of the others; nothing else. Rooms further down know less.
ARROWS = {
    "steerbridge.cli": {
        "steerbridge",
        "steerbridge.datasets",
        "steerbridge.evaluation",
        "steerbridge.training",
    },
    "steerbridge.training": {
        "steerbridge",
        "steerbridge.datasets",
        "steerbridge.evaluation",
        "steerbridge_torch",
    },
    "steerbridge.evaluation": {"steerbridge", "steerbridge.datasets"},
    "steerbridge": {"steerbridge.corpus", "steerbridge.datasets"},
    "steerbridge.datasets": {"steerbridge", "steerbridge.corpus"},
    "steerbridge.corpus": set(),
    "steerbridge.testing": {"steerbridge"},
    "steerbridge_torch": {"steerbridge"},
    "steerbridge_hf": {"steerbridge", "steerbridge_torch"},
    "steerbridge_llama_cpp": {"steerbridge"},
    "steerbridge_convert": {"steerbridge", "steerbridge.datasets", "steerbridge.evaluation"},
    "steerbridge_run": {"steerbridge"},
    "steerbridge_tgi": {"steerbridge", "steerbridge_torch"},
    "steerbridge_vllm": {"steerbridge", "steerbridge_torch"},
    "steerbridge_serve": {"steerbridge"},
    "steerbridge_demo": {"steerbridge", "steerbridge.corpus", "steerbridge_hf"},
}
# Packages that are somebody else's and heavy -> the rooms whose modules may import them.
HEAVY = {
    "torch": {
        "steerbridge.training",
        "steerbridge_torch",
        "steerbridge_hf",
        "steerbridge_tgi",
        "steerbridge_vllm",
        "steerbridge_convert",
    },
    "transformers": {"steerbridge_hf"},
    "llama_cpp": {"steerbridge_llama_cpp"},
    "text_generation_server": {"steerbridge_tgi"},
    "vllm": {"steerbridge_vllm"},
}


def test_arrows_point_one_way():
    arrows = {room: set() for room in ARROWS}
    for module, targets in house.imports().items():
        room = house.room(module)
        arrows[room] |= {house.room(target) for target in targets} - {room}
    assert {room: sorted(to) for room, to in arrows.items()} == {
        room: sorted(to) for room, to in ARROWS.items()
    }


def test_no_room_has_a_circle_inside():
    assert house.circles(house.imports()) == []


def test_heavy_packages_are_imported_where_they_belong():
    rooms = {name: set() for name in HEAVY}
    for module, names in house.foreign_imports().items():
        for name in names & set(HEAVY):
            rooms[name].add(house.room(module))
    for name, at in rooms.items():
        assert at - {"steerbridge_demo"} <= HEAVY[name], name


def test_nobody_outside_imports_the_command_line():
    for path in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        assert not [n for n in house.names_imported(path) if n.startswith("steerbridge.cli")], path


def test_the_core_imports_neither_torch_nor_a_runtime():
    code = (
        "import sys, steerbridge, steerbridge.package, steerbridge.reference;"
        "import steerbridge.training.train, steerbridge.evaluation.evaluate, steerbridge.cli.app;"
        "[getattr(steerbridge, name) for name in steerbridge.__all__];"
        "from steerbridge import registry;"
        "registry.commands(), registry.runtimes();"
        "print([m for m in ('torch', 'transformers', 'llama_cpp') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_the_committed_schema_is_the_generated_one():
    committed = json.loads((ROOT / "docs" / "steering_config.schema.json").read_text())
    assert committed == build()
    jsonschema.Draft202012Validator.check_schema(committed)
    jsonschema.validate(helpers.package().spec.to_json(), committed)
    broken = helpers.package().spec.to_json()
    del broken["probes"][0]["comparator"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, committed)


PUBLIC = ["steerbridge", "steerbridge_hf", "steerbridge_llama_cpp", "steerbridge.testing"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_is_listed(name):
    module = importlib.import_module(name)
    listed = house.type_checking_names(Path(module.__file__))
    assert sorted(listed) == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_every_error_is_public():
    import steerbridge
    from steerbridge import errors

    defined = {n for n, e in vars(errors).items() if isinstance(e, type)}
    defined -= {"Sequence", "Path"}
    assert defined <= set(steerbridge.__all__)
    assert all(name in errors.__doc__ for name in defined - {"Problem"})


def test_importing_steerbridge_is_light():
    """Neither numpy nor pydantic: what is needed is imported when it is used."""
    code = "import sys, steerbridge; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"numpy", "pydantic", "gguf", "typer", "torch"} & set(eval(output.stdout))


def test_the_readme_s_python_is_the_quickstart_example():
    readme = (ROOT / "README.md").read_text()
    example = (ROOT / "examples" / "quickstart.py").read_text()
    assert example.partition("# --- README\n")[2].strip() in readme
