"""The local page's HTML: serve.html with its style, its scripts, and what it offers filled in."""

import json
from pathlib import Path

from separation.audio.excerpt import PREVIEW_SECONDS
from separation.report import player
from separation.web.formats import offered
from separation.web.limits import max_mib, max_seconds
from separation.web.offers import offers
from separation.web.queue import KEEP_SECONDS

FOLDER = Path(__file__).parent
PARTS = {
    "/* style */": FOLDER / "serve.css",
    "/* fetched */": player.FOLDER / "fetched.js",
    "/* files */": player.FOLDER / "files.js",
    "/* region */": FOLDER / "region.js",
    "/* script */": FOLDER / "serve.js",
}


def page() -> bytes:
    """The page."""
    options = {
        **offers(),
        "formats": offered(),
        "mib": max_mib(),
        "seconds": max_seconds(),
        "keep": KEEP_SECONDS,
        "preview": PREVIEW_SECONDS,
    }
    text = (FOLDER / "serve.html").read_text(encoding="utf-8")
    for place, path in PARTS.items():
        text = text.replace(place, path.read_text(encoding="utf-8"))
    return text.replace("/* options */", json.dumps(options).replace("<", "\\u003c")).encode()
