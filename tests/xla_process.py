"""Checks on XLA's CPU device, in a process of their own: torch_xla has to be loaded before the first backward pass of a process.

A check is an ordinary function called `check_...` that raises. A file with checks is also the script that runs them.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest


def checks_of(names: Mapping[str, object], module: str) -> dict[str, Callable[[], None]]:
    "The checks among the global names of a module."
    return {name: value for name, value in names.items() if name.startswith('check_') and value.__module__ == module}


def run_checks(checks: Mapping[str, Callable[[], None]], path: str, *names: str) -> None:
    "Run some checks here, in this process, and write for each what went wrong, or an empty text."
    import torch_xla  # noqa: F401  first of all

    found = {}
    for name in names:
        try:
            checks[name]()
            found[name] = ''
        except Exception:
            found[name] = traceback.format_exc()
    Path(path).write_text(json.dumps(found))


def outcomes(script: Path, names: Iterable[str], folder: Path) -> dict[str, str]:
    "What some checks of a file found, each a text that is empty where all was well; skips where there is no torch_xla."
    if importlib.util.find_spec('torch_xla') is None:
        pytest.skip("torch_xla is not installed: pip install 'robustnb[tpu]'")
    path = folder / 'found.json'
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).parent)}  # even if Python does not look beside scripts
    ran = subprocess.run(
        [sys.executable, script, path, *names], env=environment, capture_output=True, text=True, timeout=900
    )
    assert path.is_file(), ran.stderr
    return json.loads(path.read_text())
