"""How the TGI plugin is loaded into the server's process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import flash
from steerbridge.errors import PackageError
from steerbridge_tgi import environment, hook

pytestmark = pytest.mark.hf


@pytest.fixture(autouse=True)
def server_modules(monkeypatch, tmp_path):
    """Fake modules of the server, and the file for the plugin's events."""
    for name, module in flash.server_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("STEERBRIDGE_EVENTS", str(tmp_path / "events.jsonl"))


SERVER = """
class TextGenerationService:
    def __init__(self, model, cache, urls):
        self.made = (model, cache, urls)
"""


def test_the_service_is_caught_when_it_is_made(tmp_path):
    """In a new interpreter, selected by environment variables, next to another sitecustomize."""
    package = tmp_path / "text_generation_server"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "server.py").write_text(SERVER)
    (tmp_path / "sitecustomize.py").write_text("print('the other one')\n")
    program = (
        "import sys, types\n"
        "stand_in = types.ModuleType('steerbridge_tgi.attach')\n"
        "stand_in.attach = lambda service, package: print(service.made, package)\n"
        "sys.modules['steerbridge_tgi.attach'] = stand_in\n"
        "from text_generation_server import server\n"
        "server.TextGenerationService(1, 2, urls=3)\n"
    )
    variables = environment(Path("guard.gguf"), {"PYTHONPATH": str(tmp_path)})

    def run(extra):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PATH": "", **extra},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    assert run(variables) == ["the other one", "(1, 2, 3) guard.gguf"]
    assert run({"PYTHONPATH": str(tmp_path)}) == ["the other one"]


def test_a_service_without_its_package_is_not_made(tiny_llama, tmp_path, monkeypatch):
    class Service:
        def __init__(self, model, cache):
            self.model, self.cache = model, cache

    server = SimpleNamespace(TextGenerationService=Service)
    hook.wrap(server)
    monkeypatch.setenv("STEERBRIDGE_PACKAGE", str(tmp_path / "gone.gguf"))
    with pytest.raises((FileNotFoundError, PackageError), match="gone"):
        server.TextGenerationService(flash.FlashCausalLM(tiny_llama), None)


def test_the_plugin_needs_torch_alone():
    """TGI's server brings a transformers of its own, which the adapter for it may not bear."""
    code = "import sys, steerbridge_tgi.attach; print({'transformers', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'torch'}"
