"""Filters on their own: the package as a function, whatever imports it first, and its files."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lhcompile
from lhcompile.distill import Reduction, files, reduce
from lhcompile.distill.filters import as_bank, distill_filters
from lhcompile.distill.summary import summarize
from lhcompile.errors import ConfigError, DestinationError, DistillError
from lhcompile.ssm import ModalSSM

# ---- the package is a function -------------------------------------------------------------------------------------

CALL = "print(type(lhcompile.distill([0.5**t for t in range(20)], order=1)).__name__)"
ORDERS = {
    "the package first": f"import lhcompile; {CALL}; from lhcompile.distill import distill; distill.__code__",
    "a name of the subpackage first": f"from lhcompile.distill import reduce; import lhcompile; {CALL}",
    "the subpackage first": f"import lhcompile.distill; {CALL}",
    "from the package": f"from lhcompile import distill; import lhcompile; assert distill is lhcompile.distill; {CALL}",
    "everything": "from lhcompile import *; print(type(distill([0.5**t for t in range(20)], order=1)).__name__)",
}


@pytest.mark.parametrize("order", ORDERS)
def test_in_whatever_order_it_is_imported(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", ORDERS[order]], capture_output=True, check=False, encoding="utf-8")
    assert (done.stdout, done.stderr, done.returncode) == ("Reduction\n", "", 0)


def test_the_function_is_still_a_package_that_says_how_it_is_called() -> None:
    assert isinstance(lhcompile.distill, types.ModuleType)
    assert sys.modules["lhcompile.distill"] is lhcompile.distill
    assert lhcompile.distill.reduce is reduce  # type: ignore[attr-defined]
    assert inspect.signature(lhcompile.distill) == inspect.signature(distill_filters, eval_str=True)
    assert type(lhcompile.distill).__call__.__doc__ == distill_filters.__doc__


# ---- arrays --------------------------------------------------------------------------------------------------------


def test_whatever_holds_numbers_is_taken(trained_like: Tensor) -> None:
    expected = reduce(trained_like, 2).error
    for taps in (trained_like, trained_like.numpy(), trained_like.tolist(), trained_like.numpy().astype(">f8")):
        torch.testing.assert_close(lhcompile.distill(taps, order=2).error, expected)
    single = lhcompile.distill(trained_like.float().requires_grad_(), order=2)
    assert float((single.error - expected).abs().max()) < 1e-5
    folded = lhcompile.distill(trained_like.reshape(2, 3, 4, 256), order=2)
    torch.testing.assert_close(folded.error, expected)
    one = lhcompile.distill(trained_like[3].numpy(), order=2)
    torch.testing.assert_close(one.error, expected[3:4], rtol=1e-4, atol=0)
    assert lhcompile.distill(np.array([9, 3, 1, 0]), order=1).error.shape == (1,)


def test_tolerance_weights_method_and_head_are_passed_on(trained_like: Tensor) -> None:
    spectrum = np.linspace(3, 0.1, 33)
    result = lhcompile.distill(trained_like, tol=0.3, weights=spectrum, method="hankel", head=3)
    expected = reduce(trained_like, None, 0.3, torch.from_numpy(spectrum)[None], "hankel", 3)
    torch.testing.assert_close(result.system.poles, expected.system.poles)
    torch.testing.assert_close(result.error, expected.error)
    assert result.head.shape == (24, 2)
    assert int(lhcompile.distill(trained_like, order=2, tol=1.0).system.orders.max()) <= 2


@pytest.mark.parametrize(
    ("taps", "options", "message"),
    [
        (np.ones((2, 9)), {}, "give an order or a tolerance"),
        (np.ones((2, 9)) * 1j, {"order": 1}, "taps are complex128, not real numbers"),
        (torch.ones(2, 9) > 0, {"order": 1}, "taps are torch.bool, not real numbers"),
        (["a", "b"], {"order": 1}, "taps are <U1, not real numbers"),
        ([[1.0, 2.0], [1.0]], {"order": 1}, "taps are no array: their rows differ in length"),
        (np.ones((0, 9)), {"order": 1}, r"taps of shape \[0, 9\] hold no numbers"),
        (3.0, {"order": 1}, r"taps of shape \[\] hold no numbers"),
        (np.ones((2, 9)), {"order": 5}, "order 5 is more than filters of 9 taps can show: 4 at most"),
        (np.ones((2, 9)), {"order": 4, "head": 3}, r"of 9 taps can show beyond a head of 3: 3 at most"),
        (np.ones((2, 9)), {"order": 1, "head": 10}, "a head of 10 taps is longer than the filters: 9 taps"),
        (np.ones((2, 9)), {"order": 1, "head": 0}, "a head of 0 taps: the first tap is always free"),
        (np.ones((2, 9)), {"tol": 0.0}, "tolerance 0 is not positive and finite"),
        (np.ones((2, 9)), {"tol": float("nan")}, "tolerance nan is not positive"),
        (np.array([[1.0, 0.5], [np.nan, 0]]), {"order": 1}, "filter 1 has taps that are NaN or infinite"),
        (np.ones((2, 9)), {"order": 1, "weights": np.ones((3, 5))}, r"weights \(3, 5\) are not a power spectrum"),
        (np.ones((2, 9)), {"order": 1, "weights": np.ones(5) * 1j}, "weights are complex128"),
        (np.random.default_rng(0).normal(size=(2, 40)), {"order": 2, "tol": 1e-3},
         r"is out of reach for 2 of 2 filters: filter \d has error 0\.\d+ at order 2"),
    ],
)  # fmt: skip
def test_refused(taps: object, options: dict, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        lhcompile.distill(taps, **options)


def test_a_summary_is_the_figures_of_its_reduction(trained_like: Tensor) -> None:
    result = reduce(trained_like, tol=0.3)
    found = summarize(result, 256, weighted=False)
    assert (found.filters, found.length, found.norm, found.head, found.method) == (24, 256, "l2", 1, "varpro")
    assert found.order_mean == pytest.approx(float(result.system.orders.double().mean()))
    assert found.each[found.worst_filter].error == found.error_worst == float(result.error.max())
    assert found.ratio == pytest.approx(float(result.error.mean() / result.bound.mean()))
    radius = result.system.poles.abs().amax(1)
    assert [x.radius for x in found.each] == radius.tolist()
    assert found.radius == float(radius.max()) < 1
    nothing = summarize(reduce(torch.zeros(1, 20), 2), 20, weighted=True)
    assert (nothing.ratio, nothing.each[0].ratio, nothing.each[0].cells[3]) == (None, None, "–")
    assert summarize(reduce(torch.ones(1, 20), 0), 20, weighted=True).radius == 0


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def result(trained_like: Tensor) -> Reduction:
    return reduce(trained_like, 3, head=4)


def test_a_file_of_systems_says_all_of_a_reduction(result: Reduction, tmp_path: Path) -> None:
    path = tmp_path / "systems.npz"
    files.write_systems(path, result)
    assert os.listdir(tmp_path) == ["systems.npz"]
    with np.load(path, allow_pickle=False) as stored:
        found = dict(stored)
    assert set(found) == {"poles", "residues", "direct", "head", "error", "bound", "hankel_singular_values"}
    for name, array in found.items():
        whole = getattr(result if hasattr(result, name) else result.system, name)
        assert array.dtype == (np.complex128 if name in ("poles", "residues") else np.float64)
        np.testing.assert_array_equal(array, whole.numpy())
    system = ModalSSM(*(torch.from_numpy(found[name]) for name in ("poles", "residues", "direct")))
    taps = system.taps(256)
    taps[:, 1:4] += torch.from_numpy(found["head"])
    torch.testing.assert_close(taps, result.taps(256), rtol=0, atol=0)
    assert found["head"].shape == (24, 3)


def test_a_file_of_systems_is_replaced_only_by_force(result: Reduction, tmp_path: Path) -> None:
    path, link = tmp_path / "systems.npz", tmp_path / "link.npz"
    files.write_systems(path, result)
    before = path.read_bytes()
    with pytest.raises(DestinationError, match=r"systems\.npz exists; --force replaces a file of systems"):
        files.write_systems(path, result)
    assert path.read_bytes() == before
    link.symlink_to(path)
    files.write_systems(link, result[torch.arange(3)], force=True)
    assert link.is_symlink()
    assert np.load(path)["poles"].shape == (3, 4)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_a_file_of_systems_is_never_replaced(result: Reduction, tmp_path: Path, force: bool) -> None:
    np.savez(tmp_path / "mine.npz", poles=np.ones(3))
    (tmp_path / "text.npz").write_text("years of work")
    (tmp_path / "folder.npz").mkdir()
    for name, message in {
        "mine.npz": "mine.npz is no file of systems; --force will not" if force else "mine.npz exists",
        "text.npz": "text.npz is no file of systems; --force will not" if force else "text.npz exists",
        "folder.npz": "folder.npz is a folder; name a file to write",
        "systems.npy": r"systems\.npy does not end in \.npz",
        "none/systems.npz": "there is no folder .*none",
    }.items():
        before = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}
        with pytest.raises(DestinationError, match=message):
            files.write_systems(tmp_path / name, result, force=force)
        assert {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_half_a_file_is_never_seen(
    result: Reduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "systems.npz"
    files.write_systems(path, result)
    before = path.read_bytes()

    def stopped(number: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises((KeyboardInterrupt, DestinationError), match=r"^$|cannot write .*systems\.npz: No space left"):
        files.write_systems(path, result, force=True)
    assert os.listdir(tmp_path) == ["systems.npz"]
    assert path.read_bytes() == before


def test_someone_who_comes_first_is_not_overwritten(
    result: Reduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "systems.npz"
    monkeypatch.setattr(os, "fsync", lambda number: path.write_text("theirs"))
    with pytest.raises(DestinationError, match="exists"):
        files.write_systems(path, result)
    assert os.listdir(tmp_path) == ["systems.npz"]
    assert path.read_text() == "theirs"


def test_files_of_taps(tmp_path: Path) -> None:
    np.save(tmp_path / "taps.npy", np.arange(6, dtype=np.int32).reshape(2, 3))
    array = files.read_array(tmp_path / "taps.npy")
    assert as_bank(array, "taps").tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    np.savez(tmp_path / "many.npz", taps=array)
    whole = (tmp_path / "taps.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-5])
    for name, reason in {
        "none.npy": "No such file or directory",
        ".": "Is a directory",
        "empty.npy": "it is not an .npy file of numbers",
        "text.npy": "it is not an .npy file of numbers",
        "objects.npy": "it is not an .npy file of numbers",
        "cut.npy": "it is not an .npy file of numbers",
        "many.npz": "it is an archive; give one array as .npy",
    }.items():
        with pytest.raises(ConfigError, match=f"cannot read .*{name}.*: {reason}"):
            files.read_array(tmp_path / name)
