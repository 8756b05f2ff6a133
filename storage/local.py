"""A store in a folder: files appear by renaming, so that a reader never sees half of one."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from storage.errors import StoreError

__all__ = ["LocalFolder"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class LocalFolder:
    """The files below a folder of this machine, or of a filesystem that is mounted on it.

    Every file is written under a temporary name beside its target, synced, and renamed: a reader
    sees the old content, the new content or nothing, whatever is killed and when.
    """

    def __init__(self, path: str) -> None:
        # Resolved, because the names that SQL engines report for files must equal root + path.
        self._folder = Path(path).expanduser().resolve()
        self.root = self._folder.as_posix()
        self._is_new = False

    def local(self, path: str) -> Path:
        """Absolute path of a file."""
        return self._folder / PurePosixPath(path)

    def reader(self) -> None:
        """None: an SQL engine reads folders by itself."""

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            StoreError: if it cannot be made or written.
        """
        self._is_new = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot make the store {self.root}: {error.strerror}. "
                "Give a folder that can be written."
            ) from error
        if not os.access(self._folder, os.W_OK):
            raise StoreError(
                f"cannot write to the store {self.root}: permission denied. "
                "Give a folder that can be written."
            )

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return self.local(path).exists()

    def size(self, path: str) -> int:
        """Size of a file in bytes; FileNotFoundError if it is missing."""
        return self.local(path).stat().st_size

    def sha256(self, path: str) -> str:
        """SHA-256 of a file's content, in hexadecimal."""
        with self.local(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, path: str) -> bytes:
        """The content of a file; FileNotFoundError if it is missing."""
        return self.local(path).read_bytes()

    def using(self, path: str, use: Callable[[BinaryIO], Result]) -> Result:
        """What `use` makes of the file, which it may read and seek in."""
        with self.local(path).open("rb") as file:
            return use(file)

    def glob(self, pattern: str) -> Iterator[str]:
        """Paths that match a pattern, in any order."""
        for path in self._folder.glob(pattern):
            yield path.relative_to(self._folder).as_posix()

    def everything(self, folder: str) -> Iterator[str]:
        """Paths of all files below a folder, hidden ones too, in any order."""
        for path in self.local(folder).rglob("*"):
            if path.is_file():
                yield path.relative_to(self._folder).as_posix()

    def modified(self, path: str) -> float:
        """When a file last changed, in Unix time; FileNotFoundError if it is missing."""
        return self.local(path).stat().st_mtime

    def remove(self, path: str) -> None:
        """Remove a file if it is there, and folders that it leaves empty.

        Raises:
            StoreError: if the operating system refuses.
        """
        target = self.local(path)
        try:
            target.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot remove {target}: {error.strerror}.") from error
        for folder in target.relative_to(self._folder).parents[:-1]:
            try:
                (self._folder / folder).rmdir()
            except OSError:
                return  # It holds other files.

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """One item after the other: a disk is not faster when asked for several files at once."""
        return map(function, items)

    def free_bytes(self) -> int:
        """Free bytes where the folder is or will be."""
        folder = self._folder
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Write a whole file so that it appears at once."""
        with self.writing(path) as temporary:
            temporary.write_bytes(data)

    @contextmanager
    def writing(self, path: str) -> Iterator[Path]:
        """A path to write a file to, which appears at once as `path` when the block ends well.

        Raises:
            StoreError: if the operating system refuses (no space, no permission, ...).
        """
        target = self.local(path)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
                _sync(temporary)
                temporary.replace(target)
                # A rename is durable only once the folder that holds the name is on disk as well.
                _sync(target.parent)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            # Errors of pyarrow carry the number, and say around its meaning what they were doing.
            reason = os.strerror(error.errno) if error.errno else error
            raise StoreError(
                f"cannot write {target}: {reason}. Free or grant the space or "
                "permission, then run the same command again: committed work is kept."
            ) from error

    @contextmanager
    def staging_folder(self) -> Iterator[str]:
        """A folder inside the store, so that `publish` can rename it; it is removed afterwards."""
        folder = self.local(f"planning-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        try:
            yield folder.as_posix()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if self._is_new and not any(self._folder.iterdir()):
                # Nothing was published: what was refused leaves nothing behind.
                self._folder.rmdir()

    def publish(self, staged: str, target: str, last: str) -> None:
        """Rename the staged folder; a target that has its last file already is left as it is.

        Raises:
            StoreError: if the operating system refuses.
        """
        folder = self.local(target)
        if (folder / last).exists():
            return
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            Path(staged).rename(folder)
            _sync(folder.parent)
        except OSError as error:
            if (folder / last).exists():  # Another driver was first, with the same content.
                return
            raise StoreError(
                f"cannot rename {staged} to {folder}: {error.strerror}. "
                f"Remove {folder} if it is left from a broken copy, then run the command again."
            ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
