"""The part of `make parity` with vLLM: F32 weights on a CPU, eager, in vLLM's own environment.

`quiet_identical`: of the prompts that do not fire, those whose eight highest logits are, bit for
bit and at every token, those of the engine without a package, on the same schedule.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common import ROOT
from compare import compared
from steerbridge import Example, Generation, SteeringPackage
from steerbridge.runtime import Outcome

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "conformance"))
import tgi_shard
import vllm_driver


def measure(
    hf: Any,
    prompts: Sequence[Example],
    packages: Mapping[str, SteeringPackage],
    want: Mapping[str, Sequence[Generation]],
    new: int,
) -> dict[str, Any]:
    """How the answers of vLLM compare with those of transformers; see the module's docstring."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = {name: str(p.save(folder / f"{name}.gguf")) for name, p in packages.items()}
        files = folder / "asked.json", folder / "answered.json"
        asked = {
            "model": str(tgi_shard.exported(hf, folder / "model")),
            "prompts": [asdict(prompt) for prompt in prompts],
            "packages": paths,
            "new": new,
        }
        files[0].write_text(json.dumps(asked))
        script = Path(__file__).with_name("vllm_client.py")
        command = [str(word) for word in (vllm_driver.PYTHON, script, *files)]
        subprocess.run(command, check=True, env={**os.environ, **vllm_driver.SETTINGS})
        told = json.loads(files[1].read_text())
    got = {name: [_generation(a) for a in answers] for name, answers in told["answers"].items()}
    return {
        **compared(want, got),
        "logit_max_diff": _logits_apart(want, got),
        "quiet": told["quiet"],
        "quiet_identical": told["quiet_identical"],
    }


def _generation(told: Any) -> Generation:
    outcome = Outcome.from_json(told["outcome"])
    return Generation(told["text"], tuple(told["tokens"]), told["finish"], outcome)


def _logits_apart(
    want: Mapping[str, Sequence[Generation]], got: Mapping[str, Sequence[Generation]]
) -> float:
    """The largest difference of log-odds, relative above 1, of scores that have not saturated."""
    scores = np.array(
        [
            [x.outcome.verdicts[0].score for x in pair if x.outcome]
            for name in want
            for pair in zip(want[name], got[name], strict=True)
        ]
    )
    scores = scores[(scores > 1e-4).all(axis=1) & (scores < 1 - 1e-4).all(axis=1)]
    a, b = np.log(scores / (1 - scores)).T
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(a)), initial=0.0))
