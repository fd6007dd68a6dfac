"""Times decoding of running TGI shards in turn; runs in the server's own Python.

    python tgi_client.py PLAIN CONTROL STEERED < JSON

The JSON object is {"model": ..., "prompts": [...], "rounds": 8}. Prints a list with the seconds of
each side, by its name, for each round.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "tgi"))
from client import Client

from ratios import alternate

NEW = 33
SIDES = ("plain", "control", "steered")


def decoded(client: Client) -> float:
    """Seconds of NEW - 1 steps of a batch of all prompts."""
    batch = client.prefill([client.request(i) for i in range(len(client.prompts))])
    start = time.perf_counter()
    client.finish(batch)
    return time.perf_counter() - start


def main() -> None:
    question = json.load(sys.stdin)
    clients = {
        side: Client(socket, question["model"], question["prompts"], NEW)
        for side, socket in zip(SIDES, sys.argv[1:], strict=True)
    }
    for client in clients.values():
        client.warm_up()
        decoded(client)
    runs = {side: partial(decoded, client) for side, client in clients.items()}
    print(json.dumps([alternate(i, runs) for i in range(question["rounds"])]))


if __name__ == "__main__":
    main()
