"""The core's tests with the oldest packages that pyproject.toml allows: `make test-minimal`.

What the core needs is installed at its lower bounds, everything else at its newest version, as pip
gives it to a user who has the old ones already. The last line is one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from environments import CORE, KEPT, Environment, variables
from wheels import ROOT, build, project

FOLDER: Final = KEPT / "minimal"
TOOLS: Final = ("hypothesis", "jsonschema", "pytest")
# Files of tests that need no extra, and in them the tests that need one all the same.
TESTS: Final = (
    "test_atomic.py",
    "test_cli.py",
    "test_corpus.py",
    "test_data.py",
    "test_datasets_checks.py",
    "test_datasets_columns.py",
    "test_datasets_files.py",
    "test_datasets_groups.py",
    "test_datasets_published.py",
    "test_native.py",
    "test_package.py",
    "test_properties.py",
    "test_reference.py",
)
LEFT_OUT: Final = (
    "test_datasets_columns.py::test_no_command_opens_a_model_before_it_has_read_its_prompts[eval]",
    *(  # of Parquet, so of the extra `eval`
        f"test_datasets_files.py::test_what_cannot_be_read_is_named[{case}]"
        for case in (
            "a.parquet-PAR1 no parquet-expected a Parquet file",
            "d/state.json-{}-state.json: expected a saved dataset",
            "d/state.json-{-state.json",
        )
    ),
)
# Older releases of typer call what click will remove; nothing of ours does.
WARNINGS: Final = "ignore:'click.utils:DeprecationWarning"


def main() -> int:
    """Install, test, and print the versions; 1 if a test fails."""
    start = time.monotonic()
    pins = lowest(project()["project"]["dependencies"])
    with tempfile.TemporaryDirectory(prefix="steerbridge-minimal-") as folder:
        environment = _prepared(pins, build(Path(folder)))
    left_out = [word for test in LEFT_OUT for word in ("--deselect", f"tests/{test}")]
    command = ["-W", WARNINGS, *left_out, *(f"tests/{name}" for name in TESTS)]
    code = subprocess.run(
        [str(environment.program("pytest")), *command],
        cwd=ROOT,
        env=variables(),
        stdout=sys.stderr,
        check=False,
    ).returncode
    verdict = "failed" if code else "passed"
    seconds = round(time.monotonic() - start)
    print(json.dumps({"test-minimal": verdict, "versions": pins, "seconds": seconds}))
    return int(code != 0)


def lowest(requirements: list[str]) -> dict[str, str]:
    """Name -> lower bound of requirements such as `numpy>=1.26`."""
    pairs = [requirement.partition(">=") for requirement in requirements]
    unbound = [name for name, operator, _ in pairs if not operator]
    assert not unbound, f"pyproject.toml: expected NAME>=VERSION, found {unbound}"
    return {name: version for name, _, version in pairs}


def _prepared(pins: dict[str, str], wheel: Path) -> Environment:
    requirements = [f"{name}=={version}" for name, version in pins.items()]
    stamp, wanted = FOLDER / ".requirements", json.dumps([sys.version, requirements, TOOLS])
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    fresh = not stamp.is_file() or stamp.read_text() != digest
    environment = Environment(CORE, FOLDER, frozenset({CORE}), fresh)
    if fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        environment.pip("install", *requirements, *TOOLS)
    environment.pip("install", "--force-reinstall", "--no-deps", wheel)
    environment.pip("check")
    stamp.write_text(digest)
    return environment


if __name__ == "__main__":
    sys.exit(main())
