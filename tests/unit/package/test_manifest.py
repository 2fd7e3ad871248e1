"""manifest.json is read strictly, and every refusal is one line that names the entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lhcompile.errors import LhcompileError
from lhcompile.package import Manifest, PackageError, read_manifest

DOCUMENTED: dict[str, Any] = {
    "format": "lhcompile",
    "format_version": 1,
    "lhcompile_version": "0.1.0",
    "target": "cpu",
    "model": {"family": "safari-hyena", "vocab_size": 256, "context_length": 1024, "parameters": 6896640},
    "tokenizer": {"kind": "bytes"},
    "graphs": {"step": {"file": "step.onnx"}, "prefill": {"file": "prefill.onnx"}},
    "inputs": {"tokens": "input_ids"},
    "outputs": {"logits": "logits"},
    "states": [
        {
            "input": "past_key_values.0.conv_state",
            "output": "present.0.conv_state",
            "shape": ["batch", 768, 2],
            "dtype": "float32",
            "kind": "fir",
            "module": "backbone.layers.0.mixer.short_filter",
        }
    ],
    "distillation": [
        {
            "module": "backbone.layers.0.mixer.filter_fn",
            "method": "hankel",
            "filters": 256,
            "order_max": 8,
            "order_mean": 5.1,
            "tap_error": 0.44,
            "hankel_bound": 0.40,
        }
    ],
    "fidelity": {
        "tokens": 32768,
        "loss_reference": 1.08,
        "loss_compiled": 1.08,
        "kl_mean": 1e-4,
        "top1_agreement": 0.999,
    },
    "timings": {"load": 0.2, "capture": 8.0, "distill": 5.1, "lower": 4.0, "verify": 3.0},
    "files": {
        "step.onnx": {"sha256": "0" * 64, "bytes": 123},
        "prefill.onnx": {"sha256": "1" * 64, "bytes": 456},
    },
}


def _with(*path: Any, value: Any) -> dict[str, Any]:
    """A copy of the documented manifest with one entry changed or added."""
    document = json.loads(json.dumps(DOCUMENTED))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


def _read(directory: Path, document: Any) -> Manifest:
    (directory / "manifest.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return read_manifest(directory)


def test_the_documented_manifest_is_read_and_written_unchanged(tmp_path: Path) -> None:
    manifest = _read(tmp_path, DOCUMENTED)
    assert manifest.states[0].shape == ["batch", 768, 2]
    assert json.loads(manifest.to_json()) == DOCUMENTED


def test_a_feature_model_has_features_and_values(tmp_path: Path) -> None:
    document = _with("inputs", value={"features": "inputs"})
    document["outputs"] = {"values": "outputs"}
    document["fidelity"] = {"positions": 4096, "relative_error": 1e-6, "max_difference": 1e-5}
    del document["model"]["vocab_size"], document["tokenizer"]
    manifest = _read(tmp_path, document)
    assert manifest.inputs.features == "inputs"
    assert json.loads(manifest.to_json()) == document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (_with("format", value="other"), "format: is 'other'; this version reads lhcompile manifests of"),
        (_with("format_version", value=2), "format_version: is 2; this version reads lhcompile manifests"),
        (_with("surprise", value=1), "surprise: Extra inputs are not permitted"),
        (_with("model", "depth", value=1), "model.depth: Extra inputs are not permitted"),
        (_with("model", "parameters", value="7"), "model.parameters: Input should be a valid integer"),
        (_with("model", "vocab_size", value=None), "a token model needs model.vocab_size"),
        (_with("inputs", value={}), "a model goes from tokens to logits or from features to values"),
        (_with("outputs", value={"values": "y"}), "a model goes from tokens to logits or"),
        (_with("graphs", "step", "file", value="../step.onnx"), "'../step.onnx' is not a file inside"),
        (_with("graphs", "step", "file", value="/etc/passwd"), "'/etc/passwd' is not a file inside"),
        (_with("graphs", "step", "file", value="other.onnx"), "other.onnx is named but not listed in files"),
        (_with("files", "step.onnx", "sha256", value="abc"), "files.step.onnx.sha256: String should match"),
        (_with("states", 0, "shape", value=[1, 768, 2]), "needs exactly one axis named batch"),
        (_with("states", 0, "output", value="past_key_values.0.conv_state"), "two states share the name"),
        (_with("fidelity", "top1_agreement", value=1.5), "Input should be less than or equal to 1"),
        ("{", "Invalid JSON"),
        ('{"format": "lhcompile"}', "lhcompile_version: Field required (and 6 more)"),
        ({k: v for k, v in DOCUMENTED.items() if k != "format"}, "format_version and files must all be"),
        (json.dumps(DOCUMENTED).replace("5.1", "NaN"), "Input should be a finite number"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(PackageError) as caught:
        _read(tmp_path, document)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(LhcompileError, match=r"is not a built directory: cannot read manifest\.json"):
        read_manifest(tmp_path)


def test_a_figure_that_is_not_finite_is_refused_before_it_is_written() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Manifest.model_validate(_with("fidelity", "kl_mean", value=float("nan")))
