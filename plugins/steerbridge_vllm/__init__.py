"""Steerbridge for vLLM: steers its unmodified server and its `LLM`.

    steerbridge run --package guard.gguf -- vllm serve MODEL

`steerbridge.pth`, which the wheel puts into the server's environment, waits in every process for
vLLM's modules (`hook`). The package is then attached to each worker's model before it is compiled
(`attach`), reads and rewrites rows in every pass (`gates`), and its verdicts travel with the tokens
to the responses (`transport`, `http`). Nothing here imports vLLM or torch before vLLM does.
"""
