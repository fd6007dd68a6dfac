"""`make soak`: thousands of requests to an unmodified llama-server under `steerbridge run`.

Four clients, each with a slot of its own, and two more at a second server beside it. Prompts of one
token and of several batches, with prefixes that are shared or diverge, further turns, n-gram
drafts, answers of random length, clients that leave, slots that are saved and restored. Every
verdict is compared with an oracle that computes it from the tokens alone: numpy for the tiny model,
transformers for SmolLM2. Resident memory is read after each tenth of the run, once llama-server has
filled its store of prompts and its buffers (unsteered it grows as much until then).
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch

import guards
from common import CACHE, ROOT, arguments, finish, open_smollm2, resident, say, smollm2_f32
from llama_server import Server
from soak_oracle import Asked, States, compare
from steerbridge import SteeringPackage, corpus_examples
from steerbridge.testing.cases import standard
from steerbridge.testing.model import EOS, TinyModel

sys.path.insert(0, str(ROOT / "tests"))
import programs

SLOTS, BATCH = 4, 64
WARM_UP, TENTHS = 2, 10
LENGTHS = (1, 2, 7, 20, 40, BATCH - 1, BATCH, BATCH + 1, 100, 150)
LONGEST = 400  # tokens of a prompt, earlier turns included


@dataclass(frozen=True)
class Ground:
    """A model, a guard for it, and what the guard must read of tokens."""

    name: str
    model: Path
    package: SteeringPackage
    states: States
    letters: Sequence[int]  # tokens of prompts
    turn: Sequence[int]  # tokens that end a turn and begin another


def tiny() -> Ground:
    """The model of the conformance kit; the guard reads the end and a mean, and steers a block."""
    model = TinyModel()
    package = standard(model)["both"].package
    path = model.save_gguf(CACHE / "soak" / "tiny.gguf")
    letters = list(range(97, 123))
    return Ground("tiny", path, package, lambda ids: model.forward(ids)[0], letters, [EOS])


def smollm2(package: SteeringPackage) -> Ground:
    """SmolLM2 in F32, with the guard that was asked for."""
    model: Any = open_smollm2()
    tokenizer = model.tokenizer

    def states(ids: list[int]) -> Mapping[int, Any]:
        with torch.inference_mode():
            hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return {depth: rows[0].numpy() for depth, rows in enumerate(hidden)}

    words = tokenizer.encode(" ".join(e.text or "" for e in corpus_examples("test")[:60]))
    turn = tokenizer.encode("<|im_end|>\n<|im_start|>user\n")
    return Ground("smollm2", smollm2_f32(), package, states, sorted(set(words)), turn)


# -------------------------------------------------------- what clients ask


@dataclass
class Client:
    """One slot of one server."""

    ground: Ground
    server: Server
    slot: int
    draw: random.Random
    asked: list[Asked] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def work(self, count: int) -> None:
        for _ in range(count):
            kind = self.draw.random()
            try:
                if kind < 0.05:
                    self.leave_at_once(self.prompt())
                elif kind < 0.15:
                    self.leave(self.prompt())
                else:
                    self.complete(self.prompt())
                if self.asked[-1].left:
                    self.wait()
                if self.draw.random() < 0.04:
                    action = self.draw.choice(["save", "restore"])
                    self.slots(action)
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(f"{self.asked[-1].tokens}: {error}")

    def prompt(self) -> list[int]:
        """New, or behind a part of the last one, or its next turn."""
        new = self.draw.choices(self.ground.letters, k=self.draw.choice(LENGTHS))
        kind, last = self.draw.random(), self.asked[-1].spoken if self.asked else []
        if kind < 0.4 or len(last) > LONGEST:
            return new
        if kind < 0.7:
            return [*last[: self.draw.randint(0, len(last))], *new]
        return [*last, *self.ground.turn, *new]

    def complete(self, tokens: list[int]) -> None:
        self.asked.append(Asked(tokens))
        answer = self.server.complete(
            tokens, self.draw.randint(1, 12), id_slot=self.slot, return_tokens=True
        )
        self.asked[-1].answer = answer["tokens"]

    def leave(self, tokens: list[int]) -> None:
        """Take some tokens of a stream and close it."""
        self.asked.append(Asked(tokens, left=True))
        options = {"stream": True, "id_slot": self.slot, "return_tokens": True}
        with self.server.open(tokens, 200, **options) as stream:
            for _ in range(self.draw.randint(1, 4)):
                kind, _, body = stream.readline().partition(b": ")
                if kind == b"data":
                    self.asked[-1].answer += json.loads(body)["tokens"]

    def leave_at_once(self, tokens: list[int]) -> None:
        """Send a request and close the connection."""
        self.asked.append(Asked(tokens, left=True))
        host = urllib.parse.urlsplit(self.server.url).netloc
        connection = http.client.HTTPConnection(host, timeout=60)
        body = {"prompt": tokens, "n_predict": 20, "stream": True, "id_slot": self.slot}
        connection.request(
            "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
        )
        time.sleep(self.draw.random() * 0.05)
        connection.close()

    def wait(self) -> None:
        """Until the slot is idle. llama-server loads another prompt's rows from its store into a
        busy slot that a request names (`get_available_slot`), and the answer goes on behind them.
        """
        busy = True
        while busy:
            time.sleep(0.02)
            with urllib.request.urlopen(f"{self.server.url}/slots", timeout=60) as answer:
                busy = json.load(answer)[self.slot]["is_processing"]

    def slots(self, action: str) -> None:
        url = f"{self.server.url}/slots/{self.slot}?action={action}"
        body = json.dumps({"filename": f"{self.ground.name}-{self.slot}.bin"}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=60).close()
        except urllib.error.HTTPError as error:  # nothing to save, or nothing saved yet
            error.close()


@contextmanager
def serving(ground: Ground, name: str) -> Iterator[Server]:
    folder = CACHE / "soak" / name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "events.jsonl"
    log.unlink(missing_ok=True)
    guard = ground.package.save(folder / "guard.gguf")
    run = [sys.executable, "-m", "steerbridge.cli", "run"]
    before = [*run, "--package", str(guard), "--log", str(log), "--"]
    # A thread each, and no spinning: there are two servers.
    options = ["-m", ground.model, "-t", 1, "--poll", 0, "-c", 8192, "-np", SLOTS]
    options += ["-b", BATCH, "-ub", 32]
    options += ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "--cache-ram", 8, "--no-webui"]
    options += ["--slot-save-path", folder, "--spec-type", "ngram-simple"]
    with programs.llama_server(options, folder / "output.txt", before) as url:
        yield Server(url, log, folder / "output.txt")


def soak(ground: Ground, requests: int, seed: int) -> dict[str, Any]:
    """The figures of one model."""
    start = time.monotonic()
    with serving(ground, ground.name) as main, serving(ground, f"{ground.name}-beside") as beside:
        clients = [Client(ground, main, i, random.Random(seed + i)) for i in range(SLOTS)]
        others = [Client(ground, beside, i, random.Random(seed + 9 + i)) for i in range(2)]
        share = requests // (SLOTS + len(others)) // TENTHS + 1
        memory = []
        for tenth in range(-WARM_UP, TENTHS):
            with ThreadPoolExecutor(len(clients) + len(others)) as pool:
                list(pool.map(lambda client: client.work(share), [*clients, *others]))
            time.sleep(1)  # cancelled requests end
            [active] = [e for e in main.events() if e["event"] == "active"]
            memory.append(resident(active["pid"]))
            say(f"{ground.name}: {tenth + 1} of {TENTHS}, {memory[-1] >> 20} MiB")
        told = {id(server): server.events() for server in (main, beside)}
    counts: Counter[str] = Counter()
    for server, group in ((main, clients), (beside, others)):
        requests_of = {client.slot: client.asked for client in group}
        counts += compare(ground.package, ground.states, requests_of, told[id(server)])
    troubles = [e for events in told.values() for e in events if e["event"] in TROUBLES]
    failed = [text for client in (*clients, *others) for text in client.failed]
    for text in [*failed, *map(str, troubles)][:5]:
        say(f"{ground.name}: {text}")
    memory, half = memory[WARM_UP:], TENTHS // 2
    return {
        "requests": sum(len(client.asked) for client in (*clients, *others)),
        "wrong_verdicts": counts["wrong"],
        "verdicts_missing": counts["missing"],
        "failed_by_another": len(failed) + len(troubles),
        "fired": round(counts["fired"] / counts["told"], 4),
        "held": counts["held"],
        "at_the_threshold": round(counts["close"] / counts["told"], 4),
        "memory_mib": [m >> 20 for m in memory],
        "memory_growth": round(mean(memory[half:]) / mean(memory[:half]) - 1, 4),
        "seconds": round(time.monotonic() - start),
    }


TROUBLES = ("refused", "failed", "stopped")


def main() -> None:
    parser = arguments(__doc__)
    guards.add_option(parser)
    parser.add_argument("--tiny", type=int, default=10_000, help="Requests to the tiny model.")
    parser.add_argument("--smollm2", type=int, default=1_000, help="Requests to SmolLM2.")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if options.tiny:
        result["tiny"] = soak(tiny(), options.tiny, options.seed)
    if options.smollm2:
        guard = guards.chosen(options)
        result["guard"] = str(guard)
        result["smollm2"] = soak(smollm2(guard.package), options.smollm2, options.seed)
    finish(result)


if __name__ == "__main__":
    main()
