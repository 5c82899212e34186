"""The published schema: any change of a name, default, choice or range shows as a difference."""

import difflib
import json
from typing import Any

import pytest
import yaml
from cog._inspector import create_predictor

from helpers.cog_rules import RefusedError, Runner, check_config, openapi, read_runner, torch_wheels
from helpers.common import PROJECT, song
from helpers.served_process import SCHEMA, Server

PREDICT = (PROJECT / "predict.py").read_text(encoding="utf-8")
CONFIG: dict[str, Any] = yaml.safe_load((PROJECT / "cog.yaml").read_text(encoding="utf-8"))
REQUIREMENTS = (PROJECT / CONFIG["build"]["python_requirements"]).read_text(encoding="utf-8")
HOW_TO_UPDATE = (
    "the inputs are a published contract: if the change is intended, write the file again in the project's folder with "
    "PYTHONPATH=tests:. python -c 'from served.test_schema import *; "
    'SCHEMA.write_text(json.dumps(written(), indent=2) + "\\n")\''
)


def committed() -> dict[str, Any]:
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def written() -> dict[str, Any]:
    """The schema that `cog build` writes."""
    return openapi(read_runner(PREDICT, "Predictor"), CONFIG["build"]["sdk_version"])


def check(found: object, expected: object) -> None:
    """Fail with a diff unless both are the same JSON."""
    texts = [json.dumps(schema, indent=2, sort_keys=True).splitlines() for schema in (expected, found)]
    difference = "\n".join(difflib.unified_diff(*texts, "committed", "now", n=6, lineterm=""))
    assert not difference, f"{HOW_TO_UPDATE}\n{difference}"


def test_the_committed_schema_is_what_cogs_generator_writes() -> None:
    check(written(), committed())


def test_the_server_gives_the_committed_schema(server: Server) -> None:
    status, schema = server.request("GET", "/openapi.json")
    assert status == 200
    check(schema, committed())


def test_the_committed_schema_is_what_cog_reads_from_the_loaded_runner() -> None:
    fields = create_predictor("predict", "Predictor").inputs
    schemas = committed()["components"]["schemas"]
    keys = ("x-order", "description", "default", "minimum", "maximum")
    read = {
        name: dict(zip(keys, (field.order, field.description, field.default, field.ge, field.le), strict=True))
        | {"choices": field.choices}
        for name, field in fields.items()
    }
    told = {
        name: {key: value.get(key) for key in keys} | {"choices": schemas[name]["enum"] if "allOf" in value else None}
        for name, value in schemas["Input"]["properties"].items()
    }
    assert read == told


def test_neither_setup_nor_a_prediction_uses_anything_deprecated(server: Server) -> None:
    assert server.predict(song(1), chunk_size=4, overlap=1)["status"] == "succeeded"
    assert "deprecat" not in server.log.read_text().lower()


# What `cog build` reads


def test_cog_accepts_cog_yaml_without_a_warning() -> None:
    check_config(CONFIG, PROJECT)


def test_the_image_has_pytorch_for_the_cuda_version_of_cog_yaml() -> None:
    assert torch_wheels(CONFIG, REQUIREMENTS) == ("2.11.0+cu128", "https://download.pytorch.org/whl/cu128/")
    assert "torchaudio==2.11.0" in REQUIREMENTS.splitlines()  # that index has it for the same CUDA


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"predict": "predict.py:Predictor"}, "predict is deprecated"),
        ({"concurrency": {"max": 4}}, "concurrency.max is deprecated"),
        ({"run": "predict:Predictor"}, "run must look like"),
        ({"run": "missing.py:Predictor"}, r"missing\.py does not exist"),
        ({"build": CONFIG["build"] | {"python_version": 3.11}}, "python_version must be"),
        ({"build": CONFIG["build"] | {"python_requirements": "none.txt"}}, "python_requirements does not exist"),
        ({"build": CONFIG["build"] | {"python_packages": ["torch"]}}, "are deprecated"),
        ({"build": CONFIG["build"] | {"run": [{"command": "true\ntrue"}]}}, "line break"),
        ({"environment": ["CUDA_MODULE_LOADING=LAZY"]}, "CUDA_MODULE_LOADING is reserved"),
        ({"environment": ["A=1", "A=2"]}, "set twice"),
        ({"environment": ["A"]}, "not NAME=VALUE"),
        ({"weights": []}, "weights need a model"),
    ],
)
def test_a_cog_yaml_that_cog_refuses_or_warns_of_is_found(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        check_config(CONFIG | changes, PROJECT)


@pytest.mark.parametrize("cuda", ["12.4", 12.8])
def test_a_cuda_version_without_this_pytorch_is_found(cuda: object) -> None:
    with pytest.raises(RefusedError, match="Cog has no PyTorch"):
        torch_wheels({"build": {"cuda": cuda}}, REQUIREMENTS)


@pytest.mark.parametrize(
    "before, after, said",
    [
        ("(BaseRunner)", "(BasePredictor)", "BasePredictor is deprecated"),
        ("def run(", "def go(", "no method run"),
        ("    @property  # a method", "    # a method", "must not both be methods"),
        ("-> List[Path]", "-> list", "result must be"),
        ("from cog import", "from other import", "must come from cog"),
        ("chunk_size: int = Input(", "chunk_size: bytes = Input(", "type of chunk_size"),
        ("chunk_size: int = Input(", "chunk_size = Input(", "type of chunk_size"),
        ("default=8,", "default=2 * 4,", "not a plain literal"),
        ("choices=[44100, 48000]", "choices=RATES", "not a plain literal"),
        ('"Output sample rate"', '"Output " "sample rate"', "has an escape or is joined"),
        ('"Output sample rate"', 'f"Output sample rate"', "not a plain literal"),
        ("choices=[128, 192, 320]\n", "choices=[128, 192, 320]  # kbit/s\n", "a comment inside Input of mp3_bitrate"),
        ("ge=4, le=30", 'ge=4, le=30, accept="audio/*"', "accept is for files"),
        ("ge=4, le=30", "ge=4, le=30, step=2", "takes no step"),
    ],
)
def test_a_runner_that_cog_refuses_or_misreads_is_found(before: str, after: str, said: str) -> None:
    assert PREDICT.count(before) == 1
    with pytest.raises(RefusedError, match=said):
        read_runner(PREDICT.replace(before, after), "Predictor")


def test_an_input_has_the_keywords_of_its_input_call() -> None:
    runner = read_runner(PREDICT, "Predictor")
    assert runner.inputs["overlap"] == (
        "int",
        {"description": "Overlap between chunks in seconds", "default": 4, "ge": 1, "le": 8},
    )
    assert openapi(Runner({"a_b": ("float", {"le": 2})}), "1")["components"]["schemas"]["Input"] == {
        "title": "Input",
        "type": "object",
        "properties": {"a_b": {"title": "A B", "type": "number", "maximum": 2, "x-order": 0}},
        "required": ["a_b"],
    }
