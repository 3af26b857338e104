"""Some of many runs: a directory of links to them, which TensorBoard reads in place of the log directory.

TensorBoard loads all that it finds, and 10,000 runs are slow to load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from rlboard.errors import RlboardError
from rlboard.runs.find import LoggedRun, directories_above, find_runs, matching


def choose(runs: Iterable[LoggedRun], text: str, last: int | None) -> dict[str, Path]:
    """What stands for the chosen runs: their names and directories. What lies inside a chosen run comes with it.

    Args:
        runs: all there are. Event files of the root itself always belong to the choice, under their own names.
        text: part of the wanted names, or where it has `*` or `?` a pattern of the name or its end; empty for all.
        last: how many of them, those with the newest files, a run and all inside it being one; None for all.
    """
    runs = [run for run in runs if not run.problem]
    matched = {run.name for run in matching(runs, text) if run.name != "."}
    outermost = {name for name in matched if matched.isdisjoint(directories_above(name))}
    directories = {run.name: run.directory for run in runs if run.name in outermost}
    newest = dict.fromkeys(directories, 0.0)
    for run in runs:
        for name in (run.name, *directories_above(run.name)):
            if name in newest:
                newest[name] = max(newest[name], run.modified)
    kept = sorted(directories, key=lambda name: newest[name], reverse=True)[:last]
    root_files = {file.name: file for run in runs if run.name == "." for file in run.event_files}
    return root_files | {name: directories[name] for name in kept}


class Selection:
    """Keeps `directory`, which is empty at first, filled with links to the runs below `root` that `choose` names."""

    def __init__(self, root: Path, directory: Path, text: str, last: int | None) -> None:
        self.root, self.directory, self.text, self.last = root, directory, text, last
        self.links: dict[str, Path] = {}

    def refresh(self) -> None:
        """Links runs that have come since, and unlinks those that are no longer chosen."""
        try:
            wanted = choose(find_runs(self.root), self.text, self.last)
        except RlboardError:  # the root is not there yet, or no longer
            return
        for name in self.links.keys() - wanted:
            link = self.directory / name
            link.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                for parent in link.relative_to(self.directory).parents:
                    if parent.name:
                        (self.directory / parent).rmdir()
        for name in wanted.keys() - self.links:
            link = self.directory / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(wanted[name].absolute())
        self.links = wanted
