"""What the runtime `vllm` makes of prompts, for a test in another environment.

    python opened.py ASKED ANSWERED

Both are files of JSON; `ASKED` says which.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import steerbridge
from steerbridge import Example, calibration
from steerbridge.spec import Reading

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "gpu_memory_utilization": 0.3,
}


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    model = steerbridge.open_model("vllm", asked["model"], **OPTIONS)
    prompts = [Example(text, harmful) for text, harmful in asked["prompts"]]
    readings = [Reading.model_validate(r) for r in asked["readings"]]
    guard, rows = (steerbridge.load(asked[name]) for name in ("guard", "rows"))
    states = np.empty((len(prompts), len(readings), model.facts.hidden_size), np.float32)
    model.capture(prompts, readings, states)
    told: dict[str, Any] = {"states": states.tolist()}
    # Plain ones around the steered: what was attached is gone.
    for name, package in (("plain", None), ("steered", guard), ("again", None)):
        answers = model.generate(prompts, package, max_new_tokens=asked["new"])
        told[name] = [[a.text, a.tokens, a.finish, a.outcome and a.outcome.fired] for a in answers]
    told["logits"] = [
        {id: logits.tolist() for id, logits in model.trace(prompt, rows).logits.items()}
        for prompt in prompts
    ]
    more = [Example(text, harmful) for text, harmful in asked["more"]]
    fitted = calibration.fit(model, guard, more, {"*": asked["rate"]})
    calibration.with_calibration(guard, fitted).save(asked["calibrated"])
    told["thresholds"] = dict(fitted.thresholds)
    Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
