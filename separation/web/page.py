"""The local page's HTML: serve.html with the recipes, formats and limits filled in."""

import json
from pathlib import Path
from typing import Any

from separation.audio.ffmpeg import is_installed
from separation.audio.options import FFMPEG_FORMATS, SNDFILE_FORMATS
from separation.checkpoints.catalogue import missing
from separation.engine.recipes import choices, load_recipe, names
from separation.web.limits import max_mib, max_seconds
from separation.web.queue import KEEP_SECONDS

PAGE = Path(__file__).with_name("serve.html")


def page() -> bytes:
    """The page. It lists for each recipe its choices of stems and the bytes of weights still to download."""
    recipes: dict[str, dict[str, Any]] = {}
    for name in names():
        loaded = [load_recipe(name, choice) for choice in choices(name)]
        recipes[name] = {
            recipe.choice: {
                "stems": recipe.stems,
                "download": sum(file.bytes or 0 for item in recipe.models.items() for file in missing(*item)),
            }
            for recipe in sorted(loaded, key=lambda recipe: len(recipe.stems))
        }
    formats = (*SNDFILE_FORMATS, *(FFMPEG_FORMATS if is_installed() else ()))
    options = {"recipes": recipes, "formats": formats, "mib": max_mib(), "seconds": max_seconds(), "keep": KEEP_SECONDS}
    text = json.dumps(options).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("/* options */", text).encode()
