"""Writing aside and renaming, so that nothing half-written ever stands under its final name."""

import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vision_moe.errors import InputError

_LOCK = "lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _no_room(error: Exception) -> str | None:
    """Why nothing more can be written, if that is what the error says."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return error.strerror
    # How safetensors reports it, and a folder that was to be written inside of this one.
    full = os.strerror(errno.ENOSPC)
    return full if full in str(error) else None


def _default_mode(mode: int) -> int:
    """``mode`` less the umask: tempfile makes private files, ours are to be like any other."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an error.

    An existing folder at ``path`` is renamed aside, replaced and then removed; after an error it is
    still there, untouched, and the temporary folder is gone. A killed process cannot take its
    temporary folder away: the next one that writes ``path`` does.

    Raises:
        InputError: ``path`` cannot be written, the disk is full, or a file stands at ``path``.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: a file stands where a folder is to be written")
    new_parents = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        workspace, in_use = _locked_workspace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    written, replaced = workspace / "new", workspace / "old"
    try:
        written.mkdir()
        yield written
        if path.exists():
            path.rename(replaced)
        try:
            written.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
    except Exception as error:
        # Another folder's fault has its own name in it already.
        elsewhere = isinstance(error, InputError) and str(written) not in str(error)
        if not elsewhere and (reason := _no_room(error)) is not None:
            raise InputError(f"{path}: cannot be written ({reason})") from error
        raise
    finally:
        in_use.release()
        shutil.rmtree(workspace, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # not empty: it has its use
                parent.rmdir()


def _locked_workspace(path: Path) -> tuple[Path, FileLock]:
    """A temporary folder beside ``path`` and the lock that shows that it is in use."""
    while True:
        workspace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        in_use = FileLock(workspace / _LOCK)
        in_use.acquire()
        if workspace.exists():  # else another process took it for abandoned before the lock
            return workspace, in_use
        in_use.release()


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary folders of ``path`` whose process was killed: nobody holds the lock."""
    for lock_file in path.parent.glob(f".{glob.escape(path.name)}.*/{_LOCK}"):
        with suppress(Timeout, OSError), FileLock(lock_file, timeout=0):
            replaced = lock_file.with_name("old")
            if replaced.exists() and not path.exists():
                replaced.rename(path)  # killed between the two renames
            shutil.rmtree(lock_file.parent, ignore_errors=True)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all.

    Raises:
        InputError: ``path`` cannot be written.
    """
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    Raises:
        InputError: ``path`` cannot be written.
    """
    path = Path(path).absolute()
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        temporary.chmod(_default_mode(0o666))
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder if need be, and try it, so that work whose result goes there is not in vain.

    Raises:
        InputError: No file can be written there.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
