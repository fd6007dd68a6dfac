"""The docs: their commands run, pages exist and are up to date, the site builds."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import tomllib

import pytest

import helpers
import programs
import tried
from console import ROOT, Shell, blocks, pages
from steerbridge import convert, corpus_examples, gguf_model
from steerbridge.schema import build, page
from test_tgi_hook import SERVER as TGI_SERVER

DOCS = ROOT / "docs"
PROGRAMS = sorted((DOCS / "programs").glob("*.md"))
RUN_HERE = [ROOT / "README.md", DOCS / "tutorial.md", *PROGRAMS]


def test_every_console_line_is_run_or_says_why_not():
    """README, tutorial and the pages of programs are run whole by the tests below."""
    for path in pages():
        for block in blocks(path, "sh", "console"):
            if path in RUN_HERE:
                assert not block.reason, f"{block.page}: {block.text}"
            else:
                assert block.reason, f"{block.page} does not say why this is not run:\n{block.text}"


def test_installs_and_targets_that_the_docs_name_exist():
    """`make test-install` installs every extra; `make test` and `make test-nightly` run targets."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, re.M)[1].split())
    for path in pages():
        text = path.read_text("utf-8")
        for extras in re.findall(r"pip install '?steerbridge\[([^\]]+)\]", text):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), path
        if path.name != "CHANGELOG.md":
            for target in re.findall(r"`make ([a-z-]+)[` ]", text):
                assert target in targets or target.endswith("-"), f"{path}: make {target}"


@pytest.fixture
def shell(tmp_path, smollm2_path):
    """A shell in a folder with a model; llama.cpp's programs are on its PATH."""
    if (built := programs.built()) is None:
        pytest.skip("llama.cpp's programs are not set up (make setup-apps)")
    (tmp_path / "model.gguf").symlink_to(smollm2_path)
    (tmp_path / "SmolLM2.gguf").symlink_to(smollm2_path)
    return Shell(tmp_path, (built,))


def ours(block):
    """The block without lines that install or make; those are run by other targets."""
    lines = [n for n in block.lines if not n.startswith(("pip install", "make "))]
    return type(block)(block.page, block.kind, "\n".join(lines))


