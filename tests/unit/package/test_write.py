"""A built directory appears whole or not at all, and never at the cost of someone else's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import lhcompile.package.write as write
from lhcompile.errors import DestinationError
from lhcompile.package import (
    Link,
    Manifest,
    PackageError,
    Source,
    check_destination,
    package,
    read_manifest,
    size_of,
    verify_files,
    workspace,
)

FILES: dict[str, Source] = {"step.onnx": b"step" * 1000, "prefill.onnx": b"prefill"}


@pytest.fixture
def manifest() -> Manifest:
    return Manifest.model_validate(
        {
            "lhcompile_version": "0.1.0",
            "target": "cpu",
            "model": {"family": "toy", "vocab_size": 4, "context_length": 16, "parameters": 10},
            "graphs": {"step": {"file": "step.onnx"}, "prefill": {"file": "prefill.onnx"}},
            "inputs": {"tokens": "input_ids"},
            "outputs": {"logits": "logits"},
            "states": [],
        }
    )


def _tree(root: Path) -> dict[str, bytes]:
    """Every file below root, hidden ones too, by relative path; folders count with a slash."""
    return {
        f"{path.relative_to(root)}{'/' if path.is_dir() else ''}": b"" if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def test_files_are_written_with_their_checksums(tmp_path: Path, manifest: Manifest) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(3 << 20))
    files = FILES | {"weights/step.data": source}
    out = package(tmp_path / "a" / "b" / "out", files, manifest, force=False)
    assert out == tmp_path / "a" / "b" / "out"
    assert (out / "weights/step.data").read_bytes() == source.read_bytes()
    assert verify_files(out) == read_manifest(out)
    assert read_manifest(out).files["step.onnx"].bytes == 4000
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert manifest.files == {}


def test_permissions_follow_the_umask(tmp_path: Path, manifest: Manifest) -> None:
    old = os.umask(0o027)
    try:
        out = package(tmp_path / "out", FILES, manifest, force=False)
    finally:
        os.umask(old)
    assert out.stat().st_mode & 0o777 == 0o750
    assert (out / "step.onnx").stat().st_mode & 0o777 == 0o640


def test_an_empty_destination_is_used(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "out").mkdir()
    package(tmp_path / "out", FILES, manifest, force=False)
    verify_files(tmp_path / "out")


@pytest.mark.parametrize("stage", [check_destination, "package"])
def test_an_occupied_destination_is_refused(tmp_path: Path, manifest: Manifest, stage: object) -> None:
    def attempt(destination: Path, force: bool) -> None:
        if stage == "package":
            package(destination, FILES, manifest, force=force)
        else:
            check_destination(destination, force)

    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    (foreign / "manifest.json").write_text('{"format": "another"}')
    before = _tree(tmp_path)
    with pytest.raises(DestinationError, match="is not empty; --force replaces a built directory whole"):
        attempt(foreign, False)
    with pytest.raises(DestinationError, match="not a built directory; --force will not delete it"):
        attempt(foreign, True)
    with pytest.raises(DestinationError, match="is a file; name a directory"):
        attempt(foreign / "chapter.tex", True)
    with pytest.raises(DestinationError, match=r"cannot write into .*chapter\.tex: Not a directory"):
        attempt(foreign / "chapter.tex" / "out", True)
    assert _tree(tmp_path) == before


def test_the_current_directory_is_never_replaced(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = package(tmp_path / "out", FILES, manifest, force=False)
    monkeypatch.chdir(out)
    with pytest.raises(DestinationError, match="holds the current directory"):
        check_destination(Path("."), force=True)


def test_force_replaces_a_build_whole(tmp_path: Path, manifest: Manifest) -> None:
    out = package(tmp_path / "out", FILES | {"report.html": b"old"}, manifest, force=False)
    package(out, FILES | {"step.onnx": b"new"}, manifest, force=True)
    verify_files(out)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "prefill.onnx", "step.onnx"]
    assert (out / "step.onnx").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_force_replaces_a_build_of_a_newer_version(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"format": "lhcompile", "format_version": 9}')
    package(out, FILES, manifest, force=True)
    verify_files(out)


def test_a_link_to_a_build_stays_a_link(tmp_path: Path, manifest: Manifest) -> None:
    package(tmp_path / "v1", FILES, manifest, force=False)
    (tmp_path / "latest").symlink_to("v1")
    package(tmp_path / "latest", FILES | {"step.onnx": b"new"}, manifest, force=True)
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "v1/step.onnx").read_bytes() == b"new"


def _break_second_write(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    whole, seen = write._write, []

    def broken(path: Path, source: Source) -> object:
        seen.append(path)
        if len(seen) == 2:
            path.write_bytes(b"half")
            raise error
        return whole(path, source)

    monkeypatch.setattr(write, "_write", broken)


def _break_last_rename(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    whole = os.rename

    def broken(source: Path, destination: Path) -> None:
        if ".partial-" in str(source):
            raise error
        whole(source, destination)

    monkeypatch.setattr(write.os, "rename", broken)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("breakage", [_break_second_write, _break_last_rename])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_in_the_middle_leaves_no_trace(
    tmp_path: Path,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    breakage: object,
    existing: bool,
) -> None:
    out = tmp_path / "deep" / "out"
    if existing:
        package(out, FILES, manifest, force=False)
    before = _tree(tmp_path)
    with monkeypatch.context() as patch:
        breakage(patch, error)  # type: ignore[operator]
        with pytest.raises((DestinationError, KeyboardInterrupt)) as caught:
            package(out, FILES | {"step.onnx": b"new"}, manifest, force=existing)
    assert _tree(tmp_path) == before
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {out}: No space left on device"
    package(out, FILES, manifest, force=existing)
    verify_files(out)


def test_an_interruption_after_the_swap_leaves_the_new_build_alone(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = package(tmp_path / "out", FILES, manifest, force=False)
    whole = os.rename

    def interrupted(source: Path, destination: Path) -> None:
        whole(source, destination)
        if ".partial-" in str(source):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write.os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            package(out, FILES | {"step.onnx": b"new"}, manifest, force=True)
    verify_files(out)
    assert (out / "step.onnx").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_missing_source_file_leaves_no_trace(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(DestinationError, match="No such file or directory"):
        package(tmp_path / "out", FILES | {"x.data": tmp_path / "absent"}, manifest, force=False)
    assert _tree(tmp_path) == {}


def test_an_unwritable_parent_is_refused_before_and_at_the_end(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(write.Path, "mkdir", denied)
    with pytest.raises(DestinationError, match=f"cannot write into {tmp_path}: Permission denied"):
        check_destination(tmp_path / "out", force=False)
    with pytest.raises(DestinationError, match="Permission denied"):
        package(tmp_path / "out", FILES, manifest, force=False)


def test_names_that_do_not_fit_are_programming_errors(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=r"prefill\.onnx is named but not listed"):
        package(tmp_path / "out", {"step.onnx": b""}, manifest, force=False)
    with pytest.raises(ValueError, match=r"manifest\.json is written from the manifest"):
        package(tmp_path / "out", FILES | {"manifest.json": b"{}"}, manifest, force=False)
    with pytest.raises(ValueError, match="is not a file inside the built directory"):
        package(tmp_path / "out", FILES | {"../escaped": b""}, manifest, force=False)
    assert _tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b"stEp" * 1000), r"step\.onnx does not match the sha256 in the"),
        (lambda file: file.write_bytes(b"step"), r"step\.onnx has 4 bytes, not 4000 as listed"),
        (lambda file: file.unlink(), r"cannot read step\.onnx \(No such file or directory\)"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, manifest: Manifest, damage: object, message: str) -> None:
    out = package(tmp_path / "out", FILES, manifest, force=False)
    damage(out / "step.onnx")  # type: ignore[operator]
    with pytest.raises(PackageError, match=message):
        verify_files(out)


def test_the_manifest_on_disk_is_plain_json(tmp_path: Path, manifest: Manifest) -> None:
    out = package(tmp_path / "out", FILES, manifest, force=False)
    document = json.loads((out / "manifest.json").read_text())
    assert list(document)[:2] == ["format", "format_version"]
    assert "tokenizer" not in document


def _linked(destination: Path, manifest: Manifest, data: bytes) -> list[int]:
    """Packages a file of the workspace twice, as a rehearsal and in earnest; inodes of the three."""
    with workspace(destination) as place:
        large = place / "large"
        large.write_bytes(data)
        files = FILES | {"weights.bin": Link(large)}
        assert size_of(files["weights.bin"]) == len(data)
        first = package(place / "rehearsal", files, manifest, force=False)
        package(destination, files, manifest, force=False)
        return [path.stat().st_ino for path in (large, first / "weights.bin", destination / "weights.bin")]


def test_a_link_is_written_once_and_alone_in_the_end(tmp_path: Path, manifest: Manifest) -> None:
    out, data = tmp_path / "a" / "b" / "out", os.urandom(3 << 20)
    assert len(set(_linked(out, manifest, data))) == 1
    verify_files(out)
    assert (out / "weights.bin").read_bytes() == data
    assert (out / "weights.bin").stat().st_nlink == 1
    assert _tree(tmp_path / "a").keys() == {"b/", "b/out/", *(f"b/out/{path.name}" for path in out.iterdir())}


def test_a_link_is_copied_where_there_are_no_hard_links(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, path: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(write.os, "link", refuse)
    assert len(set(_linked(tmp_path / "out", manifest, b"weights"))) == 3
    verify_files(tmp_path / "out")
    assert (tmp_path / "out" / "weights.bin").read_bytes() == b"weights"


def test_a_failure_in_the_workspace_leaves_no_trace(tmp_path: Path) -> None:
    def interrupted(destination: Path) -> None:
        with workspace(destination) as place:
            assert place.parent == destination.parent
            (place / "large").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "deep" / "er" / "out")
    assert _tree(tmp_path) == {}
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match=r"cannot write .*/file/out: (Not a directory|File exists)"):
        interrupted(tmp_path / "file" / "out")
