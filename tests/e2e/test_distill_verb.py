"""`lhcompile distill`: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from commands import contents, done, refused, run

import lhcompile
from lhcompile.distill import METHODS, files


@pytest.fixture
def taps(tmp_path: Path) -> Path:
    """Twenty filters of 96 taps: two decays and a rough rest, float32."""
    random, time = np.random.default_rng(0), np.arange(96)
    bank = 0.95**time + random.normal(size=(20, 1)) * 0.8**time + 0.02 * random.normal(size=(20, 96)) * 0.97**time
    np.save(tmp_path / "taps.npy", bank.astype(np.float32))
    return tmp_path / "taps.npy"


def test_a_bank_of_filters(taps: Path, tmp_path: Path) -> None:
    outcome = done("distill", taps, "--order", 3, "-o", tmp_path / "systems.npz")
    rows, expected = outcome.rows, lhcompile.distill(np.load(taps), order=3)
    assert rows["filters"] == "20 of 96 taps"
    assert rows["order"] == "mean 3.00, largest 3"
    worst = int(expected.error.argmax())
    mean = f"mean {float(expected.error.mean()):.3g}, worst {float(expected.error.max()):.3g}"
    assert rows["error"] == f"{mean} (filter {worst}); l2 norm of the taps"
    ratio = float(expected.error.mean() / expected.bound.mean())
    below = f"mean {float(expected.bound.mean()):.3g}, which no systems of these orders go below"
    assert rows["bound"] == f"{below}; the error is {ratio:.3g} times that"
    assert re.fullmatch(r"largest modulus 0\.\d+: stable", rows["poles"])
    assert re.fullmatch(r"\d+\.\d\d s, varpro", rows["time"])
    assert rows["written to"] == str(tmp_path / "systems.npz")
    assert "radius" not in outcome.out  # more than 16 filters are not listed
    with np.load(tmp_path / "systems.npz") as stored:
        assert sorted(stored) == sorted(files.arrays(expected))
        np.testing.assert_allclose(stored["error"], expected.error.numpy(), rtol=1e-4)
    assert sorted(os.listdir(tmp_path)) == ["systems.npz", "taps.npy"]


def test_few_filters_are_listed(taps: Path) -> None:
    np.save(taps, np.load(taps)[:12].reshape(3, 4, 96))
    outcome = done("distill", taps, "--tol", 0.2, "--method", "hankel", "--head", 2)
    assert outcome.rows["note"] == "shape [3, 4, 96] is taken as 12 filters"
    assert outcome.rows["order"].endswith(", beside a head of 2 taps")
    head, *listed = outcome.out.splitlines()[-13:]
    assert head.split() == ["filter", "order", "error", "bound", "error", "/", "bound", "radius"]
    expected = lhcompile.distill(np.load(taps), tol=0.2, method="hankel", head=2)
    assert len(set(expected.system.orders.tolist())) > 1
    for index, line in enumerate(listed):
        number, order, error, bound, ratio, radius = line.split()
        assert (int(number), int(order)) == (index, int(expected.system.orders[index]))
        assert float(error) == pytest.approx(float(expected.error[index]), rel=1e-2)
        assert float(ratio) == pytest.approx(float(error) / float(bound), rel=2e-2)
        assert 0 < float(radius) < 1


def test_one_filter_heard_through_a_spectrum(taps: Path, tmp_path: Path) -> None:
    np.save(taps, np.load(taps)[5].astype(np.float16))
    np.save(tmp_path / "heard.npy", np.linspace(5, 0.1, 33))
    outcome = done("distill", taps, "--order", 2, "--weights", tmp_path / "heard.npy", "--json")
    found = json.loads(outcome.out)
    expected = lhcompile.distill(np.load(taps), order=2, weights=np.load(tmp_path / "heard.npy"))
    assert (found["filters"], found["length"], found["norm"], found["method"]) == (1, 96, "heard", "varpro")
    assert found["each"][0]["order"] == found["order_largest"] == 2
    assert found["error_mean"] == pytest.approx(float(expected.error), rel=1e-4)
    assert found["each"][0]["radius"] == found["radius"] < 1
    plain = lhcompile.distill(np.load(taps), order=2)
    assert float(expected.error) != pytest.approx(float(plain.error), rel=1e-2)


def test_a_file_of_systems_is_replaced_only_by_force(taps: Path, tmp_path: Path) -> None:
    out = tmp_path / "systems.npz"
    done("distill", taps, "--order", 1, "-o", out)
    before = contents(tmp_path)
    refused(run("distill", taps, "--order", 2, "-o", out), r"systems\.npz exists; --force replaces a file of systems")
    refused(run("distill", tmp_path / "none.npy", "--order", 2, "-o", out), r"systems\.npz exists")  # asked first
    refused(run("distill", taps, "--order", 2, "-o", taps, "--force"), r"taps\.npy does not end in \.npz")
    assert contents(tmp_path) == before
    done("distill", taps, "--order", 4, "-o", out, "--force")
    assert np.load(out)["poles"].shape == (20, 4)


def test_an_interruption_leaves_nothing(taps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    before = contents(tmp_path)
    outcome = run("distill", taps, "--order", 1, "-o", tmp_path / "systems.npz")
    refused(outcome, "interrupted; nothing was written", code=130)
    assert contents(tmp_path) == before


BAD: dict[str, np.ndarray] = {
    "nan": np.array([[1.0, 0.5, 0.2], [1.0, np.nan, 0.2]]),
    "complex": np.ones((2, 9), np.complex64),
    "text": np.array(["a", "b"]),
    "empty": np.ones((3, 0)),
    "grows": 1.1 ** np.arange(64.0)[None],
    "spectra": np.ones((7, 5)),
    "negative": -np.ones((20, 5)),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["taps"], "give --order N for every filter, or --tol X, the error each may have"),
        (["taps", "--order", 2, "--tol", 0.1], "--order and --tol exclude each other"),
        (["none", "--order", 2], r"cannot read .*none\.npy: No such file or directory"),
        (["nan", "--order", 1], "filter 1 has taps that are NaN or infinite"),
        (["complex", "--order", 2], "taps are complex64, not real numbers"),
        (["text", "--order", 2], "taps are <U1, not real numbers"),
        (["empty", "--order", 2], r"taps of shape \[3, 0\] hold no numbers"),
        (["grows", "--order", 2], "filter 0 grows: each quarter of its taps"),
        (["taps", "--order", -1], "order -1 is negative"),
        (["taps", "--order", 48], "order 48 is more than filters of 96 taps can show: 47 at most"),
        (["taps", "--order", 47, "--head", 4], "of 96 taps can show beyond a head of 4: 46 at most"),
        (["taps", "--order", 1, "--head", 97], "a head of 97 taps is longer than the filters: 96 taps"),
        (["taps", "--order", "two"], r"'--order': .*integer.*; see lhcompile distill --help"),
        (["taps", "--tol", 1e-9, "--method", "hankel"], r"tolerance 1e-09 is out of reach for \d+ of 20 filters: "
         r"filter \d+ has error \d\S+ at order 47"),
        (["taps", "--tol", -1], "tolerance -1 is not positive"),
        (["taps", "--order", 2, "--method", "magic"], "no distillation method 'magic'; there are hankel, varpro, "),
        (["taps", "--order", 2, "--weights", "spectra"], r"weights \(7, 5\) are not a power spectrum"),
        (["taps", "--order", 2, "--weights", "negative"], "the weights of filter 0 are not a finite power spectrum"),
        (["taps", "--order", 2, "--weights", "none"], r"cannot read .*none\.npy: No such file"),
        (["taps", "--order", 2, "-o", "none/systems.npz"], "there is no folder .*none"),
    ],
)  # fmt: skip
def test_refused(taps: Path, tmp_path: Path, arguments: list[object], message: str) -> None:
    for name, array in BAD.items():
        np.save(tmp_path / f"{name}.npy", array)
    before = contents(tmp_path)
    names = {name: tmp_path / f"{name}.npy" for name in ("taps", "none", *BAD)}
    places = {"none/systems.npz": tmp_path / "none/systems.npz"}
    refused(run("distill", *((names | places).get(str(x), x) for x in arguments)), message)
    assert contents(tmp_path) == before


def test_help_names_every_method() -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done("distill", "--help").out).split())
    assert all(re.search(rf"\b{method}\b", shown) for method in METHODS)
    assert "Give --order or --tol." in shown
    assert "Taps, filters × length, h_0 first" in shown
