"""Times decoding of two running TGI shards in turn; runs in the server's own Python.

    python tgi_client.py PLAIN STEERED < JSON    {"model": ..., "prompts": [...], "rounds": 8}

Prints the ratio of seconds, plain over steered, of each round.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "tgi"))
from client import Client

NEW = 33


def decoded(client: Client) -> float:
    """Seconds of NEW - 1 steps of a batch of all prompts."""
    batch = client.prefill([client.request(i) for i in range(len(client.prompts))])
    start = time.perf_counter()
    client.finish(batch)
    return time.perf_counter() - start


def main() -> None:
    asked = json.load(sys.stdin)
    sides = [Client(socket, asked["model"], asked["prompts"], NEW) for socket in sys.argv[1:3]]
    for side in sides:
        side.warm_up()
        decoded(side)
    ratios = []
    for i in range(asked["rounds"]):
        times: list[list[float]] = [[], []]
        for k in range(3):
            for side in (0, 1) if (i + k) % 2 else (1, 0):
                times[side].append(decoded(sides[side]))
        ratios.append(min(times[0]) / min(times[1]))
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
