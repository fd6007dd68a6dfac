"""What vLLM answers, for `make parity` (parity_vllm.py), in vLLM's own Python.

    python vllm_client.py ASKED ANSWERED

Both are files of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import steerbridge
from steerbridge import Example

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,  # long prompts come in parts
    "max_num_seqs": 8,
    "block_size": 32,
    "gpu_memory_utilization": 0.3,
    "max_logprobs": 8,
    "logprobs_mode": "raw_logits",
}


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    model = steerbridge.open_model("vllm", asked["model"], **OPTIONS)
    prompts = [Example(**fields) for fields in asked["prompts"]]
    told: dict[str, Any] = {"answers": {}}
    for name, path in asked["packages"].items():
        package = steerbridge.load(path)
        answers = model.generate(prompts, package, max_new_tokens=asked["new"])
        told["answers"][name] = [
            {"text": a.text, "tokens": a.tokens, "finish": a.finish, "outcome": a.outcome.to_json()}
            for a in answers
            if a.outcome is not None
        ]
        print(name, file=sys.stderr, flush=True)
    plain = logits(model, prompts, asked["new"])
    with model.attached(package) as outcomes:
        steered = logits(model, prompts, asked["new"])
    fired = [outcomes[name].fired for name in sorted(outcomes, key=int)]
    quiet = [i for i, acted in enumerate(fired) if not acted]
    told["quiet"] = len(quiet)
    told["quiet_identical"] = sum(plain[i] == steered[i] for i in quiet)
    Path(sys.argv[2]).write_text(json.dumps(told))


def logits(model: Any, prompts: list[Example], new: int) -> list[Any]:
    """The highest logits of every token of the answers, which all have the same length: so requests
    share their passes in the same way, whatever they say."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=8, detokenize=False
    )
    asked = [TokensPrompt(prompt_token_ids=model.render(prompt)) for prompt in prompts]
    outputs = model.llm.generate(asked, params, use_tqdm=False)
    return [
        [sorted((id, x.logprob) for id, x in step.items()) for step in output.outputs[0].logprobs]
        for output in outputs
    ]


if __name__ == "__main__":
    main()
