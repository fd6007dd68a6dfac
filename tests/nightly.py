"""What takes too long for every change, in parts that can be taken up again: `make test-nightly`.

A part that passed for the tree as it is now is not run again: a run that was stopped goes on with
the next part. `make test-nightly PART=demo` runs one part. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
KEPT: Final = ROOT / ".cache" / "nightly"


@dataclass(frozen=True)
class Part:
    """A command; it is ended after so many minutes. `clone`: it runs in a fresh clone of HEAD."""

    command: tuple[str, ...]
    minutes: int
    clone: bool = False


PARTS: Final = {
    "install": Part(("make", "test-install"), 60),
    "minimal": Part(("make", "test-minimal"), 20),
    "demo": Part(("make", "demo"), 120, clone=True),
    "conformance": Part(("make", "conformance"), 60),
    "soak": Part(("make", "soak"), 60),
    "fuzz": Part(("make", "fuzz"), 120),
    "lens": Part(("make", "test-lens"), 20),
    "vllm": Part(("make", "test-vllm"), 120),
    "soak-vllm": Part(("make", "soak-vllm"), 15),
    "models": Part(("make", "conformance-models"), 45),
    "parity-models": Part(("make", "parity-models"), 20),
}


def main() -> int:
    """Run what has not passed yet; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help=f"Some of {', '.join(PARTS)}; none: all.")
    chosen = parser.parse_args().part or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    start = time.monotonic()
    results = run(chosen, KEPT / f"{tree()}.json", _passes)
    seconds = round(time.monotonic() - start)
    print(json.dumps({"nightly": results, "seconds": seconds}))
    return int("failed" in results.values())


def run(chosen: list[str], record: Path, passes: Callable[[str], bool]) -> dict[str, str]:
    """Run the parts of which the record does not say that they passed, and record those that do."""
    done: list[str] = json.loads(record.read_text()) if record.is_file() else []
    results = {}
    for name in chosen:
        if name in done:
            results[name] = "skipped: done"
            continue
        results[name] = "ok" if passes(name) else "failed"
        if results[name] == "ok":
            done.append(name)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(done))
    return results


def tree() -> str:
    """A name of what is tested: the commit, and what differs from it."""
    commit = _git("rev-parse", "--short=12", "HEAD").decode().strip()
    changes = hashlib.sha256(_git("diff", "HEAD"))
    new = _git("ls-files", "--others", "--exclude-standard", "-z").decode().split("\0")
    for name in filter(None, new):
        changes.update(name.encode() + _git("hash-object", "--", name))
    clean = hashlib.sha256().hexdigest()
    return commit if changes.hexdigest() == clean else f"{commit}-{changes.hexdigest()[:12]}"


def _passes(name: str) -> bool:
    part = PARTS[name]
    print(f"nightly: {name}, at most {part.minutes} minutes", file=sys.stderr, flush=True)
    if not part.clone:
        return _succeeds(part, ROOT)
    with tempfile.TemporaryDirectory(prefix="steerbridge-nightly-") as folder:
        _git("clone", "--quiet", str(ROOT), folder)
        return _succeeds(part, Path(folder))


def _succeeds(part: Part, folder: Path) -> bool:
    """The variables of the make that called us are not for the makes of the parts."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    process = subprocess.Popen(
        part.command, cwd=folder, env=variables, stdout=sys.stderr, start_new_session=True
    )
    try:
        return process.wait(60 * part.minutes) == 0
    except subprocess.TimeoutExpired:
        print(f"nightly: stopped after {part.minutes} minutes", file=sys.stderr, flush=True)
        return False
    finally:
        if process.poll() is None:  # it or what it started
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
