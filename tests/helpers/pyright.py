"""Pyright, as type checker of the package and of code that uses it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.common import PROJECT

needs_pyright = pytest.mark.skipif(
    not importlib.util.find_spec("pyright") or not shutil.which("node"),
    reason="needs pyright (pip install -r requirements-dev.txt) and Node.js",
)


def pyright(folder: Path, *arguments: str) -> Any:
    """What pyright finds, run in a folder with this Python, its packages and the checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(PROJECT)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.startswith("{"), ran.stdout + ran.stderr
    return json.loads(ran.stdout)
