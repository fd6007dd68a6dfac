"""llama-server with models whose memory or positions are unlike those of Llama, four slots."""

from __future__ import annotations

import base64
import io
import itertools
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

import programs
from helpers import CLI, json_lines
from test_apps_server import SERVER, Server

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")
sys.path.append(str(Path(__file__).with_name("conformance")))
import converting
import llama_models
import picture_models
from model_oracle import MARGIN, TOLERANCE, Plain, acting, agree, half_fired, judged
from model_types import tiny
from steerbridge.package import SteeringPackage

pytestmark = [
    pytest.mark.apps,
    pytest.mark.hf,
    pytest.mark.llama_cpp,
    pytest.mark.skipif(programs.converter() is None, reason="python tests/programs.py"),
]
MEMORIES = {
    "falcon_h1": "attention beside Mamba 2",
    "cohere2": "sliding windows",
    "granitemoehybrid": "attention and Mamba 2",
    "jamba": "attention and Mamba",
    "lfm2_moe": "attention and short convolutions",
    "mamba2": "recurrent alone",
    "qwen3_next": "attention and gated delta nets",
}
# llama-server's own answers behind sliding windows change after it brings back a saved prompt,
# without us too: in 13 of 60 runs of this test's requests, in 0 of 300 without saved prompts.
SAVED_NOTHING = {"cohere2": ("--cache-ram", 0)}
OPTIONS = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", 2, "-c", 2048, "-np", 4, "--no-webui")
TIMES = 4
# Contents may be texts or lists of parts, as in the templates of Qwen-VL.
TEMPLATE = """{% for message in messages %}{{ message.role[0] | upper }}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"""


@dataclass
class Wanted:
    """What a request must come to. `prompt`: tokens, or a text with pictures; of a chat, `turns`
    are its messages."""

    prompt: Any
    score: float
    fired: bool
    tokens: list[Any]  # of the oracle
    turns: list[Any] | None = None


def png(picture: Any) -> str:
    """A picture as base64."""
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def turns(text: str, pictures: list[Any]) -> tuple[str, list[Any]]:
    """A chat with each of the pictures in a turn of its own: as a text, and as messages."""
    *parts, last = text.split(picture_models.MARKER)
    rendered, messages = "", []
    for part, picture in zip(parts, pictures, strict=True):
        url = f"data:image/png;base64,{png(picture)}"
        content: list[Any] = [{"type": "text", "text": part}] if part else []
        content.append({"type": "image_url", "image_url": {"url": url}})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": "OK"})
        rendered += f"U{part}{picture_models.MARKER}AOK"
    messages.append({"role": "user", "content": last})
    return f"{rendered}U{last}", messages


def answered(
    folder: Path, model: Path, package: SteeringPackage, wanted: list[Wanted], *options: object
) -> tuple[list[str], list[Any]]:
    """What is wrong with llama-server's answers to all requests, asked several times by four
    clients, and the verdicts."""
    log = folder / "log.jsonl"
    package.save(folder / "guard.gguf")
    run = [*CLI, "run", "--package", str(folder / "guard.gguf"), "--log", str(log), "--"]
    jobs = wanted * TIMES
    random.Random(0).shuffle(jobs)
    with programs.llama_server(
        ["-m", model, *OPTIONS, *options], folder / "server.txt", run
    ) as url:
        server = Server(url, log)
        server.warm = len(server.events())

        marker = requests.get(url + "/props", timeout=60).json().get("media_marker")

        def ask(one: Wanted) -> list[int]:
            options = {"temperature": 0, "n_predict": picture_models.NEW, "return_tokens": True}
            if one.turns:
                told = server.post("/v1/chat/completions", messages=one.turns, **options)
                return [*map(int, told["__verbose"]["tokens"])]
            prompt = one.prompt
            if isinstance(prompt, picture_models.Prompt):
                prompt = {
                    "prompt_string": prompt.text.replace(picture_models.MARKER, marker),
                    "multimodal_data": [png(picture) for picture in prompt.pictures],
                }
            tokens: list[int] = server.post("/completion", prompt=prompt, **options)["tokens"]
            return tokens

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, jobs))
        verdicts = server.events(count=len(jobs))
    wrong = [
        f"{answer}, expected {[g.token for g in one.tokens]}"
        for one, answer in zip(jobs, answers, strict=True)
        if not agree(answer, one.tokens[: len(answer)])
    ]
    scores = sorted(v["probes"][0]["score"] for v in verdicts)
    expected = sorted(one.score for one in jobs)
    apart = [abs(a - b) / max(1, abs(b)) for a, b in zip(scores, expected, strict=True)]
    assert sum(bool(v["fired"]) for v in verdicts) == sum(one.fired for one in jobs)
    return wrong, apart


