"""What `cog build` 0.23 accepts and makes of cog.yaml and predict.py, after Cog's own source.

Cog's command line, a Go program, loads cog.yaml, reads predict.py without running it, and writes the schema that the
server checks inputs with. These are its rules for what this project uses. Whatever else it accepts is refused here.
"""

import ast
import io
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The rows of Cog's torch_compatibility.json that matter here: PyTorch's version to the CUDA versions that it has.
TORCH = {"2.11.0": ("12.6", "12.8", "12.9", "13.0")}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")  # of these rows
RESERVED_NAMES = {"PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED", "LIBRARY_PATH"}
RESERVED_NAMES |= {"HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER"}
RESERVED_PREFIXES = ("R8_", "REPLICATE_", "CUDA_", "NVIDIA_", "NV_", "PGET_", "KUBERNETES_")
TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "Path": "string"}
KEYWORDS = {
    "default",
    "description",
    "ge",
    "le",
    "min_length",
    "max_length",
    "regex",
    "choices",
    "deprecated",
    "accept",
}


class RefusedError(ValueError):
    """Cog refuses the file, or reads it as something else than Python does."""


# ---------------------------------------------------------------------------------------------------------------------
# cog.yaml


def check_config(config: Mapping[str, Any], project: Path) -> None:
    """Raise RefusedError for what the loader of cog.yaml refuses, or warns of as deprecated."""
    build = config["build"]
    _must("predict" not in config, "predict is deprecated: use run")
    _must("concurrency" not in config, "concurrency.max is deprecated: use @concurrent")
    _must(not {"python_packages", "pre_install"} & set(build), "python_packages and pre_install are deprecated")
    path, _, name = config["run"].partition(".py:")
    _must(bool(path and name) and ".py:" not in name, "run must look like run.py:Runner")
    _must((project / f"{path}.py").is_file(), f"{path}.py does not exist")
    _must(build["python_version"] in PYTHONS, "python_version must be a string that Cog knows")
    _must((project / build["python_requirements"]).is_file(), "python_requirements does not exist")
    _must("weights" not in config or "model" in config, "weights need a model")
    for run in build.get("run", []):
        _must("\n" not in run["command"].strip(), "a command of build.run has a line break")
    names = [entry.partition("=")[0] for entry in config.get("environment", []) if "=" in entry]
    _must(len(names) == len(config.get("environment", [])) and all(names), "an entry of environment is not NAME=VALUE")
    _must(len(set(names)) == len(names), "a variable is set twice")
    for variable in names:
        reserved = variable in RESERVED_NAMES or variable.startswith(RESERVED_PREFIXES)
        _must(not reserved, f"{variable} is reserved")


def torch_wheels(config: Mapping[str, Any], requirements: str) -> tuple[str, str]:
    """The version of PyTorch that the image gets, such as `2.11.0+cu128`, and the index that Cog adds for it.

    Cog writes the pinned line as it is and adds the index; pip prefers the version with `+cu128` from there. The same
    index has torchaudio. Raises RefusedError where Cog would warn or take another build.
    """
    (version,) = (line.removeprefix("torch==") for line in requirements.splitlines() if line.startswith("torch=="))
    cuda = config["build"]["cuda"]
    _must(isinstance(cuda, str) and cuda in TORCH.get(version, ()), f"Cog has no PyTorch {version} for CUDA {cuda}")
    build = f"cu{cuda.replace('.', '')}"
    return f"{version}+{build}", f"https://download.pytorch.org/whl/{build}/"


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RefusedError(otherwise)


# ---------------------------------------------------------------------------------------------------------------------
# predict.py


@dataclass(frozen=True)
class Runner:
    """What Cog's parser reads from a class.

    Attributes:
        inputs: by name, in order: the type's name and the keywords of `Input`.
        concurrency: of the decorator `concurrent`; None without it.
    """

    inputs: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    is_async: bool = False
    concurrency: int | None = None


