"""Takes the README's picture: six tabs of a real TensorBoard on real runs, photographed by headless Chromium.

python docs/picture.py logs docs/dashboard.png
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.browser import chromium, tensorboard

TABS = {
    "custom_scalars": "tf-custom-scalar-multi-line-chart-card",
    "timeseries": "scalar-card",
    "histograms": "vz-histogram-timeseries",
    "images": "tf-image-loader img",
    "graphs": "g.node",
    "hparams": "vaadin-grid",
}
COLUMNS, WIDTH, HEIGHT = 2, 1440, 810


def main(logdir: Path, target: Path) -> None:
    """Writes the picture of the runs in `logdir` to `target`."""
    shots = []
    with tensorboard(logdir) as address, chromium() as page:
        page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        for tab, filled in TABS.items():
            page.goto("about:blank")  # a new hash alone would not load the page anew
            page.goto(f"{address}/?darkMode=false&tagFilter=reward|loss|entropy#{tab}")
            page.wait_for_selector(filled, state="attached", timeout=30_000)
            if tab == "graphs":
                page.locator("g.node").filter(has_text="Policy").first.dblclick()
            page.wait_for_timeout(4_000)  # charts draw themselves in their own time
            shots.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    rows = -(-len(shots) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * WIDTH, rows * HEIGHT), "white")
    for number, shot in enumerate(shots):
        sheet.paste(shot, (number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT))
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS).quantize(128).save(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
