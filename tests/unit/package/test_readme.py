"""The loops that are shown to newcomers run as they are printed, on a small built directory."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lhcompile.package import Manifest, package

ROOT = Path(__file__).parents[3]


def _running_sum_model() -> bytes:
    """logits = W · Σ_{j ≤ t} E[token_j]; the state is the sum so far, [batch, 6]."""
    random = np.random.default_rng(0)
    weights = {
        "E": random.standard_normal((256, 6)).astype(np.float32),
        "W": random.standard_normal((6, 256)).astype(np.float32),
        "time": np.array([1], np.int64),
        "last": np.array(-1, np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["E", "input_ids"], ["embedded"]),
        helper.make_node("CumSum", ["embedded", "time"], ["sums"]),
        helper.make_node("Unsqueeze", ["past.sum", "time"], ["before"]),
        helper.make_node("Add", ["sums", "before"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "W"], ["logits"]),
        helper.make_node("Gather", ["hidden", "last"], ["present.sum"], axis=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "sum",
        [
            value("input_ids", TensorProto.INT64, ["batch", "seq"]),
            value("past.sum", TensorProto.FLOAT, ["batch", 6]),
        ],
        [
            value("logits", TensorProto.FLOAT, ["batch", "seq", 256]),
            value("present.sum", TensorProto.FLOAT, ["batch", 6]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = Manifest.model_validate(
        {
            "lhcompile_version": "0.1.0",
            "target": "portable",
            "model": {"family": "toy", "vocab_size": 256, "context_length": 64, "parameters": 3072},
            "tokenizer": {"kind": "bytes"},
            "graphs": {"step": {"file": "step.onnx"}, "prefill": {"file": "prefill.onnx"}},
            "inputs": {"tokens": "input_ids"},
            "outputs": {"logits": "logits"},
            "states": [
                {
                    "input": "past.sum",
                    "output": "present.sum",
                    "shape": ["batch", 6],
                    "dtype": "float32",
                    "kind": "sum",
                    "module": "sum",
                }
            ],
        }
    )
    model = _running_sum_model()
    out = tmp_path_factory.mktemp("readme") / "out"
    return package(out, {"step.onnx": model, "prefill.onnx": model}, manifest, force=False)


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _readme() -> list[str]:
    """The Python of the README, block by block."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_the_loop_in_the_readme_runs(built: Path) -> None:
    assert len(_readme()) == 2
    assert _run("-c", _readme()[0], cwd=built.parent).startswith("import ")


def test_filters_are_distilled_as_in_the_readme(tmp_path: Path) -> None:
    time = np.arange(64)
    np.save(tmp_path / "taps.npy", [0.9**time, 0.8**time * np.cos(time) + 0.5 ** (time + 1)])
    shown = _run("-c", _readme()[1], cwd=tmp_path)
    error, bound, difference = re.fullmatch(r"error (\S+), bound (\S+)\nlargest difference (\S+)\n", shown).groups()  # type: ignore[union-attr]
    assert 0 <= float(bound) <= float(error) < 1e-6
    assert float(difference) < 1e-6


def test_the_example_generates_the_same_text_for_the_same_seed(built: Path) -> None:
    script = str(ROOT / "examples/pysource/generate.py")
    options = ["--tokens", "40", "--prompt", "x = "]
    first = _run(script, str(built), *options, "--seed", "1", cwd=built.parent)
    assert first.startswith("x = ")
    assert first == _run(script, str(built), *options, "--seed", "1", cwd=built.parent)
    assert first != _run(script, str(built), *options, "--seed", "2", cwd=built.parent)


def test_reading_at_once_equals_reading_token_by_token(built: Path) -> None:
    decoder = runpy.run_path(str(ROOT / "examples/pysource/generate.py"))["Decoder"]
    prompt = list(b"import os")
    whole, steps = decoder(built), decoder(built)
    at_once = whole.read(prompt)
    one_by_one = [steps.read([token]) for token in prompt][-1]
    np.testing.assert_allclose(at_once, one_by_one, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.read([10]), steps.read([10]), rtol=1e-5, atol=1e-5)