def read_runner(source: str, class_name: str) -> Runner:
    """Read a class as Cog's parser does. Raises RefusedError for what it refuses, ignores or misunderstands."""
    tree = ast.parse(source)
    _must("Path" in _imported(tree, "cog") and "Input" in _imported(tree, "cog"), "Path and Input must come from cog")
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if found is None:
        raise RefusedError(f"there is no class {class_name}")
    bases = [ast.unparse(base) for base in found.bases]
    _must(bases == ["BaseRunner"] and "BaseRunner" in _imported(tree, "cog"), "BasePredictor is deprecated")
    methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if "run" not in methods:
        raise RefusedError("there is no method run")
    run = methods["run"]
    if "predict" in methods:
        # The Python side counts callable attributes: a property is none. The parser prefers run.
        decorators = [ast.unparse(decorator) for decorator in methods["predict"].decorator_list]
        _must(decorators == ["property"], "run and predict must not both be methods")
    _must(run.returns is not None and ast.unparse(run.returns) == "List[Path]", "the result must be List[Path]")
    return Runner(_inputs(source, run), isinstance(run, ast.AsyncFunctionDef), _concurrency(run))


def _imported(tree: ast.Module, module: str) -> set[str]:
    froms = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == module)
    return {alias.name for node in froms for alias in node.names if alias.asname is None}


def _concurrency(run: ast.FunctionDef | ast.AsyncFunctionDef) -> int | None:
    if not run.decorator_list:
        return None
    (decorator,) = run.decorator_list
    _must(isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "concurrent", "unknown decorator of run")
    assert isinstance(decorator, ast.Call)
    _must(not decorator.args and [word.arg for word in decorator.keywords] == ["max"], "concurrent takes only max")
    most = decorator.keywords[0].value
    _must(isinstance(most, ast.Constant) and type(most.value) is int and most.value >= 1, "max must be a literal")
    assert isinstance(most, ast.Constant)
    _must(most.value == 1 or isinstance(run, ast.AsyncFunctionDef), "concurrent(max > 1) needs an async run")
    return int(most.value)


