"""Installing from the wheel works, and releases are described. `make test-install` has the rest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nightly

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
RELEASE = re.compile(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", re.M)


@pytest.mark.slow
def test_the_wheel_installs_and_its_light_extras_work():
    pytest.importorskip("build")
    command = [sys.executable, str(ROOT / "tests" / "install"), "--extras", "core,run,eval"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["extras"] == {"core": "ok", "run": "ok", "eval": "ok"}


def test_the_version_has_a_section_in_the_changelog():
    releases = RELEASE.findall(CHANGELOG)
    assert PROJECT["version"] == releases[0][0]
    assert sorted(releases, key=lambda r: r[1], reverse=True) == releases
    assert CHANGELOG.index("## [Unreleased]") < CHANGELOG.index(f"## [{PROJECT['version']}]")


def test_every_section_of_the_changelog_has_an_address_and_known_headings():
    sections = re.findall(r"^## \[(.+?)\]", CHANGELOG, re.M)
    addresses = re.findall(r"^\[(.+?)\]: https://\S+$", CHANGELOG, re.M)
    assert sections == addresses
    headings = set(re.findall(r"^### (.+)$", CHANGELOG, re.M))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_ci_runs_the_pythons_that_are_declared():
    jobs = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    [tested] = re.findall(r"^ +python: (\[.+\])$", jobs, re.M)
    known = "Programming Language :: Python :: 3."
    declared = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith(known)]
    assert json.loads(tested) == declared
    assert PROJECT["requires-python"] == f">={declared[0]}"
    [parts] = re.findall(r"^ +part: \[(.+)\]$", jobs, re.M)
    assert sorted(parts.split(", ")) == sorted(nightly.PARTS)


def test_nightly_goes_on_where_it_was_stopped(tmp_path):
    record, ran = tmp_path / "kept" / "tree.json", []

    def passes(name):
        ran.append(name)
        return name != "broken"

    names = ["first", "broken", "last"]
    expected = {"first": "ok", "broken": "failed", "last": "ok"}
    assert nightly.run(names, record, passes) == expected
    again = nightly.run(names, record, passes)
    assert again == {"first": "skipped: done", "broken": "failed", "last": "skipped: done"}
    assert ran == ["first", "broken", "last", "broken"]


def test_no_nightly_part_is_too_long_for_one_session():
    assert all(part.minutes <= 150 for part in nightly.PARTS.values())
