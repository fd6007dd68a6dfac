"""vLLM for the conformance kit, in its own Python: imported once, and forked for each model.

    python zygote.py SOCKET

Each connection is a model of its own: a JSON line of what to open, then one for each question; one
comes back for each. What fails comes back as `error`, with the name of its type.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

import torch
import vllm.entrypoints.openai.chat_completion.serving
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401

from vllm import LLM, SamplingParams, TokensPrompt

OUTSIDE = -1e30  # a logit that nobody told


class Model:
    """An engine in this process."""

    def __init__(self, model: str, package: str | None, drafts: int, **options: Any) -> None:
        if package is not None:
            os.environ["STEERBRIDGE_PACKAGE"] = package
        if drafts:
            options["speculative_config"] = {
                "method": "ngram",
                "num_speculative_tokens": drafts,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
        self._llm = LLM(
            model=model,
            dtype="float32",
            async_scheduling=False,
            gpu_memory_utilization=0.3,
            logprobs_mode="raw_logits",
            max_logprobs=-1,
            disable_log_stats=True,
            **options,
        )

    def ask(
        self, prompts: list[list[int]], new: int, temperature: float, samples: int, until: int
    ) -> list[Any]:
        """Tokens, outcome and first logits of every answer; given up after `until` tokens."""
        params = SamplingParams(
            temperature=temperature, max_tokens=new, n=samples, logprobs=-1, detokenize=False
        )
        asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        if until:
            return [self._given_up(prompt, params, until) for prompt in asked]
        outputs = self._llm.generate(asked, params, use_tqdm=False)
        return [_told(output, i) for output in outputs for i in range(samples)]

    def _given_up(self, prompt: Any, params: SamplingParams, until: int) -> Any:
        engine, params = self._llm.llm_engine, params.clone()
        request = f"cancelled-{os.urandom(4).hex()}"
        engine.add_request(request, prompt, params)
        last = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                last = output
            if last is not None and len(last.outputs[0].token_ids) >= until:
                engine.abort_request([request])
        return _told(last, 0)

    def close(self) -> None:
        """End the processes of its ranks."""
        self._llm.llm_engine.engine_core.shutdown()

    def break_hook(self) -> None:
        """Clear every hook of the model."""
        worker = self._llm.llm_engine.model_executor.driver_worker
        for module in worker.model_runner.get_model().modules():
            module._forward_pre_hooks.clear()


def _told(output: Any, index: int) -> Any:
    answer = output.outputs[index]
    first = answer.logprobs[0] if answer.logprobs else {}
    size = 1 + max(first, default=0)
    logits = [first[i].logprob if i in first else OUTSIDE for i in range(size)]
    outcome = getattr(output, "steering", {}).get(index)
    return {"tokens": list(answer.token_ids), "outcome": outcome, "logits": logits}


def serve(lines: Any) -> None:
    """Answer one connection."""
    model = None
    for line in lines:
        asked = json.loads(line)
        try:
            if model is None:
                model, reply = Model(**asked), None
            elif asked == "break":
                reply = model.break_hook()
            else:
                reply = model.ask(**asked)
            told = {"reply": reply}
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            told = {"error": f"{error}", "kinds": names}
        lines.write(json.dumps(told) + "\n")
        lines.flush()
    if model is not None:
        model.close()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    torch.set_num_threads(1)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve(connection.makefile("rw", encoding="utf-8"))
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main()
