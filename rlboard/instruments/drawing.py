"""What loops offer to draw. A machine that cannot render loses the picture, not the run."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

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
