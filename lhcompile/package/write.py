"""Writes a built directory whole or not at all.

Everything is written into a hidden directory beside the destination, on the same filesystem, flushed to disk,
and renamed into place. A reader sees the old directory or the new one, never a mixture; a failure or an
interruption removes what was begun and leaves the destination as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lhcompile.errors import DestinationError
from lhcompile.package.manifest import (
    FORMAT,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    PackageError,
    inside,
    read_manifest,
)

__all__ = ["Link", "Source", "check_destination", "package", "size_of", "verify_files", "workspace"]

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Link:
    """A file in `workspace`, already on the device and never changed again, that may become the directory's own."""

    path: Path


Source = bytes | Path | Link
"""Contents of a file, a file to copy, or one to link."""


def size_of(source: Source) -> int:
    """Bytes of a file that is to be packaged."""
    if isinstance(source, bytes):
        return len(source)
    return (source.path if isinstance(source, Link) else source).stat().st_size


def check_destination(destination: Path, force: bool) -> None:
    """Makes sure that `package` will be allowed to write here; call it before a long build.

    Writes nothing that stays. Raises DestinationError, one line, if the destination
    - is a file, or the directory the process stands in or one above it,
    - is not empty and `force` is not set,
    - is not empty, `force` is set, and it is not a built directory (a folder of the user's is never deleted),
    - lies where no directory can be created.
    """
    destination = _resolve(destination)
    try:
        _refuse_occupied(destination, force)
    except OSError as error:
        raise DestinationError(f"cannot look into {destination}: {error.strerror}") from None
    ancestor = destination.parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    probe = _beside(ancestor / destination.name, "probe")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise DestinationError(f"cannot write into {ancestor}: {error.strerror}") from None


@contextlib.contextmanager
def workspace(destination: Path) -> Iterator[Path]:
    """A hidden directory beside the destination for large files that `package` links into place; gone at the end.

    Missing parents of the destination are created, and removed again if the block fails.
    Raises DestinationError if they cannot be.
    """
    destination = _resolve(destination)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_parents(destination))
            place = stack.enter_context(_scratch(destination))
        except OSError as error:
            raise DestinationError(f"cannot write {destination}: {error.strerror or error}") from error
        yield place


def package(destination: Path, files: Mapping[str, Source], manifest: Manifest, *, force: bool) -> Path:
    """Writes `files` and manifest.json as the directory `destination` and returns its resolved path.

    files: name inside the directory → its contents, a file to copy, or a Link, which is copied only where the system
        has no hard links; missing parent folders are created
    manifest: its `files` is replaced by the checksums and sizes of what is written
    force: replace a built directory that is already there, whole; it is put back if that fails

    Raises DestinationError if the destination may not or cannot be written.
    """
    if MANIFEST_NAME in files:
        raise ValueError(f"{MANIFEST_NAME} is written from the manifest, not given as a file")
    for name in files:
        inside(name)
    check_destination(destination, force)
    destination = _resolve(destination)
    try:
        with _parents(destination), _scratch(destination) as scratch:
            entries = {name: _write(scratch / name, source) for name, source in sorted(files.items())}
            complete = Manifest.model_validate(manifest.model_dump() | {"files": entries})
            _write(scratch / MANIFEST_NAME, complete.to_json().encode())
            _sync_directories(scratch)
            _move_into_place(scratch, destination, force)
    except OSError as error:
        raise DestinationError(f"cannot write {destination}: {error.strerror or error}") from error
    return destination


def verify_files(directory: Path) -> Manifest:
    """Compares every file the manifest lists with its size and checksum; returns the manifest.

    Raises PackageError naming the first file that is missing or differs.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        try:
            with open(Path(directory) / name, "rb") as stream:
                found = _copy(stream, None)
        except OSError as error:
            raise PackageError(f"{directory}: cannot read {name} ({error.strerror})") from None
        if found.bytes != entry.bytes:
            raise PackageError(f"{directory}: {name} has {found.bytes} bytes, not {entry.bytes} as listed")
        if found.sha256 != entry.sha256:
            raise PackageError(f"{directory}: {name} does not match the sha256 in the manifest")
    return manifest


def _resolve(path: Path) -> Path:
    """The absolute path, links followed, so that a rename replaces the folder and not the link to it."""
    return Path(os.path.realpath(path))


def _refuse_occupied(destination: Path, force: bool) -> None:
    """Raises DestinationError if something is there that may not be replaced."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise DestinationError(f"{destination} is a file; name a directory to create")
    if Path.cwd().is_relative_to(destination):
        raise DestinationError(f"{destination} holds the current directory; name a directory to create")
    if not any(destination.iterdir()):
        return
    if not force:
        raise DestinationError(f"{destination} is not empty; --force replaces a built directory whole")
    if not _is_built(destination):
        raise DestinationError(
            f"{destination} is not empty and not a built directory; --force will not delete it, name another"
        )


def _is_built(directory: Path) -> bool:
    """True if the directory has a manifest of ours, of any version and in any state of repair."""
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _beside(destination: Path, purpose: str) -> Path:
    """An unused hidden name next to the destination, on the same filesystem."""
    return destination.parent / f".{destination.name}.{purpose}-{secrets.token_hex(6)}"


@contextlib.contextmanager
def _parents(destination: Path) -> Iterator[None]:
    """Creates the missing parents of the destination; removes them again if the body fails."""
    missing = [parent for parent in destination.parents if not parent.exists()]
    try:
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # not there yet, or in use by someone else by now
                parent.rmdir()
        raise


@contextlib.contextmanager
def _scratch(destination: Path) -> Iterator[Path]:
    """A new directory beside the destination, gone at the end unless it was moved into place."""
    scratch = _beside(destination, "partial")
    try:
        scratch.mkdir()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(path: Path, source: Source) -> FileEntry:
    """Writes one file to disk, through to the device, and returns its checksum and size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Link):
        if _linked(source.path, path):
            with open(path, "rb") as reader:
                return _copy(reader, None)
        source = source.path
    with (
        io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as reader,
        open(path, "xb") as writer,
    ):
        entry = _copy(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())
    return entry


def _linked(source: Path, path: Path) -> bool:
    """Whether `path` could be made a hard link to `source`: some filesystems have none."""
    try:
        os.link(source, path)
    except OSError:  # whatever else is wrong, copying will say
        return False
    return True


def _copy(reader: BinaryIO, writer: BinaryIO | None) -> FileEntry:
    """Reads a stream to its end, copies it if there is a writer, and returns its checksum and size."""
    digest, size = hashlib.sha256(), 0
    while chunk := reader.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if writer is not None:
            writer.write(chunk)
    return FileEntry(sha256=digest.hexdigest(), bytes=size)


def _sync_directories(root: Path) -> None:
    for directory, _, _ in os.walk(root):
        _sync_directory(Path(directory))


def _sync_directory(directory: Path) -> None:
    """Flushes a directory's entries, where the system lets directories be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(scratch: Path, destination: Path, force: bool) -> None:
    """Renames scratch to destination; an older build steps aside first and comes back on failure.

    Once the new one is in place the old one takes scratch's name, and is removed with it.
    """
    _refuse_occupied(destination, force)  # again: a build takes minutes, and someone may have come first
    aside = _beside(destination, "old")
    try:
        if destination.exists() and any(destination.iterdir()):
            os.rename(destination, aside)
        os.rename(scratch, destination)
    finally:
        if aside.exists():
            os.rename(aside, destination if scratch.exists() else scratch)
    _sync_directory(destination.parent)
