"""The published schema: any change of a name, default, choice or range shows as a difference."""

import difflib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from cog._inspector import create_predictor

from helpers.common import PROJECT
from helpers.served_process import SCHEMA, Server

HOW_TO_UPDATE = (
    "the inputs are a published contract: if the change is intended, write the file again in the project's folder: "
    "pip install --target /tmp/cog cog==0.16.12 && "
    "PYTHONPATH=/tmp/cog python -m cog.command.openapi_schema > tests/served/openapi.json"
)


def committed() -> dict[str, Any]:
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def check(found: object, expected: object) -> None:
    """Fail with a diff unless both are the same JSON."""
    texts = [json.dumps(schema, indent=2, sort_keys=True).splitlines() for schema in (expected, found)]
    difference = "\n".join(difflib.unified_diff(*texts, "committed", "now", n=6, lineterm=""))
    assert not difference, f"{HOW_TO_UPDATE}\n{difference}"


def test_the_server_gives_the_committed_schema(server: Server) -> None:
    status, schema = server.request("GET", "/openapi.json")
    assert status == 200
    check(schema, committed())


def test_the_committed_schema_is_what_cog_reads_from_the_predictor() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about the names BasePredictor and predict
        fields = create_predictor("predict", "Predictor").inputs
    schemas = committed()["components"]["schemas"]
    read = {
        name: {
            "x-order": field.order,
            "description": field.description,
            "default": field.default,
            "choices": field.choices,
            "minimum": field.ge and float(field.ge),
            "maximum": field.le and float(field.le),
        }
        for name, field in fields.items()
    }
    told = {
        name: {key: value.get(key) for key in ("x-order", "description", "default", "minimum", "maximum")}
        | {"choices": schemas[name]["enum"] if "allOf" in value else None}
        for name, value in schemas["Input"]["properties"].items()
    }
    check(read, told)
    assert schemas["Input"]["required"] == ["audio"]
    assert schemas["Output"]["type"] == "array"


@pytest.mark.slow
def test_cog_writes_the_committed_schema(tmp_path: Path) -> None:
    cog = tmp_path / "cog"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", cog, "cog==0.16.12"],
        check=True,
        capture_output=True,
    )
    written = subprocess.run(
        [sys.executable, "-m", "cog.command.openapi_schema"],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(cog)},
        check=True,
        capture_output=True,
    )
    check(json.loads(written.stdout), committed())
