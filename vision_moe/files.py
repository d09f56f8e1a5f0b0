"""Writing aside and renaming, so that nothing half-written ever stands under its final name."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vision_moe.errors import InputError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _default_mode(mode: int) -> int:
    """``mode`` less the umask: tempfile makes private files, ours are to be like any other."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an error.

    An existing folder at ``path`` is renamed aside, replaced and then removed; after an error it is
    still there, untouched, and the temporary folder is gone.

    Raises:
        InputError: ``path`` cannot be written, the disk is full, or a file stands at ``path``.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: a file stands where a folder is to be written")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
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
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
        raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all.

    Raises:
        InputError: ``path`` cannot be written.
    """
    path = Path(path).absolute()
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(_default_mode(0o666))
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
