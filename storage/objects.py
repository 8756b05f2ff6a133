"""A store in an object store: S3 and its like, or anything else that fsspec has a driver for.

Objects are put whole, so a reader sees the old content, the new content or nothing. Folders do not
exist, so nothing is renamed: what must appear at once is named by an object that is put last.
"""

import hashlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from storage.errors import StoreError

__all__ = ["RETRY_DELAYS", "ObjectStore"]

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try when the connection fails, on top of the driver's own tries."""

_NUM_THREADS = 16
"""Requests that `map` has under way at a time."""

_LISTING_SECONDS = 10
"""How long an SQL engine may take a listing for current."""

_BLOCK = 32 << 20
"""Bytes that a checksum reads at a time."""

_NO_CREDENTIALS = {
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "TokenRetrievalError",
}
"""Names of the errors by which cloud clients say that they found nothing to sign requests with;
names, because a driver is imported only for the store that needs it."""

_CLIENTS = {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google",
            "s3fs"}  # fmt: skip
"""Packages whose errors come from talking to an object store, as OSError does."""


class ObjectStore:
    """The objects below a URL such as ``s3://bucket/prefix``."""

    def __init__(self, url: str) -> None:
        self.filesystem = _open_filesystem(url, use_listings_cache=False)
        self._url = url
        # As the filesystem spells it, because SQL engines report file names in that spelling.
        self.root = self.filesystem.unstrip_protocol(self.filesystem._strip_protocol(url))
        self._bucket = self.root.partition("://")[2].strip("/").partition("/")[0]

    def local(self, path: str) -> Path:
        """An object has no path on this machine.

        Raises:
            StoreError: always.
        """
        raise StoreError(f"{self._full(path)} is an object, not a file of this machine.")

    def reader(self) -> Any:
        """A new filesystem for an SQL engine, which lists and looks up the same folders often.

        It remembers listings for some seconds: what is committed meanwhile is seen after them.
        """
        return _open_filesystem(
            self._url, use_listings_cache=True, listings_expiry_time=_LISTING_SECONDS
        )

    def prepare(self) -> None:
        """Check that the bucket is there and may be listed.

        Raises:
            StoreError: if it is not.
        """
        self._has_any("runs")

    def exists(self, path: str) -> bool:
        """Whether there is an object of this name, or one below it."""
        return self._has_any(path)

    def size(self, path: str) -> int:
        """Size of an object in bytes; FileNotFoundError if it is missing."""
        return int(self._try(path, lambda name: self.filesystem.info(name))["size"])

    def sha256(self, path: str) -> str:
        """SHA-256 of an object's content, in hexadecimal."""
        digest = hashlib.sha256()
        size = self.size(path)
        for start in range(0, size, _BLOCK):
            read = partial(self.filesystem.cat_file, start=start, end=min(start + _BLOCK, size))
            digest.update(self._try(path, read))
        return digest.hexdigest()

    def read(self, path: str) -> bytes:
        """The content of an object; FileNotFoundError if it is missing."""
        content: bytes = self._try(path, lambda name: self.filesystem.cat_file(name))
        return content

    def using(self, path: str, use: Callable[[BinaryIO], Result]) -> Result:
        """What `use` makes of the object, which it may read and seek in; it may be called again."""

        def call(name: str) -> Result:
            with self.filesystem.open(name, "rb") as file:
                return use(file)

        return self._try(path, call)

    def glob(self, pattern: str) -> Iterator[str]:
        """Paths that match a pattern, in any order.

        Each wildcard segment costs one listing per folder that matched so far, so a listing never
        touches the tables when only commit records are asked for.
        """
        yield from self._expand("", pattern.split("/"))

    def everything(self, folder: str) -> Iterator[str]:
        """Paths of all objects below a folder, in any order."""
        for entry in self._list(folder, deep=True):
            yield entry["path"]

    def modified(self, path: str) -> float:
        """When an object was put, in Unix time; FileNotFoundError if it is missing."""
        return float(self._try(path, lambda name: self.filesystem.modified(name)).timestamp())

    def remove(self, path: str) -> None:
        """Remove an object if it is there.

        Raises:
            StoreError: if access is refused, or the connection is lost.
        """
        with suppress(FileNotFoundError):
            self._try(path, lambda name: self.filesystem.rm_file(name))

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Several items at a time, because most of the time of a request is waiting."""
        remaining = iter(items)
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            running = deque(threads.submit(function, i) for i in islice(remaining, _NUM_THREADS))
            while running:
                yield running.popleft().result()
                running.extend(threads.submit(function, i) for i in islice(remaining, 1))

    def free_bytes(self) -> None:
        """An object store does not say how much it can still hold."""

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Put a whole object.

        Raises:
            StoreError: if the bucket is missing, access is refused, or the connection is lost.
        """
        content = bytes(data)
        self._write(path, lambda name: self.filesystem.pipe_file(name, content))

    @contextmanager
    def writing(self, path: str) -> Iterator[Path]:
        """A local path to write a file to, which is put as `path` when the block ends well."""
        with tempfile.TemporaryDirectory(prefix="actlake-") as folder:
            temporary = Path(folder) / "object"
            yield temporary
            self._write(path, lambda name: self.filesystem.put_file(str(temporary), name))

    @contextmanager
    def staging_folder(self) -> Iterator[str]:
        """A temporary folder of this machine, which is removed afterwards."""
        with tempfile.TemporaryDirectory(prefix="actlake-") as folder:
            yield folder

    def publish(self, staged: str, target: str, last: str) -> None:
        """Put the staged files below `target`, `last` after all others and only if it is new.

        A driver that is killed in between leaves objects that no record names; beginning the same
        run again puts the same objects.
        """
        if self.exists(f"{target}/{last}"):
            return
        folder = Path(staged)
        paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        first = (path for path in paths if path != last)
        for _ in self.map(lambda p: self.put(f"{target}/{p}", (folder / p).read_bytes()), first):
            pass
        content = (folder / last).read_bytes()
        try:
            self._write(
                f"{target}/{last}",
                lambda name: self.filesystem.pipe_file(name, content, mode="create"),
            )
        except FileExistsError:
            return  # Another driver was first, with the same content.

    def _expand(self, folder: str, segments: list[str]) -> Iterator[str]:
        segment, rest = segments[0], segments[1:]
        if segment == "**":
            # What follows '**' is a pattern of the file name alone.
            for entry in self._list(folder, deep=True):
                if fnmatchcase(entry["path"].rpartition("/")[2], rest[0]):
                    yield entry["path"]
        elif "*" not in segment and rest:
            yield from self._expand(_join(folder, segment), rest)
        else:
            for entry in self._list(folder, deep=False):
                if fnmatchcase(entry["path"].rpartition("/")[2], segment):
                    if not rest:
                        yield entry["path"]
                    elif entry["type"] == "directory":
                        yield from self._expand(entry["path"], rest)

    def _list(self, folder: str, *, deep: bool) -> list[dict[str, Any]]:
        def call(name: str) -> list[dict[str, Any]]:
            if deep:
                return list(self.filesystem.find(name, detail=True).values())
            return list(self.filesystem.ls(name, detail=True))

        try:
            entries = self._try(folder, call)
        except FileNotFoundError as error:
            self._require_bucket(error)
            return []
        start = len(self._full("")) + 1
        return [
            {"path": self.filesystem.unstrip_protocol(entry["name"])[start:], "type": entry["type"]}
            for entry in entries
        ]

    def _has_any(self, path: str) -> bool:
        try:
            self._try(path, lambda name: self.filesystem.info(name))
        except FileNotFoundError as error:
            self._require_bucket(error)
            return False
        return True

    def _write(self, path: str, call: Callable[[str], Any]) -> None:
        try:
            self._try(path, call)
        except FileNotFoundError as error:
            self._require_bucket(error)
            raise StoreError(f"cannot write {self._full(path)}: {error}.") from error

    def _require_bucket(self, error: FileNotFoundError) -> None:
        if "bucket does not exist" in str(error).lower():
            raise StoreError(
                f"the bucket {self._bucket!r} of the store {self.root} does not exist: "
                "make it, or correct the URL."
            ) from error

    def _full(self, path: str) -> str:
        return _join(self.root, path)

    def _try(self, path: str, call: Callable[[str], Result]) -> Result:
        """Call with the object's full name, again after a while if the connection fails."""
        for delay in (*RETRY_DELAYS, None):
            try:
                return call(self._full(path))
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:
                if not _is_from_client(error):
                    raise
                if _is_refusal(error):
                    raise self._refused(error) from error
                if delay is None:
                    raise self._unreachable(path, error) from error
                time.sleep(delay)
        raise AssertionError("the last delay is None")

    def _refused(self, error: Exception) -> StoreError:
        if type(error).__name__ in _NO_CREDENTIALS:
            return StoreError(
                f"the store {self.root} needs credentials, and none were found ({error}): set them "
                "in the environment (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE) of this process and of every Ray node, or give the machines a role."
            )
        return StoreError(
            f"access to the store {self.root} is refused ({_short(error)}): check the credentials "
            "of this process and of every Ray node, and what they may do in the bucket."
        )

    def _unreachable(self, path: str, error: Exception) -> StoreError:
        return StoreError(
            f"the connection to the store {self.root} failed {len(RETRY_DELAYS) + 1} times at "
            f"{path or 'its root'!r} ({type(error).__name__}: {_short(error)}): check the network "
            "and the endpoint (for S3: AWS_ENDPOINT_URL), then run the same command again: "
            "committed work is kept."
        )


def _open_filesystem(url: str, **options: Any) -> Any:
    protocol = url.partition("://")[0]
    if "@" in url:
        raise StoreError(
            "a store URL must not hold credentials, because it is printed and recorded, found '@' "
            f"in a {protocol}:// URL: set them in the environment instead."
        )
    try:
        # Instances are not shared, because each takes its endpoint and credentials from the
        # environment when it is made.
        return fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except ImportError as error:
        raise StoreError(
            f"a store at {protocol}:// needs a Python package that is not installed here "
            f"({error}): for S3, pip install 'actlake[s3]', on every host."
        ) from error
    except ValueError as error:
        raise StoreError(
            f"store must be a folder or a URL that fsspec knows, such as s3://bucket/prefix, "
            f"found {url!r} ({error})."
        ) from error


def _is_from_client(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
