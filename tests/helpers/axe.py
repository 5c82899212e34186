"""axe-core, which finds what keeps people from using a page by keyboard or screen reader; fetched with npm."""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from helpers.browser import Browser
from helpers.common import PROJECT

PACKAGE = "axe-core-4.14.1"
CACHE = PROJECT / ".cache"
VIEWS = [(390, 844, "light"), (390, 844, "dark"), (1280, 900, "light"), (1280, 900, "dark")]  # width, height, scheme
PHONE = 600  # narrower screens are touched


@cache
def _script() -> str:
    """The program, which sets the global `axe`. Skips the test if npm cannot fetch it."""
    path = CACHE / f"{PACKAGE}.js"
    if not path.exists():
        if shutil.which("npm") is None:
            pytest.skip("needs npm, for axe-core")
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            name, _, version = PACKAGE.rpartition("-")
            packed = subprocess.run(
                ["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, capture_output=True, text=True
            )
            if packed.returncode:
                pytest.skip(f"npm cannot fetch axe-core: {packed.stderr.strip()[-200:]}")
            with tarfile.open(Path(folder, f"{PACKAGE}.tgz")) as archive:
                archive.extract("package/axe.min.js", folder, filter="data")
            os.replace(Path(folder, "package", "axe.min.js"), path)
    return path.read_text(encoding="utf-8")


def faults(browser: Browser) -> list[str]:
    """What axe-core finds on the page as it is: `rule: element: what to do`. Empty if nothing is wrong."""
    browser.run(f"if (!globalThis.axe) {{ {_script()}\nglobalThis.axe = axe }}")
    found = browser.command(
        "execute/async",
        script="const [done] = arguments; axe.run().then(({violations}) => done(violations), e => done(`${e}`))",
        args=[],
    )
    assert isinstance(found, list), found
    return [
        f"{rule['id']}: {' '.join(map(str, node['target']))}: {node['failureSummary']}"
        for rule in found
        for node in rule["nodes"]
    ]


@contextmanager
def view(browser: Browser, width: int, height: int, scheme: str) -> Iterator[None]:
    """Show pages on a screen of this size in the colour scheme `light` or `dark`."""
    phone = width < PHONE
    browser.developer(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
    )
    browser.developer("Emulation.setTouchEmulationEnabled", enabled=phone)
    browser.developer("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    try:
        yield
    finally:
        browser.developer("Emulation.clearDeviceMetricsOverride")
        browser.developer("Emulation.setTouchEmulationEnabled", enabled=False)
        browser.developer("Emulation.setEmulatedMedia", features=[])
