"""`make bench-convert`: every pair of formats, and the cost of converting a large head.

`pairs` has an entry for each ordered pair: `ok`, `lossy` or `impossible`, with the reason;
`roundtrip_exact` lists the formats whose round trip was bit-identical. `refused_unknown_keys`: the
share of the keys that a format's tool writes which are understood, refused or reported as they
must be (`tests/foreign_keys.py`); `none` for files without keys. Throughput: a package
directory with a dense 3584 x 3584 head (F32) is converted to one GGUF file, relative to copying the
same bytes, interleaved. `peak_memory_ratio`: the same conversion of a 16384 x 16384 head in a
separate process; the increase of its peak resident memory, mapped pages included, as a multiple of
the tensor size.
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

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import artifacts
import foreign_keys
import helpers
import ratios
from common import arguments, finish, say
from steerbridge.errors import NotRepresentable, WouldLose
from steerbridge.fingerprint import ModelFacts
from steerbridge.format import formats
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
        pairs, exact, told = matrix(root)
        say(f"pairs: {dict(Counter(p['status'] for p in pairs.values()))}")
        speed = throughput(root)
        say(f"throughput ratio {speed['throughput_ratio']}")
        memory = peak_ratio(root)
    finish(
        {
            "pairs": pairs,
            "roundtrip_exact": exact,
            "refused_unknown_keys": told,
            **speed,
            "peak_memory_ratio": memory,
        }
    )


# ------------------------------------------------------------ pairs


def matrix(root: Path) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """The result of each conversion, the formats whose round trip is bit-identical, and by format
    the share of keys that are not passed over."""
    model = helpers.tiny()
    weights = root / "model"
    model.save_pretrained(weights)
    names = sorted(formats())
    paths = {n: artifacts.written(n, root / "artifacts", weights, facts(model)) for n in names}
    pairs = {
        f"{a} -> {b}": result(paths[a], a, b, root / "pairs", weights)
        for a in names
        for b in names
        if a != b
    }
    written = [n for n in names if formats()[n].writable and formats()[n].exact]
    exact = [n for n in written if comes_back(paths[n], n, root, weights)]
    told = {n: keys_told(n, paths[n], root / "keys" / n, weights) for n in names}
    return pairs, exact, told


def keys_told(name: str, artifact: Path, folder: Path, weights: Path) -> float | str:
    """The share of a format's keys that are read as they must be."""
    keys = foreign_keys.KEYS.get(name, {})
    if not keys:
        return "none"
    right = [
        foreign_keys.verdict(name, key, value, artifact, folder / str(i), weights) == expected
        for i, (key, (value, expected)) in enumerate(keys.items())
    ]
    return round(sum(right) / len(right), 4)


def result(source: Path, before: str, after: str, folder: Path, weights: Path) -> dict[str, str]:
    sample = artifacts.SAMPLES[after]
    target = folder / f"{before}.{after}" / f"{sample.name}{sample.suffix}"
    options: dict[str, Any] = {
        "to": after,
        "source_format": before,
        "answers": artifacts.answers_between(before, after),
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
    """True if artifact, package, artifact, package gives the tensors of the first package."""
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
    model_facts = ModelFacts("llama", width, 32, 128, name=f"width-{width}")
    package = helpers.package(model_facts, **artifacts.DENSE_HEAD)
    return package.save(folder)


def throughput(root: Path) -> dict[str, Any]:
    """Copying time divided by conversion time, beside copying time divided by copying time."""
    source, target = large(root / "wide", WIDE), root / "wide.gguf"

    def copied() -> float:
        start = time.perf_counter()
        shutil.copyfile(source / "steering.safetensors", root / "copy")
        return time.perf_counter() - start

    def converted() -> float:
        target.unlink(missing_ok=True)
        start = time.perf_counter()
        convert(source, target)
        return time.perf_counter() - start

    runs = {"plain": copied, "control": copied, "steered": converted}
    rounds = [ratios.alternate(number, runs) for number in range(ROUNDS)]
    return ratios.report({"throughput_ratio": ratios.of_rounds(rounds)})


def peak_ratio(root: Path) -> float:
    source = large(root / "widest", WIDEST)
    command = [sys.executable, __file__, "--peak", str(source), str(root / "widest.gguf")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    memory = json.loads(done.stdout.splitlines()[-1])
    return round((memory["after"] - memory["before"]) / (4 * WIDEST**2), 3)


def peak(source: Path, target: Path) -> dict[str, int]:
    """Peak resident bytes of this process before and after the conversion."""
    before = high_water()
    convert(source, target)
    return {"before": before, "after": high_water()}


def high_water() -> int:
    """VmHWM in bytes. Not ru_maxrss, because a child inherits that of its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main()