@pytest.mark.parametrize("name", MEMORIES)
def test_memories_in_slots(name, tmp_path, tried):
    """Prompts with the same beginnings: the server goes back to checkpoints and saved prompts."""
    model = tiny(name, **llama_models.SETTINGS.get(name, {}))
    with converting.running(programs.converter()) as converter:
        path = tmp_path / "model.gguf"
        converter.convert(llama_models.saved(model, name, tmp_path), path)
    plain = Plain(model, MARGIN * 10)
    package = half_fired(plain)
    rng = random.Random(1)
    starts = [[rng.randrange(3, 90) for _ in range(n)] for n in (12, 12, 40)]
    ends: list[list[int]] = [[], *([rng.randrange(3, 90) for _ in range(n)] for n in (1, 9))]
    wanted = []
    for start, end in itertools.product(starts, ends):
        want = judged(package, plain.states([*start, *end]))
        tokens = plain.greedy([*start, *end], acting(package, want), package, picture_models.NEW)
        wanted.append(Wanted([*start, *end], want.score, want.fired, tokens))
    options = ("-b", 20, "-ub", 7, *SAVED_NOTHING.get(name, ()))
    wrong, apart = answered(tmp_path, path, package, wanted, *options)
    assert wrong == []
    assert max(apart) < 10 * TOLERANCE
    tried(SERVER, f"four slots, {MEMORIES[name]}")


@pytest.mark.parametrize("family", picture_models.FAMILIES)
def test_pictures_with_m_rope_in_slots(family, tmp_path, tried):
    """One, two or three pictures in a prompt; their rows take fewer positions."""
    with converting.running(programs.converter()) as converter:
        pair = picture_models.Pair(family, tmp_path, converter)
    asked: list[tuple[Any, Any]] = []  # a prompt, and the messages of a chat
    for text, pictures in picture_models.drawn(8):
        asked.append((pair.prompt(text, pictures), None))
        rendered, messages = turns(text, pictures)
        asked.append((pair.prompt(rendered, pictures), messages))
    package = pair.fitted([prompt for prompt, _ in asked])
    wanted = []
    for prompt, messages in asked:
        want = pair.judged(package, prompt)
        tokens = pair.greedy(prompt, package, acting(package, want))
        wanted.append(Wanted(prompt, want.score, want.fired, tokens, messages))
    tower = ("--mmproj", pair.tower, "--no-mmproj-offload")
    chats = ("--jinja", "--chat-template", TEMPLATE, "-v")
    wrong, apart = answered(tmp_path, pair.path, package, wanted, *tower, *chats)
    assert wrong == []
    assert max(apart) < 10 * TOLERANCE
    tried(SERVER, f"four slots, pictures of {pair.architecture} ({family})")


def test_pictures_with_m_rope_in_mtmd_cli(tmp_path, tried):
    """Two pictures at once: the program puts them before the text."""
    with converting.running(programs.converter()) as converter:
        pair = picture_models.Pair("qwen2_5_vl", tmp_path, converter)
    drawn = [(text, pictures) for text, pictures in picture_models.drawn(8) if len(pictures) == 2]
    marker = picture_models.MARKER
    texts = [(text.replace(marker, ""), pictures) for text, pictures in drawn]
    prompts = [pair.prompt(f"U{2 * marker}{text}", pictures) for text, pictures in texts]
    package = pair.fitted(prompts)
    package.save(tmp_path / "guard.gguf")
    for (text, pictures), prompt in zip(texts, prompts, strict=True):
        log = tmp_path / "log.jsonl"
        files = [tmp_path / f"{i}.png" for i in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            file.write_bytes(base64.b64decode(png(picture)))
        program = programs.built() / "llama-mtmd-cli"
        model = ("-m", pair.path, "--mmproj", pair.tower, "--no-mmproj-offload")
        options = ("--temp", 0, "-n", 4, "--jinja", "--chat-template", TEMPLATE)
        given = ("--image", ",".join(map(str, files)), "-p", text)
        run = [*CLI, "run", "--package", tmp_path / "guard.gguf", "--log", log, "--"]
        command = [*run, program, *model, *OPTIONS[:8], *options, *given]
        done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
        last = [e for e in json_lines(log.read_text()) if e["event"] == "verdict"][-1]
        want = pair.judged(package, prompt)
        assert bool(last["fired"]) == want.fired
        assert abs(last["probes"][0]["score"] - want.score) < 10 * TOLERANCE * max(1, want.score)
        tokens = pair.greedy(prompt, package, acting(package, want))[:4]
        sure = itertools.takewhile(lambda one: not one.close, tokens)
        said = "".join(pair.llama.detokenize([g.token], special=True).decode() for g in sure)
        printed = done.stdout.strip()  # a program that ends loses what its log's thread still has
        assert printed.startswith(said) or said.startswith(printed)
        log.unlink()
    tried(f"llama-mtmd-cli, {programs.llama_cpp()}", "two pictures with M-RoPE")
