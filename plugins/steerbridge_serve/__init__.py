"""`steerbridge serve`: a steered model for the clients of OpenAI, TGI and Ollama, and a page.

request -> `admission` (host, key, size, queue; watched until its end) -> a dialect (`openai`,
`tgi`, `ollama`: strict bodies, `body`) -> `asked` (one form for all) -> `service` -> `worker` (one
queue, one thread) -> the runtime's engine (`steerbridge.serving`) -> tokens -> `text` (characters,
stop sequences) -> the dialect -> response. `dialects` is the table of all paths and fields.
"""
