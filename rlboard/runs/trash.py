"""Where pruned runs, and the originals of repaired files, wait until they are put back or the trash is emptied.

TensorBoard shows event files in any directory below its log root, so the trash lies beside that. Each prune or repair
has a folder of its own in it, named by the time:

    <time>/manifest.json    what is moved, by its path below the log root; written before anything moves
    <time>/runs/<path>      what has been moved
    <time>/copying          what is still on its way from another file system
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from rlboard.config import printable
from rlboard.errors import DataError, RlboardError, StorageError, UsageError
from rlboard.runs.find import LoggedRun

MANIFEST = "manifest.json"
MOVED = "runs"
COPYING = "copying"
DELETING = ".deleting"
"""Ends the name of a folder that is being emptied: what is left in it is not put back any more."""
STAMP = re.compile(rf"(?P<time>\d{{8}}-\d{{6}})(?:-(?P<number>\d+))?(?:{re.escape(DELETING)})?")


@dataclass(frozen=True)
class Folder:
    """What one prune or repair has moved: `names` are paths below the log root, not all of which need be here."""

    path: Path
    command: str
    names: tuple[str, ...]

    def place(self, name: str) -> Path:
        return self.path / MOVED / name

    @property
    def held(self) -> list[str]:
        """The names of what lies here now."""
        return [name for name in self.names if os.path.lexists(self.place(name))]

    @property
    def can_be_put_back(self) -> bool:
        """Whether something lies here whose deletion has not begun."""
        return bool(self.held) and not self.path.name.endswith(DELETING)


class Trash:
    """The trash of a log root: `.<name of the root>-trash` beside it, or another directory that is not inside it.

    Attributes:
        root: the log root, its links resolved.
        path: the trash; it is made when something is moved.

    Raises:
        UsageError: it cannot be where it is wanted.
    """

    def __init__(self, logdir: Path, directory: str = "") -> None:
        try:
            self.root = logdir.resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"--logdir {printable(logdir, 200)} is not a path: {printable(error)}") from None
        if not directory and not self.root.name:
            raise UsageError(f"--logdir {self.root} has no place beside it for the trash: give one with --trash DIR")
        try:
            wanted = Path(directory) if directory else self.root.with_name(f".{self.root.name}-trash")
            self.path = wanted.resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"--trash {printable(directory, 200)} is not a path: {printable(error)}") from None
        if self.path.is_relative_to(self.root):
            where = f"--trash {printable(directory, 200)}" if directory else printable(self.path, 200)
            raise UsageError(f"{where} is inside the log root, where TensorBoard would show it: give one outside")

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Makes the trash and keeps others out of it.

        Raises:
            StorageError: it cannot be made, or another process uses it.
        """
        where = printable(self.path, 200)
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            raise StorageError(f"the trash {where} is in use by another rlboard: wait until it is done") from None
        except OSError as error:
            hint = "give another directory with --trash"
            raise StorageError(f"the trash {where} cannot be used: {error.strerror or error}: {hint}") from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, command: str, names: Sequence[str]) -> Folder:
        """A new folder, on the disk with its manifest, for what `command` is about to move.

        Raises:
            StorageError: it cannot be written.
        """
        stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
        try:
            while True:
                path = self.path / (stamp if number == 1 else f"{stamp}-{number}")
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    number += 1
            facts = {"command": command, "root": self._relative_root(), "names": list(names)}
            unfinished = path / f".{MANIFEST}"
            with unfinished.open("w", encoding="utf-8") as file:
                json.dump(facts, file, indent=2)  # in ASCII, which any name survives
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path / MANIFEST)
            _sync(path)
            _sync(self.path)
        except OSError as error:
            raise StorageError(f"the trash {printable(self.path, 200)} cannot be written: {error.strerror}") from None
        return Folder(path, command, tuple(names))

    def take(self, folder: Folder, name: str) -> None:
        """Moves the directory `name` of the log root into `folder`.

        Raises:
            OSError: it could not be moved; it is whole at its place, or, if only its removal there failed, in `folder`.
        """
        _move(self.root / name, folder.place(name), folder.path / COPYING)

    def keep(self, folder: Folder, name: str) -> Path:
        """Puts a link to the file `name` of the log root into `folder`, or a copy; returns it.

        Raises:
            OSError: it could not be done.
        """
        source, target = self.root / name, folder.place(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # another file system, or one without links
            copy_durably(source, target)
            if not filecmp.cmp(source, target, shallow=False):
                raise OSError(errno.EBUSY, "it was written to while it was copied") from None
        _sync(target.parent)
        return target

    def folders(self) -> tuple[list[Folder], list[RlboardError]]:
        """The folders of this log root, oldest first, those being emptied too; and what is wrong with the others.

        Raises:
            StorageError: the trash cannot be listed.
        """
        found, problems = [], []
        try:
            names = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        except OSError as error:
            raise StorageError(f"the trash {printable(self.path, 200)} cannot be read: {error.strerror}") from None
        stamps = [stamp for name in names if (stamp := STAMP.fullmatch(name))]
        for stamp in sorted(stamps, key=lambda stamp: (stamp["time"], int(stamp["number"] or 1))):
            path = self.path / stamp.string
            if path.is_symlink():
                continue
            try:
                if folder := self._read(path):
                    found.append(folder)
            except RlboardError as error:
                problems.append(error)
        return found, problems

    def put_back(self, folder: Folder) -> Iterator[tuple[str, str]]:
        """Moves everything in `folder` back to its place; yields each name and why it could not be, if so.

        When all of it is back, the folder is removed.
        """
        for name in folder.held:
            yield name, self._put_back(folder, name)
        if not folder.held:
            self.discard(folder)

    def discard(self, folder: Folder) -> None:
        """Removes `folder` if nothing that was moved is in it."""
        with contextlib.suppress(OSError):  # somebody's own files
            shutil.rmtree(folder.path / COPYING, ignore_errors=True)
            for directory, _, _ in os.walk(folder.path / MOVED, topdown=False):
                Path(directory).rmdir()
            (folder.path / MANIFEST).unlink()
            folder.path.rmdir()

    def empty(self, folder: Folder) -> None:
        """Deletes `folder` for good. Raises OSError."""
        path = folder.path
        if not path.name.endswith(DELETING):  # a folder that is deleted in part must not be put back
            path = path.rename(path.with_name(f"{path.name}{DELETING}"))
        if (path / MOVED).exists():
            shutil.rmtree(path / MOVED)
        shutil.rmtree(path)  # its manifest last: without one it is nobody's

    def _put_back(self, folder: Folder, name: str) -> str:
        source, target = folder.place(name), self.root / name
        taken = f"{printable(target, 200)} is taken: move it away and undo again"
        try:
            if target.parent.resolve() != target.parent:
                return f"a directory above {printable(target, 200)} is a symbolic link now"
            if os.path.lexists(target):
                if target.is_symlink() or not target.is_dir():
                    return taken
                if _is_part(source, target):  # a crash came between the copy of it and its removal, or within that
                    shutil.rmtree(source)
                    return ""
                if LoggedRun(name, target).is_alive() or not _is_part(target, source):
                    return taken
                shutil.rmtree(target)
            _move(source, target, self.root / f".{folder.path.name}-{COPYING}")
        except OSError as error:
            return error.strerror or printable(error, 200)
        return ""

    def _relative_root(self) -> str:
        """Relative, so that log root and trash may be moved together."""
        return os.path.relpath(self.root, self.path)

    def _read(self, path: Path) -> Folder | None:
        """The folder at `path`, None if it is another log root's or nothing was ever moved there."""
        manifest = path / MANIFEST
        try:
            facts = json.loads(manifest.read_bytes())
            command, root, names = str(facts["command"]), str(facts["root"]), tuple(facts["names"])
            if not all(isinstance(name, str) and _is_inside(name) for name in names):
                raise ValueError("a name in it leads out of the log root")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{printable(manifest, 200)} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            hint = f"move what is in {MOVED}/ beside it by hand"
            raise DataError(f"{printable(manifest, 200)} is damaged: {printable(error)}: {hint}") from None
        return Folder(path, command, names) if root == self._relative_root() else None


def tree(directory: Path) -> tuple[float, int]:
    """When the newest file anywhere below `directory` was written, and the bytes of all; links are not followed.

    Raises:
        OSError: a part of it cannot be read.
    """
    newest, size, waiting = 0.0, 0, [str(directory)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    stat = entry.stat(follow_symlinks=False)
                    newest, size = max(newest, stat.st_mtime), size + stat.st_size
    return newest, size


def copy_durably(source: Path, target: Path) -> None:
    """Copies a file or a link with its times and mode, and returns when it is on the disk. Raises OSError."""
    shutil.copy2(source, target, follow_symlinks=False)
    if not target.is_symlink():
        _sync(target)


def _move(source: Path, target: Path, unfinished: Path) -> None:
    """Moves a directory to `target`, which does not exist: at once, or, to another file system, by a copy.

    The copy grows at `unfinished`, beside `target`, and is compared before the original is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    else:
        return
    if unfinished.exists():
        shutil.rmtree(unfinished)  # of an earlier crash
    try:
        _copy(source, unfinished)
        if not _is_part(source, unfinished):
            raise OSError(errno.EBUSY, "it was written to while it was copied")
        unfinished.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(source)


def _copy(source: Path, target: Path) -> None:
    """Copies a directory; links stay links. Unlike shutil's, it stops at the first error, such as a full disk."""
    target.mkdir()
    with os.scandir(source) as entries:
        for entry in entries:
            copy = _copy if entry.is_dir(follow_symlinks=False) else copy_durably
            copy(Path(entry.path), target / entry.name)
    shutil.copystat(source, target)


def _is_part(part: Path, whole: Path) -> bool:
    """Whether every file and link below the directory `part` is the same below `whole`."""
    with os.scandir(part) as entries:
        for entry in entries:
            twin = whole / entry.name
            if not os.path.lexists(twin) or entry.is_symlink() != twin.is_symlink():
                return False
            if entry.is_symlink():
                same = Path(entry.path).readlink() == twin.readlink()
            elif entry.is_dir():
                same = twin.is_dir() and _is_part(Path(entry.path), twin)
            else:
                same = twin.is_file() and filecmp.cmp(entry.path, twin, shallow=False)
            if not same:
                return False
    return True


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _sync(path: Path) -> None:
    """Returns when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
