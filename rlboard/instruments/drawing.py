"""What loops offer to draw. A machine that cannot render loses the picture, not the run."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Drawn = TypeVar("Drawn")


def drawn(offered: Mapping[str, Callable[[], Drawn]], broken: set[str]) -> Iterator[tuple[str, Drawn]]:
    """Yields each tag that is offered, and what its function returns.

    One that fails is warned of, goes to `broken`, and is not tried again.
    """
    for tag, draw in offered.items():
        if tag in broken:
            continue
        try:
            picture = draw()
        except Exception as error:  # noqa: BLE001 - any renderer of any environment
            broken.add(tag)
            warnings.warn(f"{tag} cannot be drawn on {platform.node()}: {error}", RuntimeWarning, stacklevel=3)
        else:
            yield tag, picture


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as a picture, (height, width, 3), drawn without a display."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, for those alone who draw figures

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
