"""Takes the README's pictures: every tab of a real TensorBoard on the runs of a tour, by headless Chromium.

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
VIEWS = {
    "Scalars": "tagFilter=reward%7CLoss%2F%7Crollout",
    "Images": "tagFilter=GradCAM%7CGenerated%7CInput%7CTest",
    "Text": "tagFilter=Tour%7Cpredictions",
    "Distributions": "tagFilter=group",
    "Histograms": "tagFilter=group",
}
"""What of a tab is photographed, where not what comes first: as TensorBoard has it in its address."""


def arrange(page: Page, address: str, tab: str) -> None:
    """Opens what is worth seeing."""
    name, filled = TABS[tab]
    if tab in VIEWS:
        page.goto("about:blank")  # a new hash alone would not load the page anew
        page.goto(f"{address}/?darkMode=false#{name}&{VIEWS[tab]}")
        page.locator(filled).first.wait_for(state="attached")
    if tab == "Time Series":
        page.get_by_role("button", name="Settings").first.click()  # closes the pane
    if tab == "Graphs":
        page.locator("g.node").filter(has_text="Vision").first.dblclick()
    if tab == "Mesh":
        page.locator(filled).first.evaluate("canvas => canvas.scrollIntoView({block: 'center'})")


def main(logdir: Path, target: Path) -> None:
    """Writes a picture of each tab into `target`, and `overview.png` of six of them."""
    target.mkdir(parents=True, exist_ok=True)
    shots: dict[str, Image.Image] = {}
    transformer = logdir / "vision/train/tour-vit"
    with tensorboard(logdir) as everything, tensorboard(transformer) as single, chromium() as page:
        page.set_viewport_size(SIZE)  # type: ignore[arg-type]
        for tab in TABS:
            address = single if tab == "Graphs" else everything
            open_tab(page, address, tab, darkMode="false", tagFilter="reward|Loss/")
            arrange(page, address, tab)
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
