"""How the TGI plugin is loaded into the server's process, and that nothing gets past it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import flash
from helpers import CLI, json_lines
from steerbridge.errors import PackageError
from steerbridge.testing.cases import standard
from steerbridge.testing.model import TinyModel
from steerbridge_tgi import hook

pytestmark = pytest.mark.hf
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def server_modules(monkeypatch, tmp_path):
    """Fake modules of the server, and the file for the plugin's events."""
    for name, module in flash.server_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("STEERBRIDGE_EVENTS", str(tmp_path / "events.jsonl"))


SERVER = """
import os, pathlib
if (once := os.environ.get("FAIL_ONCE")) and pathlib.Path(once).exists():
    pathlib.Path(once).unlink()
    raise ImportError("this time")

class TextGenerationService:
    def __init__(self, model, cache, urls):
        self.made = (model, cache, urls)
"""
STAND_IN = """
import sys, types
stand_in = types.ModuleType('steerbridge_tgi.attach')
stand_in.attach = lambda service, package: print('attached', package)
sys.modules['steerbridge_tgi.attach'] = stand_in
"""
MAKE = """
from text_generation_server import server
server.TextGenerationService(1, 2, urls=3)
print('made')
"""
LOADS_ITSELF = """
import importlib.util, sys
class Ahead:
    def find_spec(self, name, path=None, target=None):
        if name == 'text_generation_server.server':
            sys.meta_path.remove(self)
            ours = [f for f in sys.meta_path if type(f).__module__ == 'steerbridge.imports']
            sys.meta_path[:] = [f for f in sys.meta_path if f not in ours]
            return importlib.util.find_spec(name)
sys.meta_path.insert(0, Ahead())
"""
RUNS_THE_FILE = """
import runpy, text_generation_server
runpy.run_path(text_generation_server.__path__[0] + '/server.py')
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with a server in it, and Steerbridge as its wheel would be installed."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    paths = [ROOT, ROOT / "adapters", ROOT / "plugins"]
    (packages / "paths.pth").write_text("\n".join(map(str, paths)))
    shutil.copy(ROOT / "plugins" / "steerbridge_tgi.pth", packages)
    server = packages / "text_generation_server"
    server.mkdir()
    (server / "__init__.py").touch()
    (server / "server.py").write_text(SERVER)
    return folder


def ran(environment, program, *flags, **variables):
    """Exit code and lines of a program in that environment."""
    known = {"STEERBRIDGE_PACKAGE": "guard.gguf", **variables}
    done = subprocess.run(
        [environment / "bin" / "python", *flags, "-c", STAND_IN + program],
        env={"PATH": "", **{name: text for name, text in known.items() if text is not None}},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


ATTACHED = (0, ["attached guard.gguf", "made"])


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import importlib.util; importlib.util.find_spec('text_generation_server.server')",
        "import importlib, text_generation_server.server as s; importlib.reload(s)",
        "import sys, text_generation_server.server as s; del sys.modules[s.__name__]",
    ],
    ids=["imported", "looked for", "reloaded", "imported again"],
)
def test_the_service_is_caught_when_it_is_made(environment, before):
    assert ran(environment, before + MAKE) == ATTACHED


def test_an_import_that_failed_may_be_tried_again(environment, tmp_path):
    (tmp_path / "once").touch()
    first = "try:\n import text_generation_server.server\nexcept ImportError:\n print('failed')\n"
    code, lines = ran(environment, first + MAKE, FAIL_ONCE=str(tmp_path / "once"))
    assert (code, lines) == (0, ["failed", *ATTACHED[1]])


def test_nobody_elses_start_gets_in_the_way(environment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('the other one')\n")
    assert ran(environment, MAKE, PYTHONPATH=str(tmp_path)) == ATTACHED
    assert ran(environment, MAKE, "-E", PYTHONPATH=str(tmp_path)) == ATTACHED
    assert ran(environment, MAKE, "-I") == ATTACHED


def test_without_a_package_nothing_happens(environment):
    assert ran(environment, MAKE, STEERBRIDGE_PACKAGE=None) == (0, ["made"])


@pytest.mark.parametrize("program", [LOADS_ITSELF + MAKE, RUNS_THE_FILE])
def test_a_server_that_is_loaded_past_the_hook_ends(environment, program):
    assert ran(environment, program) == (78, [])


@pytest.mark.parametrize("package", ["", " "])
def test_an_empty_name_of_a_package_ends_the_process(environment, package):
    assert ran(environment, "print('here')", STEERBRIDGE_PACKAGE=package) == (78, [])


def test_a_plugin_that_cannot_be_imported_ends_the_process(environment, tmp_path):
    (tmp_path / "steerbridge_tgi.py").write_text("raise OSError('broken')\n")
    assert ran(environment, MAKE, PYTHONPATH=str(tmp_path)) == (78, [])


def test_a_server_that_is_not_known_ends(environment, tmp_path):
    other = tmp_path / "text_generation_server"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "server.py").write_text("class Service: pass\n")
    assert ran(environment, MAKE, PYTHONPATH=str(tmp_path)) == (78, [])


SHARD = """
import json, os, socket, sys, time
if sys.argv[1] == "attached":
    event = {"event": "active", "pid": os.getpid(), "time": time.time(), "model": "M"}
    event["nonce"] = os.environ["STEERBRIDGE_NONCE"]
    with socket.socket(socket.AF_UNIX) as sink:
        sink.connect(os.environ["STEERBRIDGE_EVENTS"])
        sink.sendall(json.dumps(event).encode() + b"\\n")
