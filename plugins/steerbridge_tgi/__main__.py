"""TGI's Python server, guarded: `python -m steerbridge_tgi serve MODEL ...`, its own options.

For environments that do not read `.pth` files (`python -S`), and those in which Steerbridge lies on
PYTHONPATH.
"""

from __future__ import annotations

import sys

from steerbridge_tgi import hook

if __name__ == "__main__":
    try:
        hook.install()
    except KeyError:
        sys.exit("steerbridge: STEERBRIDGE_PACKAGE: expected the path of a package, not set")
    except ValueError as error:
        sys.exit(f"steerbridge: {error}")
    from text_generation_server.cli import app

    app()
