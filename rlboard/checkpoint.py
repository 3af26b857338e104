"""Saved state: written so that a crash leaves it readable, verified before it is read, and runs read back with it.

A checkpoint is a file and its SHA-256 beside it, as `sha256sum --check` reads it. torch itself takes a file with a
flipped byte for good, so nothing is unpickled before its hash fits.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlboard.config import Value, printable
from rlboard.errors import DataError, UsageError
from rlboard.files import replacing
from rlboard.registry import TRACKS, Loop, SourceError, Track, find_loop
from rlboard.runs.find import RUN_JSON, read_facts, suggestion

if TYPE_CHECKING:
    from torch import nn

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"
FORMAT = 4
"""Of what a run's checkpoint holds; another number is another version's."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes `state`, tensors, numbers, strings and containers of them, to `path`, and its hash to `<path>.sha256`.

    A crash at any moment leaves a file that `load` reads, the old one or the new: the hash file first admits both.

    Raises:
        OSError: it cannot be written; what was there before is intact.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    beside = sha256_file(path)
    line = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()
    earlier = beside.read_bytes() if beside.exists() else b""
    _replace(beside, earlier + line)
    _replace(path, content)
    _replace(beside, line)


def duplicate(source: Path, target: Path) -> None:
    """Gives a checkpoint that `save` has written a second name, in the same directory. Raises OSError."""
    hashes = sha256_file(source).read_text().split()[::2]
    _replace(sha256_file(target), "".join(f"{each}  {target.name}\n" for each in hashes).encode())
    unfinished = target.with_name(f".{target.name}.tmp")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:  # a file system without links
        shutil.copyfile(source, unfinished)
    unfinished.replace(target)


