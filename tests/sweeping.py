"""A loop that takes no time, for tests of sweeps, and what tests of them look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlboard.registry import Track

HILL = '''"""Hill: its score is highest at x = 0.3; with the kind `nan` it fails, with `stop` it asks to stop, once."""
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from rlboard.config import option
from rlboard.errors import NumericalError
from rlboard.events import Event
@dataclass(frozen=True)
class Config:
    x: float = option(0.0, "where", min=-10, max=10, alias="--place")
    steps: int = option(4, "steps", min=1)
    kind: str = option("a", "kind", choices=("a", "b", "nan", "stop"))
    pause: float = option(0.0, "seconds a step takes", min=0)
    flag: str = option("", "a file", resume=True)
    seed: int = option(1, "seed", min=0)
    quiet: bool = option(False, "without a headline")
def train(config):
    for step in range(config.steps + 1):
        time.sleep(config.pause)
        if config.kind == "nan" and step == 2:
            raise NumericalError("the score is nan")
        if config.kind == "stop" and step == 2 and not Path(config.flag).exists():
            Path(config.flag).touch()
            signal.raise_signal(signal.SIGINT)
        score = 1 - (config.x - 0.3) ** 2 - abs(step / config.steps - 0.75)
        yield Event(step, config.steps, {"score": score, "loss": 1.0}, "" if config.quiet else "score")
'''


def zoo(root: Path) -> Track:
    """A track with the loop `hill`."""
    (root / "zoo").mkdir(exist_ok=True)
    (root / "zoo/hill.py").write_text(HILL, encoding="utf-8")
    return Track("zoo", root=root)


def facts(directory: Path) -> Any:
    return json.loads((directory / "run.json").read_text(encoding="utf-8"))
