"""Models of continuous signals through the command line: S4D and S4 checkpoints, and a module that users bring."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
import yaml
from commands import contents, done, refused, run
from lhruntime import Session
from stacked_s4 import D_INPUT, D_OUTPUT, KINDS, checkpoint, reference
from torch import Tensor

TOLERANCE = 1e-4
"""Largest |Δ| to the equations in double precision, at outputs of about unit scale."""
CONTEXT = 64
FEATURES = 3
ANY = "factories:Continuous"


def signal(rows: int, time: int, features: int = FEATURES) -> Tensor:
    return torch.randn(rows, time, features, generator=torch.Generator().manual_seed(4))


def worst_difference(directory: Path, expected: Tensor, inputs: Tensor) -> float:
    """Largest |Δ| of a built directory fed whole, in cuts, and position by position (`step`)."""
    rows, time = inputs.shape[:2]
    session = Session.load(directory, batch=rows, threads=1)
    worst = 0.0
    for cuts in ([], [1, 3, 34], [time - 1], range(0, time, 5)):
        session.reset()
        pieces = [
            session.prefill(inputs[:, start:end].numpy()) for start, end in pairwise(sorted({0, *cuts, time}))
        ]
        worst = max(worst, float(np.abs(np.concatenate(pieces, 1) - expected.numpy()).max()))
    session.reset()
    steps = np.stack([session.step(inputs[:, t].numpy()) for t in range(time)], 1)
    return max(worst, float(np.abs(steps - expected.numpy()).max()))


def manifest_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "manifest.json").read_text()))


Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """saved(kind): the checkpoint of one layer of that kind, its configuration beside it."""
    folder = tmp_path_factory.mktemp("saved")

    def save(kind: str) -> Path:
        torch.save(checkpoint(**KINDS[kind], layers=1), folder / f"{kind}.pt")
        options = {name: KINDS[kind][name] for name in ("prenorm", "disc") if name in KINDS[kind]}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(options))
        return folder / f"{kind}.pt"

    return save


@pytest.fixture(scope="module")
def built(saved: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """built(kind): the directory of that checkpoint, built without any option on precision."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            path = saved(kind)
            made[kind] = tmp_path_factory.mktemp(kind) / "out"
            options = ["--config", path.with_suffix(".yaml"), "--context", CONTEXT, "--sequences", 2]
            done("build", path, "-o", made[kind], *options)
        return made[kind]

    return build