def remove(path: Path) -> None:
    """Removes a checkpoint and its hash, if they are there. Raises OSError."""
    for each in (path, sha256_file(path)):
        each.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, its tensors on the CPU.

    Raises:
        DataError: it is missing, is not what was saved, or is no checkpoint.
    """
    where = printable(path, 200)
    try:
        content, known = path.read_bytes(), sha256_file(path).read_bytes().split()
    except FileNotFoundError as error:
        missing = printable(Path(error.filename or path).name, 100)
        raise DataError(f"{where} cannot be verified: {missing} is not there: give another run") from None
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest().encode() not in known:
        raise DataError(f"{where} is damaged: its SHA-256 is not the one beside it: give another run")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(content):
                raise ValueError("it unpacks to more than it is")  # torch would fill the memory with a bomb
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever unpickling makes of a foreign file
        raise DataError(f"{where} is no checkpoint of rlboard: {printable(error)}") from None
    if not isinstance(state, dict):
        raise DataError(f"{where} is no checkpoint of rlboard: it holds a {type(state).__name__}")
    return state


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies saved weights into `model`. Raises DataError, naming the first that differs, where they do not fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in expected | found:
        if expected.get(name) != found.get(name):
            raise DataError(
                f"the checkpoint is of another network than the run's: {printable(name)} is "
                f"{found.get(name, 'missing')} in it, {expected.get(name, 'unknown')} by the configuration"
            )
    model.load_state_dict(weights)


@dataclass(frozen=True)
class SavedRun:
    """A run read back from its directory.

    Attributes:
        directory: where it lies.
        loop: which loop it ran, and `config` with which values, by name: `loop.load().Config(**config)`.
        status: `running`, `completed`, `interrupted` or `failed`.
        step: the x axis at the checkpoint.
        weights: the model's state at the checkpoint, on the CPU.
        state: what the loop would go on with, None where it cannot.
    """

    directory: Path
    loop: Loop
    config: dict[str, Value]
    status: str
    step: int
    weights: Mapping[str, Tensor]
    state: Mapping[str, Any] | None


def read_run(name: str, tracks: Iterable[Track] = TRACKS) -> SavedRun:
    """The run `name`: its directory, or the `run.json` or a checkpoint in it.

    Raises:
        UsageError: there is no such run; the message suggests runs with a similar name.
        DataError: its `run.json` or its checkpoint is missing, damaged, or not of this version's loops.
    """
    path = Path(name)
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except OSError:  # such as a name that is too long
        is_directory = is_file = False
    if not name or not (is_directory or is_file):
        raise UsageError(f"RUN {printable(name, 200)} is not there: {suggestion(path.name)}")
    if is_file and path.name != RUN_JSON and path.suffix != ".pt":
        raise UsageError(f"RUN {printable(path, 200)} is a file: give the directory of a run")
    directory = path if is_directory else path.parent
    loop, config, facts = saved_config(directory, tracks)
    checkpoint = path if is_file and path.suffix == ".pt" else directory / CHECKPOINT
    if not checkpoint.exists():
        where = printable(directory / RUN_JSON, 200)
        raise DataError(f"{where} is of a run without a {CHECKPOINT}: give one that was completed or interrupted")
    state = verified(checkpoint, loop, config)
    return SavedRun(directory, loop, config, facts["status"], state["step"], state["model"], state["loop"])


def saved_config(directory: Path, tracks: Iterable[Track] = TRACKS) -> tuple[Loop, dict[str, Value], dict[str, Any]]:
    """The loop of the run in `directory`, the value of each of its options, and all that its `run.json` says.

    Raises:
        DataError: its `run.json` is missing, damaged, or not of this version's loops.
    """
    facts = read_facts(directory)
    where = printable(directory / RUN_JSON, 200)
    loop = _find_loop(facts["loop"], where, tracks)
    return loop, _checked(facts["config"], loop, where), facts


def _find_loop(name: str, where: str, tracks: Iterable[Track]) -> Loop:
    try:
        return find_loop(name, tracks)
    except KeyError as known:
        raise DataError(
            f"{where} is of {printable(name)}, a loop that is not here: there are {known.args[0]}"
        ) from None
    except SourceError as error:
        raise DataError(f"{where} is of a loop that cannot be read: {error}") from None


def _checked(config: Mapping[str, Any], loop: Loop, where: str) -> dict[str, Value]:
    """`config` if it has exactly the loop's options, each with a value in its range."""
    options = {option.name: option for option in loop.options}
    if config.keys() != options.keys():
        differences = [f"unknown {printable(name)}" for name in sorted(config.keys() - options.keys())]
        differences += [f"missing {name}" for name in sorted(options.keys() - config.keys())]
        raise DataError(f"{where} is not of this version of {loop.name}: its config has {', '.join(differences[:5])}")
    values: dict[str, Value] = {}
    for name, option in options.items():
        value = config[name]
        if type(value) is not option.type and not (option.type is float and type(value) is int):
            raise DataError(f"{where} is damaged: {name} is {printable(value)}, not of type {option.type.__name__}")
        try:
            values[name] = option.type(value)
            replace(option, check="").validate(value)  # what it names may be gone; whoever needs it will say so
        except (UsageError, OverflowError) as error:
            raise DataError(f"{where} is damaged: {error}") from None
    return values


def verified(path: Path, loop: Loop, config: Mapping[str, Value]) -> dict[str, Any]:
    """The checkpoint at `path`, if it is of a run of `loop` with this `config`.

    Raises:
        DataError: it is damaged, of another version, or of a run whose options differ where they may not.
    """
    state, where = load(path), printable(path, 200)
    if state.get("format") != FORMAT:
        raise DataError(f"{where} is of format {printable(state.get('format'))}: this version reads format {FORMAT}")
    types = {"step": int, "config": dict, "model": dict, "loop": dict | None, "run": dict, "position": dict}
    if missing := [name for name, kind in types.items() if not isinstance(state.get(name), kind)]:
        raise DataError(f"{where} is no run's checkpoint: it has no {', '.join(missing)}")
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state["model"].items()):
        raise DataError(f"{where} is no run's checkpoint: its model is not made of tensors")
    fixed = [option.name for option in loop.options if not option.resume]
    if other := [name for name in fixed if state["config"].get(name) != config[name]]:
        raise DataError(f"{where} is another run's: {', '.join(sorted(other))} differs from {RUN_JSON}")
    return state


def sha256_file(path: Path) -> Path:
    """Where the hash of a checkpoint lies."""
    return path.with_name(f"{path.name}.sha256")


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
