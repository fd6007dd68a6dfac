"""Imported by Python at startup in the environment of `steerbridge_tgi.environment`.

It shadows any other `sitecustomize`, so it runs that one too.
"""

import importlib.machinery
import importlib.util
import os
import sys
import types

_here = os.path.dirname(os.path.abspath(__file__))
_others = [path for path in sys.path if os.path.abspath(path or os.curdir) != _here]
_other = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _other is not None and _other.loader is not None:
    _other.loader.exec_module(importlib.util.module_from_spec(_other))

if os.environ.get("STEERBRIDGE_PACKAGE"):
    # Loaded by path: a Python process other than the server may not have Steerbridge installed.
    _hook = types.ModuleType("steerbridge_tgi_hook")
    _path = os.path.join(os.path.dirname(_here), "hook.py")
    importlib.machinery.SourceFileLoader(_hook.__name__, _path).exec_module(_hook)
    _hook.install()
