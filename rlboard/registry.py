"""The folder is the registry: a public file of a track's folder is a loop and a command, a `_file.py` a helper.

A loop's docstring, options and presets are read from its source with `ast`, so that the command line knows all of
them without importing torch. `Loop.load` imports the file when it is run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlboard.config import Option, Value

ROOT = Path(__file__).resolve().parent.parent
TYPES: dict[str, type[Value]] = {"int": int, "float": float, "str": str, "bool": bool}


class SourceError(Exception):
    """A loop's file that cannot be read as one; the message says which line and what is expected there."""


@dataclass(frozen=True)
class Track:
    """A folder of loops.

    Attributes:
        package: the folder's name, which is also the package its files are imported from.
        group: the command group of its loops; empty for commands at the top level.
        root: the folder the package lies in.
    """

    package: str
    group: str = ""
    root: Path = ROOT

    @property
    def folder(self) -> Path:
        return self.root / self.package

    def directory(self, name: str) -> Path:
        """Where the runs of the loop `name` lie below the log root: `REINFORCE`, `vision/train`."""
        return Path(self.group, name) if self.group else Path(name.upper())

    def files(self) -> list[Path]:
        """The source files of the track's loops, sorted by name."""
        return sorted(path for path in self.folder.glob("*.py") if not path.name.startswith("_"))

    def loops(self) -> Iterator[Loop]:
        """The loops of the track. Raises SourceError where one cannot be read."""
        return (read_loop(self, path) for path in self.files())


TRACKS = (Track("agents"), Track("vision", group="vision"))


@dataclass(frozen=True)
class Loop:
    """A training loop, as its source file describes it.

    Attributes:
        track: the track it belongs to.
        name: the file's stem, with which it is imported.
        doc: the module's docstring.
        options: the fields of its `Config`.
        presets: name of a preset to the defaults that it replaces.
    """

    track: Track
    name: str
    doc: str
    options: tuple[Option, ...]
    presets: Mapping[str, Mapping[str, Value]]

    @property
    def command(self) -> str:
        return self.name.replace("_", "-")

    def defaults(self, preset: str = "", *, smoke: bool = False) -> dict[str, Value]:
        """The value of every option where the user gives none: the preset's before the field's, `smoke` before both."""
        values = {option.name: option.default for option in self.options}
        values |= self.presets[preset] if preset else {}
        if smoke:
            values |= {option.name: option.smoke for option in self.options if option.smoke is not None}
        return values

    def load(self) -> ModuleType:
        """Imports the loop's module: `Config` and `train` are in it. This is where torch is imported."""
        root = str(self.track.root)
        if root not in sys.path[:1]:
            sys.path.insert(0, root)  # ahead of any other installed package called `agents`
        return importlib.import_module(f"{self.track.package}.{self.name}")


def read_loop(track: Track, path: Path) -> Loop:
    """Reads a loop's description from its source.

    Raises:
        SourceError: the file has no `Config` whose fields are `name: type = option(literals)`.
    """
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise SourceError(f"{path}:{error.lineno}: {error.msg}") from None
    options: tuple[Option, ...] | None = None
    presets: Mapping[str, Mapping[str, Value]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            options = tuple(
                _read_option(path, line) for line in node.body if isinstance(line, ast.AnnAssign) and _is_option(line)
            )
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _target(node) == "PRESETS" and node.value:
            presets = _literal(path, node.value)
    if options is None:
        raise SourceError(f"{path}: a loop needs a dataclass `Config` (a helper's file name begins with `_`)")
    return Loop(track, path.stem, inspect.cleandoc(ast.get_docstring(tree) or ""), options, presets)


def find_loop(name: str, tracks: Iterable[Track] = TRACKS) -> Loop:
    """The loop `package/stem`, as `run.json` names it.

    Raises:
        KeyError: it is none of the loops that are here, which the error holds.
        SourceError: its file cannot be read.
    """
    files = {f"{track.package}/{path.stem}": (track, path) for track in tracks for path in track.files()}
    if name not in files:
        raise KeyError(", ".join(files))
    return read_loop(*files[name])


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return target.id if isinstance(target, ast.Name) else ""


def _is_option(line: ast.AnnAssign) -> bool:
    call = line.value
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "option"


def _read_option(path: Path, line: ast.AnnAssign) -> Option:
    annotation = ast.unparse(line.annotation)
    if annotation not in TYPES:
        raise SourceError(f"{path}:{line.lineno}: an option is of type {', '.join(TYPES)}, not {annotation}")
    assert isinstance(line.value, ast.Call)
    named = {keyword.arg or "**": _literal(path, keyword.value) for keyword in line.value.keywords}
    placed = dict(zip(("default", "help"), (_literal(path, node) for node in line.value.args), strict=False))
    try:
        return Option(name=_target(line), type=TYPES[annotation], **placed, **named)
    except TypeError as error:
        raise SourceError(f"{path}:{line.lineno}: {error}") from None


def _literal(path: Path, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise SourceError(f"{path}:{node.lineno}: {ast.unparse(node)} is not a literal") from None
