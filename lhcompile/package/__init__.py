"""The last stage: files in, a built directory out, and back again."""

from __future__ import annotations

from lhcompile.package.manifest import Manifest, PackageError, read_manifest
from lhcompile.package.write import Link, Source, check_destination, package, size_of, verify_files, workspace

__all__ = [
    "Link",
    "Manifest",
    "PackageError",
    "Source",
    "check_destination",
    "package",
    "read_manifest",
    "size_of",
    "verify_files",
    "workspace",
]