if "vllm" in sys.argv[0]:
    server = socket.create_server(("127.0.0.1", 0))
else:
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[2])
    server.listen()
time.sleep(0.12)  # longer than until the first look, and shorter than until it is killed
print("served", flush=True)
time.sleep(2)
"""


@pytest.mark.parametrize("name", ["text-generation-server", "vllm"])
@pytest.mark.parametrize(("kind", "code", "printed"), [("attached", 0, "served\n"), ("-", 78, "")])
def test_a_shard_that_listens_without_its_package_ends_the_run(tmp_path, name, kind, code, printed):
    """A server in an environment without Steerbridge, or started with `-S`."""
    pytest.importorskip("elftools", reason="needs the extra `run`")
    guard = standard(TinyModel())["head"].package.save(tmp_path / "guard.gguf")
    shard, log = tmp_path / name, tmp_path / "log.jsonl"
    shard.write_text(SHARD)
    launcher = f"import subprocess, sys; sys.exit(subprocess.call({[sys.executable, str(shard)]}"
    launcher += f" + [{kind!r}, {str(tmp_path / 'socket-0')!r}]))"
    run = [*CLI, "run", "--package", str(guard), "--log", str(log), "--"]
    done = subprocess.run(
        [*run, sys.executable, "-c", launcher], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, printed), done.stderr
    events = json_lines(log.read_text())
    assert "nonce" not in str(events)
    assert events[-1]["event"] == ("stopped" if code else "active")


def test_a_second_server_is_not_covered_by_the_first(tmp_path):
    """Two servers of vLLM in one `run`, of which one has attached the package."""
    pytest.importorskip("elftools", reason="needs the extra `run`")
    guard = standard(TinyModel())["head"].package.save(tmp_path / "guard.gguf")
    server = tmp_path / "vllm"
    server.write_text(SHARD.replace("0.12", "1"))
    script = '"$0" "$1" attached & sleep 1; "$0" "$1" -'
    run = [*CLI, "run", "--package", str(guard), "--", "sh", "-c", script, sys.executable, server]
    done = subprocess.run([*map(str, run)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (78, "served\n"), done.stderr


def test_what_a_program_leaves_behind_ends_with_it_if_nothing_was_guarded(tmp_path):
    """A shard that was still loading when its launcher ended."""
    pytest.importorskip("elftools", reason="needs the extra `run`")
    guard = standard(TinyModel())["head"].package.save(tmp_path / "guard.gguf")
    late = f"import time; time.sleep(2); open({str(tmp_path / 'served')!r}, 'w')"
    script = f'{sys.executable} -S -c "$0" & sleep 0.3'
    run = [*CLI, "run", "--package", str(guard), "--", "sh", "-c", script, late]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 78, done.stderr
    time.sleep(2.5)
    assert not (tmp_path / "served").exists()


def test_a_service_without_its_package_is_not_made(
    server_modules, tiny_llama, tmp_path, monkeypatch
):
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
