"""Takes the README's pictures: every tab of a real TensorBoard on the runs of a tour, photographed by headless Chromium.

rlboard tour && python docs/gallery.py logs docs/gallery
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.browser import TABS, chromium, open_tab, tensorboard

if TYPE_CHECKING:
    from playwright.sync_api import Page

SIZE = {"width": 1440, "height": 900}
OVERVIEW = ("Custom Scalars", "Images", "Graphs", "Projector", "Profile", "Mesh")
"""What the first screen of the README shows."""
RUNS = {
    "Scalars": "REINFORCE|vision/train/tour$",
    "Images": "explain|gan",
    "Graphs": "vision/train/tour-vit",
    "Histograms": "vision/train/tour$",
    "Distributions": "vision/train/tour$",
}
"""Which runs a tab is photographed with, where not with all of them: a regular expression."""


def arrange(page: Page, tab: str) -> None:
    """Opens what is worth seeing."""
    if tab == "Graphs":
        page.locator("g.node").first.dblclick()


def main(logdir: Path, target: Path) -> None:
    """Writes a picture of each tab into `target`, and `overview.png` of six of them."""
    target.mkdir(parents=True, exist_ok=True)
    shots: dict[str, Image.Image] = {}
    with tensorboard(logdir) as address, chromium() as page:
        page.set_viewport_size(SIZE)  # type: ignore[arg-type]
        for tab in TABS:
            query = {"runFilter": RUNS[tab]} if tab in RUNS else {}
            open_tab(page, address, tab, darkMode="false", **query)
            arrange(page, tab)
            page.wait_for_timeout(6_000)  # charts draw themselves in their own time
            shots[tab] = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            smaller = shots[tab].resize((SIZE["width"] * 2 // 3, SIZE["height"] * 2 // 3), Image.Resampling.LANCZOS)
            smaller.quantize(128).save(target / f"{tab.lower().replace(' ', '-')}.png", optimize=True)
    sheet = Image.new("RGB", (2 * SIZE["width"], len(OVERVIEW) // 2 * SIZE["height"]), "white")
    for number, tab in enumerate(OVERVIEW):
        sheet.paste(shots[tab], (number % 2 * SIZE["width"], number // 2 * SIZE["height"]))
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS).quantize(128).save(
        target / "overview.png", optimize=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
