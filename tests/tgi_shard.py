"""Shards of TGI's own Python server for tests and benchmarks (docs/tgi.md sets the server up).

STEERBRIDGE_TGI_PYTHON is the Python that it is installed for.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from helpers import CLI, last_json

ROOT: Final = Path(__file__).resolve().parent.parent
PYTHON: Final = os.environ.get("STEERBRIDGE_TGI_PYTHON", "")
SETTINGS: Final = {
    "ATTENTION": "paged",
    "PREFIX_CACHING": "0",
    "PREFILL_CHUNKING": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    # Steerbridge is not installed in the server's environment.
    "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in ("", "adapters", "plugins")),
}


def exported(model, folder) -> Path:
    """A folder that transformers 4.51 reads."""
    inner, tokenizer = model.model, model.tokenizer
    inner.hf_quantizer = None  # it was dequantised from GGUF
    inner.is_quantized = False
    config = inner.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    inner.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    if rope := settings.pop("rope_parameters", None):
        settings |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    settings["torch_dtype"] = settings.pop("dtype")
    path.write_text(json.dumps(settings))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("backend",)}))
    return folder


@contextlib.contextmanager
def shard(
    model: Path,
    folder: Path,
    guard: Path | None,
    options: Sequence[str] = (),
    script: Path | None = None,
    **settings: str,
) -> Iterator[tuple[Path, Path]]:
    """A running shard: its socket, and the file with the plugin's events.

    Args:
        guard: None: without us.
        script: in place of the server's own program.

    Raises:
        RuntimeError: it did not start; with what it printed.
    """
    name, log, output = folder / "shard", folder / "events.jsonl", folder / "output.txt"
    run = [*CLI, "run", "--log", str(log), "--package"]
    before = [*run, str(guard), "--"] if guard else []
    program = [str(Path(PYTHON).parent / "text-generation-server")]
    if guard:  # Steerbridge is on PYTHONPATH, so its `.pth` file is not read
        program = [PYTHON, "-m", "steerbridge_tgi"]
    if script:
        program = [PYTHON, str(script)]
    command = [*before, *program, "serve", str(model), "--uds-path", str(name), *options]
    environment = {**os.environ, **SETTINGS, **settings}
    with output.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
    try:
        socket, until = Path(f"{name}-0"), time.monotonic() + 120
        while not socket.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        if not socket.exists():
            raise RuntimeError(output.read_text()[-4000:])
        yield socket, log
    finally:
        process.terminate()
        process.wait(30)


def asked(script: Path, sockets: Sequence[Path], question: dict[str, Any]) -> Any:
    """What a script in the server's own Python answers to a question, both as JSON."""
    done = subprocess.run(
        [PYTHON, str(script), *map(str, sockets)],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return last_json(done.stdout)