def _inputs(source: str, run: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, tuple[str, dict[str, Any]]]:
    arguments = run.args
    others = (arguments.posonlyargs, arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    _must(not any(others), "run takes only plain arguments")
    _must(arguments.args[0].arg == "self", "the first argument of run must be self")
    _must(len(arguments.defaults) == len(arguments.args) - 1, "an input has no Input(...)")
    inputs = {}
    for argument, call in zip(arguments.args[1:], arguments.defaults, strict=True):
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        _must(kind in TYPES, f"the type of {argument.arg} is not one of {', '.join(TYPES)}")
        inputs[argument.arg] = (kind, _keywords(source, argument.arg, kind, call))
    return inputs


def _keywords(source: str, name: str, kind: str, call: ast.expr) -> dict[str, Any]:
    _must(isinstance(call, ast.Call) and ast.unparse(call.func) == "Input" and not call.args, f"{name} has no Input")
    assert isinstance(call, ast.Call)
    keywords = {}
    for word in call.keywords:
        _must(word.arg in KEYWORDS, f"Input of {name} takes no {word.arg}")
        keywords[str(word.arg)] = _literal(word.value)
    _must("accept" not in keywords or kind == "Path", "accept is for files")
    lines = source.splitlines()[call.lineno - 1 : call.end_lineno]
    kinds = {token.type for token in tokenize.generate_tokens(io.StringIO("(" + "\n".join(lines) + "\n)").readline)}
    _must(tokenize.COMMENT not in kinds, f"a comment inside Input of {name}: in a list it is an item")
    return keywords


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    _must(isinstance(node, ast.Constant), f"{ast.unparse(node)} is not a plain literal")
    assert isinstance(node, ast.Constant)
    # The parser cuts off a string's first and last quote: no escapes, no joined strings, no prefixes.
    if isinstance(node.value, str):
        plain = node.end_col_offset - node.col_offset == len(node.value.encode()) + 2 and node.lineno == node.end_lineno
        _must(plain, f"{ast.unparse(node)} has an escape or is joined")
    return node.value


# ---------------------------------------------------------------------------------------------------------------------
# The schema


def openapi(runner: Runner, cog_version: str) -> dict[str, Any]:
    """The OpenAPI document that Cog's generator writes for a runner whose result is a list of files."""
    properties, enums = {}, {}
    for order, (name, (kind, keywords)) in enumerate(runner.inputs.items()):
        if "choices" in keywords:
            enum = {"title": name, "description": "An enumeration.", "enum": keywords["choices"], "type": TYPES[kind]}
            enums[name] = enum
            about: dict[str, Any] = {"allOf": [_ref(name)]}
        else:
            about = {"title": name.replace("_", " ").title(), "type": TYPES[kind]}
            about |= {"format": "uri"} if kind == "Path" else {}
        about["x-order"] = order
        names = {"default": "default", "description": "description", "ge": "minimum", "le": "maximum"}
        names |= {"min_length": "minLength", "max_length": "maxLength", "regex": "pattern", "accept": "x-cog-accept"}
        about |= {target: keywords[key] for key, target in names.items() if key in keywords}
        properties[name] = about
    schemas = {
        "Input": {
            "title": "Input",
            "type": "object",
            "properties": properties,
            "required": [name for name, about in properties.items() if "default" not in about],
        },
        "Output": {"title": "Output", "type": "array", "items": {"type": "string", "format": "uri"}},
        **enums,
        **_common_schemas(),
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": cog_version},
        "paths": _paths(),
        "components": {"schemas": schemas},
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _common_schemas() -> dict[str, Any]:
    def text(title: str, **more: str) -> dict[str, str]:
        return {"title": title, "type": "string", **more}

    moment = {"format": "date-time"}
    location = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    return {
        "PredictionRequest": {
            "title": "PredictionRequest",
            "type": "object",
            "properties": {"id": text("Id"), "input": _ref("Input")},
        },
        "PredictionResponse": {
            "title": "PredictionResponse",
            "type": "object",
            "properties": {
                "input": _ref("Input"),
                "output": _ref("Output"),
                "id": text("Id"),
                "version": text("Version"),
                "created_at": text("Created At", **moment),
                "started_at": text("Started At", **moment),
                "completed_at": text("Completed At", **moment),
                "status": text("Status"),
                "error": text("Error"),
                "logs": text("Logs"),
                "metrics": {"title": "Metrics", "type": "object"},
            },
        },
        "Status": {
            "title": "Status",
            "description": "An enumeration.",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
            "type": "string",
        },
        "HTTPValidationError": {
            "title": "HTTPValidationError",
            "type": "object",
            "properties": {"detail": {"title": "Detail", "type": "array", "items": _ref("ValidationError")}},
        },
        "ValidationError": {
            "title": "ValidationError",
            "required": ["loc", "msg", "type"],
            "type": "object",
            "properties": {
                "loc": {"title": "Location", "type": "array", "items": location},
                "msg": text("Message"),
                "type": text("Error Type"),
            },
        },
    }


def _paths() -> dict[str, Any]:
    def answer(description: str, schema: dict[str, str]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    done, wrong = "Successful Response", answer("Validation Error", _ref("HTTPValidationError"))
    request = {"content": {"application/json": {"schema": _ref("PredictionRequest")}}}
    id = {"title": "Prediction Id", "type": "string"}

    def read(summary: str, operation: str) -> dict[str, Any]:
        return {"get": {"summary": summary, "operationId": operation, "responses": {"200": answer(done, {})}}}

    return {
        "/": read("Root", "root__get"),
        "/health-check": read("Healthcheck", "healthcheck_health_check_get"),
        "/predictions": {
            "post": {
                "summary": "Predict",
                "description": "Run a single prediction on the model",
                "operationId": "predict_predictions_post",
                "requestBody": request,
                "responses": {"200": answer(done, _ref("PredictionResponse")), "422": wrong},
            }
        },
        "/predictions/{prediction_id}/cancel": {
            "post": {
                "summary": "Cancel",
                "operationId": "cancel_predictions__prediction_id__cancel_post",
                "parameters": [{"required": True, "schema": id, "name": "prediction_id", "in": "path"}],
                "responses": {"200": answer(done, {}), "422": wrong},
            }
        },
    }
