"""Does every install line work? `make test-install`; `--extras core,run` for some of them.

Builds the wheel and checks it. Installs it with each extra in a virtual environment of its own,
where no other package of this project is, and there runs every command's help and one real use
of the extra, outside of the repository. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import commands
import environments
import uses
import wheels


def main() -> int:
    """Test the chosen extras; 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", default=",".join(uses.USES), help="Joined by commas.")
    chosen = parser.parse_args().extras.split(",")
    if unknown := set(chosen) - set(uses.USES):
        parser.error(f"--extras: expected some of {', '.join(uses.USES)}, found {sorted(unknown)}")
    _check_table()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="steerbridge-install-") as folder:
        _say("building the wheel")
        wheel = wheels.build(Path(folder))
        wheels.check(wheel)
        results = {extra: _tested(extra, wheel) for extra in chosen}
    made = [extra for extra, (_, fresh) in results.items() if fresh]
    verdicts = {extra: verdict for extra, (verdict, _) in results.items()}
    seconds = round(time.monotonic() - start)
    print(json.dumps({"wheel": "ok", "extras": verdicts, "fresh": made, "seconds": seconds}))
    return int(any(verdict != "ok" for verdict in verdicts.values()))


def _tested(extra: str, wheel: Path) -> tuple[str, bool]:
    """`ok` or the first line of what failed; and whether the environment was made by this run."""
    _say(f"{extra}: installing")
    fresh = True
    with tempfile.TemporaryDirectory(prefix=f"steerbridge-{extra}-") as folder:
        try:
            environment = environments.prepare(extra, wheel, extra in uses.NEEDS_MODEL)
            fresh = environment.fresh
            _say(f"{extra}: every command")
            commands.check(environment, Path(folder))
            _say(f"{extra}: in use")
            uses.USES[extra](environment, Path(folder))
        except Exception as error:  # the other extras are tested all the same
            _say(f"{extra}: {type(error).__name__}: {error}")
            return f"failed: {str(error).splitlines()[0]}", fresh
    return "ok", fresh


def _check_table() -> None:
    """A new extra has a use here, or this ends."""
    declared = set(wheels.project()["project"]["optional-dependencies"]) - {"dev"}
    tested = set(uses.USES) - {environments.CORE}
    assert tested == declared, f"uses.py: expected the extras {declared}, found {tested}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
