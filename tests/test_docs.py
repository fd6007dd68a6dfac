"""The docs: the tutorial's commands run, pages exist, and the site is built without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from steerbridge.cli.schema import build, page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def blocks(path, *kinds):
    found = re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)
    return [(kind, text) for kind, text in found if kind in kinds]


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("torch")
    bin = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    output = ""
    steps = blocks(DOCS / "tutorial.md", "python", "sh")
    assert len(steps) == 5
    for kind, text in steps:
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euc", text]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        output += done.stdout
    assert output.count("fired (threshold") == 2  # the harmful prompt, in both runtimes
    assert output.count("quiet (threshold") == 2
    assert "AutoSteer (conditional)" in output
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_python_in_the_docs_is_python():
    for path in DOCS.rglob("*.md"):
        for _, text in blocks(path, "python"):
            compile(text, str(path), "exec")


def test_the_reference_is_the_generated_one():
    assert (DOCS / "reference.md").read_text("utf-8").splitlines() == list(page(build()))


def test_every_page_is_in_the_site():
    listed = re.findall(r": ([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_the_site_is_built_and_asks_nobody(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loads = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?:[^\"> ]+)")
    for path in tmp_path.rglob("*.html"):
        assert not loads.findall(path.read_text("utf-8")), path
