"""What a push to Replicate needs beside `cog push`: a check before it, and the model's page after it.

    python .github/replicate.py check OWNER/NAME    # may this version replace the published one?
    python .github/replicate.py page OWNER/NAME     # description, readme and links, from docs/model-page.md

Both need REPLICATE_API_TOKEN. `check` exits with 1 and a line for each change that would break callers.
"""

import argparse
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
SCHEMA = PROJECT / "tests" / "served" / "openapi.json"  # a test keeps it equal to predict.py
PAGE = PROJECT / "docs" / "model-page.md"

Schemas = dict[str, Any]  # `components.schemas` of an OpenAPI document


def breaking_changes(published: Schemas, new: Schemas) -> Iterator[str]:
    """What callers of the published version may do that the new one refuses or answers otherwise."""
    before, after = published["Input"]["properties"], new["Input"]["properties"]
    for name, was in before.items():
        if name not in after:
            yield f"input {name} is missing"
        else:
            yield from _narrower(name, _resolved(was, published), _resolved(after[name], new))
    required = set(new["Input"].get("required", ())) - set(published["Input"].get("required", ()))
    yield from (f"input {name} is required now" for name in sorted(required))
    was, now = (_resolved(schemas["Output"], schemas) for schemas in (published, new))
    if _shape(was) != _shape(now):
        yield f"the output was {_shape(was)} and is {_shape(now)}"


def _resolved(specification: dict[str, Any], schemas: Schemas) -> dict[str, Any]:
    """A specification with what it refers to, as Cog writes choices."""
    for part in specification.get("allOf", ()):
        specification = specification | schemas[part["$ref"].rpartition("/")[2]]
    return specification


def _narrower(name: str, was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if _shape(was) != _shape(now):
        yield f"input {name} was {_shape(was)} and is {_shape(now)}"
        return
    if "enum" in now:
        gone = [choice for choice in was["enum"] if choice not in now["enum"]] if "enum" in was else ["any other value"]
        yield from (f"input {name} no longer accepts {choice}" for choice in gone)
    if now.get("minimum", float("-inf")) > was.get("minimum", float("-inf")):
        yield f"input {name} must be at least {now['minimum']} now"
    if now.get("maximum", float("inf")) < was.get("maximum", float("inf")):
        yield f"input {name} must be at most {now['maximum']} now"


def _shape(specification: dict[str, Any]) -> str:
    words = [specification.get("type", "anything"), specification.get("format", "")]
    if "items" in specification:
        words.append(f"of {_shape(specification['items'])}")
    return " ".join(filter(None, words))


def page() -> dict[str, str]:
    """The fields of the model's page: everything above the first heading of PAGE names one, the rest is the readme."""
    head, _, readme = PAGE.read_text(encoding="utf-8").partition("\n# ")
    fields = dict(re.findall(r"^(\w+): (.+)$", head, re.MULTILINE))
    return {**fields, "readme": f"# {readme}"}


def call(model: str, fields: dict[str, str] | None = None) -> dict[str, Any]:
    """The model as Replicate describes it, after setting these fields, if any."""
    base = os.environ.get("REPLICATE_API_BASE_URL", "https://api.replicate.com")
    request = urllib.request.Request(
        f"{base}/v1/models/{model}",
        method="PATCH" if fields else "GET",
        data=json.dumps(fields).encode() if fields else None,
        headers={
            "Authorization": f"Bearer {os.environ['REPLICATE_API_TOKEN']}",
            "Content-Type": "application/json",
            "User-Agent": "separation",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def check(model: str) -> list[str]:
    """The breaking changes since the published version; none if nothing is published."""
    version = call(model).get("latest_version")
    if not version:
        return []
    schemas = [version["openapi_schema"], json.loads(SCHEMA.read_text(encoding="utf-8"))]
    published, new = (each["components"]["schemas"] for each in schemas)
    return list(breaking_changes(published, new))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "page"])
    parser.add_argument("model", help="OWNER/NAME; it must exist on Replicate")
    options = parser.parse_args()
    if not re.fullmatch(r"[a-z0-9._-]+/[a-z0-9._-]+", options.model):
        parser.error(f"{options.model!r} is not a model's name: use OWNER/NAME")
    if "REPLICATE_API_TOKEN" not in os.environ:
        parser.error("REPLICATE_API_TOKEN is not set: set it to a token of replicate.com/account/api-tokens")
    try:
        if options.command == "page":
            call(options.model, page())
            return 0
        changes = check(options.model)
    except OSError as e:
        detail = e.read().decode(errors="replace").strip()[:500] if isinstance(e, urllib.error.HTTPError) else ""
        print(f"Replicate cannot be asked about {options.model} ({e}): {detail or 'try again'}", file=sys.stderr)
        return 1
    for change in changes:
        print(f"{change}: push to another model, or keep what callers use", file=sys.stderr)
    return 1 if changes else 0


if __name__ == "__main__":
    sys.exit(main())
