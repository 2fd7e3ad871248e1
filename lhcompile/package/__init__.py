"""The last stage: files in, a built directory out, and back again."""

from __future__ import annotations

from lhcompile.package.manifest import Manifest, PackageError, read_manifest
from lhcompile.package.write import check_destination, package, verify_files

__all__ = ["Manifest", "PackageError", "check_destination", "package", "read_manifest", "verify_files"]