@pytest.fixture(scope="module")
def order_4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The module at order 4, calibrated on a file, and the rows that were printed."""
    folder = tmp_path_factory.mktemp("order_4")
    np.save(folder / "signal.npy", signal(1, 400)[0].numpy())
    options = ["--features", FEATURES, "--order", 4, "--calibration", folder / "signal.npy"]
    return folder / "out", done("build", ANY, "-o", folder / "out", *options).rows


# ---- build ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["s4d", "diag", "dplr"])
def test_checkpoints_run_as_their_equations_say(built: Build, kind: str) -> None:
    tensors = checkpoint(**KINDS[kind], layers=1)
    inputs = signal(2, 2 * CONTEXT, D_INPUT)  # a recurrence goes on behind the context it was built for
    expected = reference(tensors, inputs, **KINDS[kind])
    assert 0.3 < float(expected.std()) < 3
    assert worst_difference(built(kind), expected, inputs) <= TOLERANCE


def test_what_a_directory_of_features_says(built: Build) -> None:
    manifest = manifest_of(built("dplr"))
    assert (manifest["inputs"], manifest["outputs"]) == ({"features": "inputs"}, {"values": "outputs"})
    assert manifest["model"]["family"] == "s4-dplr"
    assert "vocab_size" not in manifest["model"]
    assert "tokenizer" not in manifest
    assert [state["kind"] for state in manifest["states"]] == ["modal"]
    assert manifest["fidelity"]["positions"] == 2 * CONTEXT
    assert manifest["fidelity"]["relative_error"] < 1e-5
    report = json.loads((built("dplr") / "report.json").read_text())
    assert report["calibration"] == "white noise of size 1, seed 0"
    assert report["model"]["features"] == D_INPUT
    assert [stage["loss"] for stage in report["stages"]] == [None] * 5
    assert "each position is decoded; the published example averages over time first" in report["notes"]


def test_the_page_speaks_of_errors(built: Build) -> None:
    page = (built("dplr") / "report.html").read_text()
    for text in ("Relative error", "Error by stage", "white noise of size 1, seed 0", "of their size over"):
        assert text in page
    for text in ("Loss rise", "nats", "Top-1", "KL"):
        assert text not in page


def test_an_exact_build_is_the_module(tmp_path: Path) -> None:
    rows = done("build", ANY, "-o", tmp_path / "out", "--features", FEATURES, "--exact", "--sequences", 2).rows
    assert re.fullmatch(r"\d\.\d+e-0[678] of the outputs' size, worst \|Δ\| \S+, 96 held-out positions", rows["error"])
    assert rows["calibration"] == "white noise of size 1, seed 0"
    inputs = signal(3, 48)
    assert worst_difference(tmp_path / "out", factories.Continuous()(inputs).detach(), inputs) <= TOLERANCE


def test_one_order_for_all(order_4: tuple[Path, dict[str, str]]) -> None:
    out, rows = order_4
    manifest = manifest_of(out)
    assert [(x["order_max"], x["filters"]) for x in manifest["distillation"]] == [(4, 4)]
    assert 1e-3 < manifest["fidelity"]["relative_error"] < 0.5
    assert manifest["fidelity"]["positions"] == 4 * 48
    assert rows["calibration"].endswith("signal.npy")
    assert {state["kind"] for state in manifest["states"]} == {"fir", "modal"}


# ---- the other verbs -----------------------------------------------------------------------------------------------


def test_verify_compares_outputs(built: Build, saved: Build, tmp_path: Path) -> None:
    rows = done("verify", built("diag"), "--against", saved("diag"), "--sequences", 2).rows
    assert re.fullmatch(r"\d\.\d+e-0[67] of the outputs' size, worst \|Δ\| \S+, 128 random positions", rows["error"])
    np.save(tmp_path / "signals.npy", signal(4, 50).numpy())
    options = ["--against", saved("diag"), "--calibration", tmp_path / "signals.npy", "--sequences", 2]
    assert done("verify", built("diag"), *options).rows["error"].endswith(" 100 positions")
    assert done("verify", built("diag")).rows["cuts"].startswith("4 ways")


def test_verify_knows_another_model(
    built: Build, saved: Build, order_4: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    changed = checkpoint(**KINDS["s4d"], layers=1)
    changed["s4_layers.0.D"] += 0.1
    torch.save(changed, tmp_path / "changed.pt")
    outcome = run("verify", built("s4d"), "--against", tmp_path / "changed.pt")
    refused(outcome, "onnx: values of 3 × 64 positions differs by", code=3)
    refused(run("verify", order_4[0], "--against", saved("s4d")), "is another model: it has 256 parameters")


def test_bench_and_inspect(built: Build, saved: Build) -> None:
    rows = done("bench", built("s4d"), "--steps", 5, "--prefill-tokens", 20).rows
    assert rows["step"].endswith("90th percentile")
    rows = done("inspect", built("s4d")).rows
    assert re.fullmatch(r"\d\.\d+e-\d+ of the outputs' size, 128 held-out positions", rows["error"])
    rows = done("inspect", saved("s4d"), "--context", CONTEXT).rows
    assert f"{D_INPUT} → {D_OUTPUT} channels, context {CONTEXT}" in rows["model"]
    assert json.loads(done("inspect", saved("s4d"), "--context", CONTEXT, "--json").out)["features"] == D_INPUT


def test_there_is_nothing_to_generate(built: Build) -> None:
    refused(run("generate", built("s4d")), "out is a model of continuous signals: it has no tokens to generate")


# ---- what users get wrong ------------------------------------------------------------------------------------------


def test_a_budget_that_cannot_be_kept(tmp_path: Path) -> None:
    options = ["--features", FEATURES, "--sequences", 2, "--max-order", 1]
    message = r"no order up to 1 keeps the error of the outputs within 0\.1%: the best is \+\d+\.\d+% at mean order"
    refused(run("build", ANY, "-o", tmp_path / "out", *options), message, code=3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((100, 2), np.float32), r"of shape \[100, 2\], expected \[time, 3\] or \[sequences, time, 3\]"),
        (np.zeros(100, np.float32), r"holds an array of shape \[100\], expected \[time, 3\]"),
        (np.zeros((10, 3), np.float32), "gives sequences of 5 positions; calibration needs at least 8"),
        (np.full((100, 3), np.nan, np.float32), "holds NaN or infinite values"),
        (np.zeros((100, 3), np.complex64), "holds complex64; features are real numbers"),
        (np.array([["a"] * 3] * 100, object), r"cannot read features from .*signal\.npy"),
        (None, r"cannot read features from .*signal\.npy: .*; give them as \.npy"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, array: Any, message: str) -> None:
    path = tmp_path / "signal.npy"
    path.write_text("hello, hello, hello") if array is None else np.save(path, array, allow_pickle=True)
    before = contents(tmp_path)
    options = ["--features", FEATURES, "--exact", "--calibration", path]
    refused(run("build", ANY, "-o", tmp_path / "out", *options), message)
    assert contents(tmp_path) == before


def test_options_that_have_no_meaning(saved: Build, tmp_path: Path) -> None:
    refused(
        run("build", saved("s4d"), "-o", tmp_path / "out", "--features", 3),
        "--features goes with package.module:factory; a file says what it takes",
    )
    (tmp_path / "t.json").write_text("{}")
    options = ["--features", FEATURES, "--tokenizer", tmp_path / "t.json"]
    message = "takes features, not text: --tokenizer has no meaning for it"
    refused(run("build", ANY, "-o", tmp_path / "out", *options), message)
    message = "torch.export cannot trace the module at 5 × 44"
    refused(run("build", ANY, "-o", tmp_path / "out", "--features", 5), message)
