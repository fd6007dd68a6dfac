"""`make bench-convert`: every pair of formats, and what a large head costs to convert.

`pairs` has an entry for each ordered pair: `ok`, `lossy` or `impossible` with the reason in words;
`roundtrip_exact` lists the formats that gave back every bit of what they promise to. Throughput is
that of a package directory with a dense 3584 x 3584 head (F32) becoming one GGUF file, against
copying the same bytes, interleaved; `peak_memory_ratio` the same conversion of a 16384 x 16384
head in a process of its own: its peak resident memory, mapped pages included, above what it had
before, as a multiple of the tensor.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import artifacts
import helpers
from common import arguments, finish, say
from steerbridge.errors import NotRepresentable, WouldLose
from steerbridge.fingerprint import ModelFacts
from steerbridge.formats import formats
from steerbridge.package import load
from steerbridge_convert import convert
from steerbridge_hf.sites import facts

ROUNDS = 12
WIDE = 3584
WIDEST = 16384


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peak", nargs=2, metavar=("SOURCE", "TARGET"), help="used by itself")
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(*map(Path, options.peak))))
        return
    with tempfile.TemporaryDirectory(prefix="steerbridge-convert.") as folder:
        root = Path(folder)
        pairs, exact = matrix(root)
        say(f"pairs: {dict(Counter(p['status'] for p in pairs.values()))}")
        ratio = throughput(root)
        say(f"throughput ratio {ratio}")
        memory = peak_ratio(root)
    finish(
        {
            "pairs": pairs,
            "roundtrip_exact": exact,
            "throughput_ratio": ratio,
            "peak_memory_ratio": memory,
        }
    )


# ------------------------------------------------------------ pairs


def matrix(root: Path) -> tuple[dict[str, Any], list[str]]:
    """The end of each conversion, and which formats give back every bit."""
    model = helpers.tiny()
    weights = root / "model"
    model.save_pretrained(weights)
    names = sorted(formats())
    made = {n: artifacts.written(n, root / "artifacts", weights, facts(model)) for n in names}
    pairs = {
        f"{a} -> {b}": ended(made[a], a, b, root / "pairs", weights)
        for a in names
        for b in names
        if a != b
    }
    exact = [n for n in names if formats()[n].exact and comes_back(made[n], n, root, weights)]
    return pairs, exact


def ended(source: Path, before: str, after: str, folder: Path, weights: Path) -> dict[str, str]:
    sample = artifacts.SAMPLES[after]
    target = folder / f"{before}.{after}" / f"{sample.name}{sample.suffix}"
    options: dict[str, Any] = {
        "to": after,
        "source_format": before,
        "answers": artifacts.asked(before, after),
        "base": weights,
        "model": weights,
    }
    try:
        convert(source, target, **options)
    except WouldLose as error:
        return {"status": "lossy", "reason": "; ".join(map(str, error.losses))}
    except NotRepresentable as error:
        return {"status": "impossible", "reason": error.reason}
    return {"status": "ok"}


def comes_back(source: Path, name: str, root: Path, weights: Path) -> bool:
    """True if artifact, package, artifact, package end with the bits of the first package."""
    sample = artifacts.SAMPLES[name]
    read = {"source_format": name, "answers": sample.read, "base": weights, "model": weights}
    first, again, second = (root / "exact" / name / part for part in ("1", "artifact", "2"))
    again = again / source.name
    convert(source, first, **read)
    convert(first, again, to=name, answers=sample.write, model=weights, allow_loss=name == "cast")
    convert(again, second, **read)
    one, two = load(first), load(second)
    return one.tensors == two.tensors and one.spec.rules == two.spec.rules


# ------------------------------------------------------------ cost


def large(folder: Path, width: int) -> Path:
    """A package directory with a dense head of this width."""
    known = ModelFacts("llama", width, 32, 128, name=f"width-{width}")
    package = helpers.package(known, **artifacts.DENSE_HEAD)
    return package.save(folder)


def throughput(root: Path) -> float:
    """Median over rounds of the time to copy over the time to convert."""
    source, target = large(root / "wide", WIDE), root / "wide.gguf"
    bytes_ = source / "steering.safetensors"
    ratios = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        shutil.copyfile(bytes_, root / "copy")
        copied = time.perf_counter() - start
        start = time.perf_counter()
        convert(source, target)
        ratios.append(copied / (time.perf_counter() - start))
        target.unlink()
    return round(float(np.median(ratios)), 3)


def peak_ratio(root: Path) -> float:
    source = large(root / "widest", WIDEST)
    command = [sys.executable, __file__, "--peak", str(source), str(root / "widest.gguf")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return round((found["after"] - found["before"]) / (4 * WIDEST**2), 3)


def peak(source: Path, target: Path) -> dict[str, int]:
    """Peak resident bytes of this process before and after the conversion."""
    before = high_water()
    convert(source, target)
    return {"before": before, "after": high_water()}


def high_water() -> int:
    """VmHWM in bytes. Not ru_maxrss: a child starts with its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main()
