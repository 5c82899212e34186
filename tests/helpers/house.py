"""The package's modules and what each imports."""

import ast
from functools import cache
from pathlib import Path

from helpers.common import PROJECT


@cache
def modules() -> dict[str, Path]:
    files = [PROJECT / "predict.py", *(PROJECT / "separation").rglob("*.py")]
    return {".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known = modules()
            found |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return found
