"""TensorBoard's web page as it is, but for its settings: reloading is on from the start, as often as was asked for.

The page keeps its settings in the browser and reads them from nowhere else, so a script that runs before its own puts
them there. It takes no period below 30 s; that floor is lowered in the copy of its script that is served.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

SCRIPT = "rlboard_preset.js"
FLOORS = (
    ("e.autoReloadPeriodInMs>3e4", "e.autoReloadPeriodInMs>=1e3"),
    ("e>=3e4?e:", "e>=1e3?e:"),
    ("MIN_RELOAD_PERIOD_IN_S=30", "MIN_RELOAD_PERIOD_IN_S=1"),
)
"""What says 30 seconds in `index.js`, each once, and what says 1 second."""
SMALLEST_STOCK_PERIOD = 30_001
"""Milliseconds: the shortest period that an unchanged page takes."""
SMOOTHING = '"_smoothingWeight",{{defaultValue:{}}}'
"""How the pages Scalars and Custom Scalars, which know no settings, say their smoothing."""
PINS = ("reward", "eval/mean_reward", "Accuracy/val", "Loss/val")
"""The curves of both tracks that people look for; those that a log directory has go to the top of the first page."""

ZipProvider = Callable[[], IO[bytes]]


def preset_page(original: ZipProvider, *, reload: int, smoothing: float, dark: bool | None = None) -> ZipProvider:
    """The assets of `original` with a preset: settings that a browser takes once, after which the user's own count.

    Args:
        original: gives TensorBoard's own assets as a zip archive.
        reload: seconds between two reloads of the page, 1 or more.
        smoothing: from 0 to 0.999.
        dark: the theme; None leaves it as the browser has it.

    Where the script is not the one that `FLOORS` knows, its reload button is pressed by a timer instead.
    """
    with original() as file, zipfile.ZipFile(file) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    script = files["index.js"].decode()
    lowered = all(script.count(old) == 1 for old, _ in FLOORS)
    if lowered:
        for old, new in FLOORS:
            script = script.replace(old, new)
    script = script.replace(SMOOTHING.format(".6"), SMOOTHING.format(f"{smoothing:g}"))

    period = reload * 1000
    settings = {
        "autoReload": True,
        "autoReloadPeriodInMs": period if lowered else max(period, SMALLEST_STOCK_PERIOD),
        "scalarSmoothing": smoothing,
        **({} if dark is None else {"theme": "dark" if dark else "light"}),
    }
    preset: dict[str, Any] = {"settings": settings, "pins": PINS, "period": period, "press": not lowered}
    preset["id"] = _hash(json.dumps(preset))
    code = Path(__file__).with_name("preset.js").read_text("utf-8")
    files[SCRIPT] = f"{{\nconst preset = {json.dumps(preset)};\n{code}}}\n".encode()
    files["index.js"] = script.encode()
    # A browser keeps a script for a day, under the name that has its hash.
    named = f'<script src="{SCRIPT}"></script><script src="index.js?_file_hash={_hash(script)}"></script>'
    page, replaced = re.subn(r'<script src="index\.js[^"]*"></script>', named, files["index.html"].decode())
    if replaced == 1:
        files["index.html"] = page.encode()

    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return functools.partial(io.BytesIO, changed.getvalue())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