@pytest.mark.slow
@pytest.mark.apps
def test_the_tutorial_runs(shell):
    pytest.importorskip("torch")
    output = ""
    for block in blocks(DOCS / "tutorial.md", "python", "sh", "console"):
        if block.kind == "python":
            subprocess.run([sys.executable, "-c", block.text], cwd=shell.folder, check=True)
        elif (mine := ours(block)).text:
            if mine.text.startswith("harmful="):
                mine = type(block)(block.page, block.kind, mine.text.replace("\n", "; "))
            output += shell.run(mine)
    verdicts = [line for line in output.splitlines() if line.startswith("verdict")]
    # A harmful prompt and a harmless one, in both runtimes.
    assert ["fired (" in line for line in verdicts] == [True, False, True, False]
    assert "AutoSteer (conditional)" in output
    assert "active" in output  # llama-server
    assert "<svg" in (shell.folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.apps
def test_the_readme_runs(shell, guarded_quantised):
    pytest.importorskip("torch")
    folder = shell.folder
    write_prompts(folder / "prompts.jsonl")
    control_vector(folder)
    launcher(folder / "bin")
    shell.path = (folder / "bin", *shell.path)
    for block in blocks(ROOT / "README.md", "sh"):
        if (mine := ours(block)).text:
            shell.run(mine)
            if "steerbridge train" in mine.text:  # a guard of two dozen prompts would be no guard
                shutil.copy(guarded_quantised.guard, folder / "guard.gguf")
    assert "made with guard.gguf" in shell.output  # TGI
    assert "active" in shell.output  # llama-server
    assert (folder / "vector-package.gguf").is_file()


def write_prompts(path):
    """Two dozen pairs of the corpus."""
    pairs = [e for e in corpus_examples("train") if e.kind == "pair" and len(e.text) < 80][:48]
    rows = [{"prompt": e.text, "harmful": e.harmful, "pair": e.pair} for e in pairs]
    path.write_text("\n".join(map(json.dumps, rows)))


def control_vector(folder):
    """vector.gguf, a control vector for model.gguf."""
    facts = gguf_model.read_facts(folder / "model.gguf")
    package = helpers.package(
        facts,
        probes=[],
        interventions=[helpers.add_vector(20, alpha=1.0)],
        rules=[helpers.rule(None, ["v"])],
    )
    package.save(folder / "p.gguf")
    convert(folder / "p.gguf", folder / "vector.gguf", to="control-vector", allow_loss=True)


def launcher(folder):
    """text-generation-launcher, as far as a plugin sees it: a program on PATH that makes a service.

    TGI's own launcher is a binary of its container; tests/test_tgi_server.py runs its real server.
    """
    server = folder / "text_generation_server"
    server.mkdir(parents=True)
    (server / "__init__.py").touch()
    (server / "server.py").write_text(TGI_SERVER)
    program = folder / "text-generation-launcher"
    code = """\
        import json, os, socket, sys, types
        sys.path.insert(0, {folder!r})
        stand_in = types.ModuleType("steerbridge_tgi.attach")

        def attach(service, package):  # tells `run`, as the plugin's reporter does
            with socket.socket(socket.AF_UNIX) as events:
                events.connect(os.environ["STEERBRIDGE_EVENTS"])
                line = {{"event": "active", "pid": os.getpid(), "model": "model"}}
                line["nonce"] = os.environ["STEERBRIDGE_NONCE"]
                events.sendall(json.dumps(line).encode() + b"\\n")
            print("made with guard.gguf", package)

        stand_in.attach = attach
        sys.modules["steerbridge_tgi.attach"] = stand_in
        exec(open({start!r}).read())  # as Python does where the wheel is installed
        from text_generation_server import server
        server.TextGenerationService("model", "cache", urls=[])
        """
    text = textwrap.dedent(code).format(
        folder=str(folder), start=str(ROOT / "plugins" / "steerbridge_tgi.pth")
    )
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


SCRIPT = """
import llama_cpp
llama = llama_cpp.Llama("model.gguf", n_ctx=256, verbose=False)
print(llama("How do bees make honey?", max_tokens=4)["choices"][0]["text"])
"""
NODE_SCRIPT = """
import {getLlama, LlamaChatSession} from "node-llama-cpp";
const llama = await getLlama({gpu: false});
const model = await llama.loadModel({modelPath: "model.gguf"});
const context = await model.createContext({contextSize: 256});
const session = new LlamaChatSession({contextSequence: context.getSequence()});
console.log(await session.prompt("How do bees make honey?", {maxTokens: 4}));
"""


@pytest.mark.slow
@pytest.mark.apps
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_the_pages_of_programs_run(shell, path, guarded_quantised, guarded_pictures):
    folder = shell.folder
    shutil.copy(guarded_quantised.guard, folder / "guard.gguf")
    (folder / "app.py").write_text(SCRIPT)
    (folder / "app.mjs").write_text(NODE_SCRIPT)
    if path.stem == "node-llama-cpp" and not shutil.which("npm"):
        pytest.skip("there is no npm")
    if path.stem == "llama-cli":
        shutil.copy(guarded_pictures.guard, folder / "vision-guard.gguf")
        shutil.copy(guarded_pictures.prompts[0].images[0], folder / "picture.png")
        (folder / "vision-model.gguf").symlink_to(guarded_pictures.model)
        (folder / "mmproj.gguf").symlink_to(guarded_pictures.mmproj)
    for block in blocks(path, "sh"):
        shell.run(block)
    if (log := folder / "verdicts.jsonl").is_file():
        events = [event["event"] for event in helpers.json_lines(log.read_text())]
        assert {"active", "verdict"} <= set(events)


def test_python_in_the_docs_is_python():
    for path in DOCS.rglob("*.md"):
        for block in blocks(path, "python"):
            compile(block.text, str(path), "exec")


def test_the_python_page_is_the_generated_one():
    """As `make schema` writes it."""
    command = [sys.executable, str(DOCS / "generate_python.py")]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (DOCS / "python.md").read_text("utf-8") == made


def test_the_reference_is_the_generated_one():
    assert (DOCS / "reference.md").read_text("utf-8").splitlines() == list(page(build()))


def test_the_table_of_programs_is_the_generated_one():
    """As `make test-apps UPDATE=1` writes it."""
    text = tried.PAGE.read_text("utf-8")
    assert text == tried.page(text, tried.table(tried.known()))


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
