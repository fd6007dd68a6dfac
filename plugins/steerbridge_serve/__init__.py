"""`steerbridge serve`: a steered model behind the HTTP interfaces of TGI and OpenAI.

request -> `app` (checks, limits) -> `worker` (one queue, one thread) -> the runtime's engine
(`steerbridge.serving`) -> tokens -> `answers` (text, stop sequences, the two dialects) -> response
"""
