"""The house itself: what is shipped, what imports what, what the docs say."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

import helpers
from steerbridge.cli.schema import build
from steerbridge.encodings import plain

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


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_arrows_point_one_way():
    above = {"steerbridge_hf", "steerbridge_llama_cpp", "steerbridge_convert"}
    above |= {"steerbridge_tgi", "steerbridge_run", "transformers", "llama_cpp"}
    for path in (ROOT / "steerbridge").rglob("*.py"):
        assert not above & set(imports_of(path)), path


def test_the_core_imports_neither_torch_nor_a_runtime():
    code = (
        "import sys, steerbridge, steerbridge.package, steerbridge.reference, steerbridge.cli;"
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
    jsonschema.validate(plain(helpers.package().spec), committed)
    broken = plain(helpers.package().spec)
    del broken["probes"][0]["comparator"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, committed)


def test_public_names_exist():
    import steerbridge

    for name in steerbridge.__all__:
        assert getattr(steerbridge, name) is not None
    assert sorted(steerbridge.__all__) == steerbridge.__all__


def test_the_readme_s_python_is_the_quickstart_example():
    readme = (ROOT / "README.md").read_text()
    example = (ROOT / "examples" / "quickstart.py").read_text()
    assert example.partition("# --- README\n")[2].strip() in readme
