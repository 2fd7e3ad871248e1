"""Every verb through the entry point, on tiny random models in each of the forms that users bring."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from commands import done, run
from factories import hyena
from lhruntime import Session
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from lhcompile.load.safari import HyenaLM

STAGES = [
    "load", "capture", "recognize", "calibrate", "distill", "streamify", "lower", "quantize", "compare", "verify",
    "package",
]  # fmt: skip
WRITTEN = {"manifest.json", "prefill.onnx", "report.html", "report.json", "step.onnx"}
GENAI = {"genai_config.json", "genai_pack.onnx", "genai_unpack.onnx"}
BYTES = {"tokenizer.json", "tokenizer_config.json"}
"""What onnxruntime-genai reads where it takes states packed, and of a byte model."""
TOLERANCE = 1e-3
"""Largest |Δlogit| an exact build may have, at logits of unit scale."""


def manifest_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "manifest.json").read_text()))


def report_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "report.json").read_text()))


def worst_difference(directory: Path, module: nn.Module, vocabulary: int, length: int) -> float:
    """Largest |Δlogit| between a built directory and a module on batch 3, over the whole length in several cuts."""
    tokens = torch.randint(0, vocabulary, (3, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = module(tokens).numpy()
    assert 0.3 < expected.std() < 3
    session = Session.load(directory, batch=3, threads=1)
    worst = 0.0
    for cuts in ([], range(1, length), [1, 3, 34], [length - 1], range(0, length, 5)):
        session.reset()
        ends = sorted({0, *cuts, length})
        pieces = [session.prefill(tokens[:, start:end].numpy()) for start, end in pairwise(ends)]
        worst = max(worst, float(np.abs(np.concatenate(pieces, 1) - expected).max()))
    return worst


@pytest.fixture(scope="module")
def exact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], str]:
    """An exact build, calibrated on what the model says itself; the rows it printed, and its stderr."""
    out = tmp_path_factory.mktemp("exact") / "deep" / "out"
    outcome = done("build", checkpoint, "-o", out, "--exact", "--sequences", 2, "--seed", 3)
    return out, outcome.rows, outcome.err


# ---- build ---------------------------------------------------------------------------------------------------------


def test_an_exact_build_says_what_it_did(exact: tuple[Path, dict[str, str], str]) -> None:
    out, rows, stages = exact
    assert {path.name for path in out.iterdir()} == WRITTEN | GENAI | BYTES
    assert re.findall(r"✓ (\w+) +\d+\.\d s", stages) == STAGES
    assert re.fullmatch(r"\d+\.\d{5} nats per token, 126 held-out tokens", rows["loss, reference"])
    assert rows["loss, compiled"].endswith("(+0.000%)")
    assert re.fullmatch(r"KL \S+ nats, top-1 100.00%, worst \|Δlogit\| \d\S*", rows["agreement"])
    assert "order" not in rows
    assert rows["state"] == "8.832 KB per sequence"
    assert re.fullmatch(r"\d+ nodes, \d+\.\d per layer", rows["step graph"])
    assert re.fullmatch(r"step\.onnx \S+ KB, prefill\.onnx \S+ KB", rows["files"])
    assert rows["written to"] == f"{out}  (report: {out / 'report.html'})"
    kinds = [(state["kind"], state["shape"]) for state in manifest_of(out)["states"]]
    assert kinds == [("fir", ["batch", 2, 48]), ("long_conv", ["batch", 63, 16])] * 2
    assert report_of(out)["budget"] is None
    assert report_of(out)["command"].startswith("lhcompile build ")


def test_an_exact_build_is_the_module(exact: tuple[Path, dict[str, str], str], bytes_model: HyenaLM) -> None:
    assert worst_difference(exact[0], bytes_model, 256, 64) <= TOLERANCE


def test_one_order_for_all(order_4: Path) -> None:
    manifest, report = manifest_of(order_4), report_of(order_4)
    assert manifest["target"] == "cpu"
    assert [(x["order_max"], x["order_mean"]) for x in manifest["distillation"]] == [(4, 4.0)] * 2
    assert manifest["model"] == {
        "family": "safari-hyena",
        "vocab_size": 256,
        "context_length": 64,
        "parameters": 11456,
    }
    assert manifest["tokenizer"] == {"kind": "bytes"}
    assert manifest["fidelity"]["tokens"] == 4 * 63
    assert set(manifest["timings"]) == {*STAGES} - {"package"}
    assert report["budget"] is None
    assert [stage["name"] for stage in report["stages"]] == ["reference", "captured", "distilled", "streamed", "onnx"]


def test_the_default_is_the_smallest_order_within_a_thousandth(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    options = ["--calibration", text, "--sequences", 4, "--target", "portable"]
    rows = done("build", checkpoint, "-o", tmp_path / "out", *options).rows
    budget = report_of(tmp_path / "out")["budget"]
    assert budget["requested"] == 0.001
    order = min(trial["order"] for trial in budget["orders"] if trial["expected"] <= 0.001)
    assert all(trial["expected"] > 0.001 for trial in budget["orders"] if trial["order"] < order)
    assert rows["order"].startswith(f"mean {order:.2f}, largest ")
    assert manifest_of(tmp_path / "out")["target"] == "portable"


def test_a_budget_and_a_tokenizer(tmp_path: Path) -> None:
    torch.save(hyena(vocabulary=50).state_dict(), tmp_path / "words.pt")
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text(" ".join(f"w{i * i % 50}" for i in range(400)))
    options = ["--tokenizer", tmp_path / "tokenizer.json", "--calibration", tmp_path / "text"]
    done("build", tmp_path / "words.pt", "-o", tmp_path / "out", *options, "--budget", 0.05, "--sequences", 2)
    manifest = manifest_of(tmp_path / "out")
    assert report_of(tmp_path / "out")["budget"]["requested"] == 0.05
    assert manifest["tokenizer"] == {"kind": "tokenizers", "file": "tokenizer.json"}
    assert "tokenizer.json" in manifest["files"]
    written = done("generate", tmp_path / "out", "--prompt", "w3 w4", "-n", 6, "--seed", 1).out
    assert re.fullmatch(r"w3 w4( ?w\d+){6}\n", written)


def test_a_factorys_module_kept_whole(tmp_path: Path) -> None:
    """Weight-tied heads under a name of the user's, no context given: it is found by trying."""
    torch.manual_seed(1)
    model = factories.Language().eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "heads.ckpt")
    np.save(tmp_path / "ids.npy", np.arange(500) ** 2 % factories.VOCAB)
    options = ["--checkpoint", tmp_path / "heads.ckpt", "--exact", "--calibration", tmp_path / "ids.npy"]
    done("build", "factories:Language", "-o", tmp_path / "out", *options)
    manifest = manifest_of(tmp_path / "out")
    assert manifest["model"]["family"] == "module"
    assert manifest["model"]["context_length"] == factories.LENGTH
    assert manifest["tokenizer"] == {"kind": "none"}
    assert worst_difference(tmp_path / "out", model, factories.VOCAB, factories.LENGTH) <= TOLERANCE

    written = done("generate", tmp_path / "out", "--prompt", "1 2 3", "-n", 5, "--seed", 1).out.split()
    assert written[:3] == ["1", "2", "3"]
    assert len(written) == 8
    assert all(0 <= int(token) < factories.VOCAB for token in written)


def test_a_factorys_module_at_order_8(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = factories.Language(width=12, layers=1, heads=3).eval()
    torch.save(model.state_dict(), tmp_path / "heads.pt")
    (tmp_path / "sizes.yaml").write_text("{width: 12, layers: 1, heads: 3}")
    options = ["--checkpoint", tmp_path / "heads.pt", "--config", tmp_path / "sizes.yaml", "--order", 8]
    done("build", "factories:Language", "-o", tmp_path / "out", *options, "--sequences", 2)
    manifest = manifest_of(tmp_path / "out")
    (layer,) = manifest["distillation"]
    assert (layer["module"], layer["filters"], layer["order_max"]) == ("mixers.0", 3, 8)
    modal = [state["shape"] for state in manifest["states"] if state["kind"] == "modal"]
    assert modal == [["batch", 8, 3 * 4 * 4]]
    assert report_of(tmp_path / "out")["stages"][-1]["kl_mean"] < 1e-2


def test_an_archive(bytes_model: HyenaLM, text: Path, tmp_path: Path) -> None:
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=64)},)
    ids = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(3))
    torch.export.save(torch.export.export(bytes_model, (ids,), dynamic_shapes=dims), tmp_path / "model.pt2")
    done("build", tmp_path / "model.pt2", "-o", tmp_path / "out", "--exact", "--calibration", text, "--sequences", 2)
    assert manifest_of(tmp_path / "out")["model"]["family"] == "export"
    assert manifest_of(tmp_path / "out")["model"]["context_length"] == 64
    assert worst_difference(tmp_path / "out", bytes_model, 256, 64) <= TOLERANCE


def test_force_replaces_a_build_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done("build", "factories:Tiny", "-o", out, "--order", 2, "--sequences", 2)
    (out / "mine.txt").write_text("left here")
    first = manifest_of(out)
    done("build", "factories:Tiny", "-o", out, "--order", 4, "--sequences", 2, "--force")
    assert {path.name for path in out.iterdir()} == WRITTEN | GENAI
    assert manifest_of(out)["distillation"] != first["distillation"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- inspect -------------------------------------------------------------------------------------------------------


def test_inspect_a_model(checkpoint: Path) -> None:
    shown = done("inspect", checkpoint)
    assert shown.rows["model"] == "safari-hyena, 11,456 parameters, vocabulary 256, context 64"
    assert shown.rows["memory"] == "8.832 KB of state per sequence if built --exact"
    assert shown.rows["note"].startswith("assumed, as neither file says otherwise: ")
    table = [line.split() for line in shown.out.splitlines() if "backbone" in line]
    short = ["short", "48", "48", "3", "384", "B"]
    long = ["long", "16", "16", "64", "4.032", "KB"]
    names = [f"backbone.layers.{i}.mixer{end}" for i in (0, 1) for end in (".short_filter", "")]
    assert table == [[name, *row] for name, row in zip(names, (short, long) * 2, strict=True)]

    found = json.loads(done("inspect", checkpoint, "--json").out)
    assert (found["family"], found["context_length"], found["vocab_size"]) == ("safari-hyena", 64, 256)
    assert [layer["taps"] for layer in found["layers"]] == [3, 64, 3, 64]


def test_inspect_with_options(checkpoint: Path, tmp_path: Path) -> None:
    assert done("inspect", checkpoint, "--context", 32).rows["model"].endswith("context 32")
    (tmp_path / "sizes.yaml").write_text("{layers: 3}")
    shown = done("inspect", "factories:Language", "--config", tmp_path / "sizes.yaml")
    assert shown.rows["note"] == "no checkpoint was given: the weights are the factory's own"
    heads = [line.split() for line in shown.out.splitlines() if " long " in line]
    assert heads == [[f"mixers.{i}", "long", "2", "128", "48", "24.06", "KB"] for i in range(3)]


def test_inspect_a_built_directory(order_4: Path) -> None:
    shown = done("inspect", order_4)
    assert shown.rows["model"] == "safari-hyena, 11,456 parameters, context 64"
    assert re.fullmatch(r"cpu, built by lhcompile \d+\.\d+\.\d+", shown.rows["target"])
    loss = r"\d+\.\d{5} nats per token, of the source \d+\.\d{5}, 252 held-out tokens"
    assert re.fullmatch(loss, shown.rows["loss"])
    assert shown.rows["states"] == "4"
    assert shown.rows["files"].endswith("; checksums match")
    layers = [line.split()[:4] for line in shown.out.splitlines() if line.startswith("backbone")]
    assert layers == [[f"backbone.layers.{i}.mixer", "varpro", "16", "4.00"] for i in (0, 1)]
    assert json.loads(done("inspect", order_4, "--json").out) == manifest_of(order_4)


# ---- verify --------------------------------------------------------------------------------------------------------


def test_verify_a_directory_alone(order_4: Path) -> None:
    assert done("verify", order_4).rows == {
        "files": "7 checksums match",
        "cuts": "4 ways of feeding a sequence agree, outputs and states",
    }


def test_verify_against_the_source(order_4: Path, checkpoint: Path, text: Path) -> None:
    rows = done("verify", order_4, "--against", checkpoint, "--calibration", text, "--sequences", 4).rows
    recorded = manifest_of(order_4)["fidelity"]
    assert rows["loss, source"] == f"{recorded['loss_reference']:.5f} nats per token, 252 tokens"
    assert rows["loss, compiled"].startswith(f"{recorded['loss_compiled']:.5f}  (")
    assert re.fullmatch(r"KL \S+ nats, top-1 \d+\.\d\d%, worst \|Δlogit\| \S+", rows["agreement"])
    random = done("verify", order_4, "--against", checkpoint, "--sequences", 2).rows
    assert random["loss, source"].endswith(" nats per token, 126 random tokens")


def test_verify_holds_an_exact_build_to_its_own_source(
    exact: tuple[Path, dict[str, str], str], checkpoint: Path, tmp_path: Path
) -> None:
    rows = done("verify", exact[0], "--against", checkpoint, "--sequences", 2).rows
    assert rows["loss, compiled"].endswith("(+0.000%)")
    torch.save(hyena(seed=1).state_dict(), tmp_path / "other.pt")
    other = run("verify", exact[0], "--against", tmp_path / "other.pt")
    assert other.code == 3
    assert re.fullmatch(r"error: onnx: logits of 3 × 64 tokens differs by \S+ where \S+ is allowed .*\n", other.err)


# ---- generate ------------------------------------------------------------------------------------------------------


def test_generate_is_decided_by_its_seed(order_4: Path) -> None:
    command = ["generate", order_4, "--prompt", "def f", "-n", 30]
    first = done(*command, "--seed", 1).out
    assert first.startswith("def f")
    assert first == done(*command, "--seed", 1).out
    assert first != done(*command, "--seed", 2).out
    narrowed = done(*command, "--seed", 1, "--top-k", 5, "--top-p", 0.9).out
    assert narrowed != first
    assert done(*command, "--seed", 1, "--top-k", 1).out == done(*command, "--temperature", 0).out


def test_generate_at_temperature_0_takes_the_likeliest(order_4: Path) -> None:
    session = Session.load(order_4)
    tokens = list(b"import ")
    logits = session.prefill(np.array(tokens))[0, -1]
    for _ in range(20):
        tokens.append(int(logits.argmax()))
        logits = session.step(np.array([tokens[-1]]))[0]
    expected = bytes(tokens).decode(errors="replace") + "\n"
    assert done("generate", order_4, "--temperature", 0, "--max-new-tokens", 20).out == expected


# ---- bench ---------------------------------------------------------------------------------------------------------


def test_bench(order_4: Path) -> None:
    options = ["--batch", 2, "--steps", 20, "--prefill-tokens", 50, "--threads", 1]
    found = json.loads(done("bench", order_4, *options, "--json").out)
    assert (found["batch"], found["threads"], found["prefill_tokens"]) == (2, 1, 50)
    assert 0 < found["step_ms"] <= found["step_ms_p90"]
    assert found["tokens_per_second"] == pytest.approx(2e3 / found["step_ms"])
    assert found["prefill_tokens_per_second"] > 0
    assert found["state_bytes"] == 4 * 2 * (2 * 48 + 4 * 16)
    assert found["file_bytes"] == {name: (order_4 / name).stat().st_size for name in ("prefill.onnx", "step.onnx")}

    rows = done("bench", order_4, *options).rows
    assert re.fullmatch(r"\d+\.\d{3} ms median, \d+\.\d{3} ms 90th percentile", rows["step"])
    assert re.fullmatch(r"[\d,]+ tokens/s at batch 2", rows["decode"])
    assert re.fullmatch(r"[\d,]+ tokens/s \(50 tokens at once\)", rows["prefill"])
    assert rows["state"] == "1.28 KB per sequence"


# ---- the console script --------------------------------------------------------------------------------------------


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lhcompile"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, encoding="utf-8")


def test_the_console_script(order_4: Path, tmp_path: Path) -> None:
    written = script("generate", order_4, "--seed", 1, "-n", 30)
    expected = done("generate", order_4, "--seed", 1, "-n", 30).out
    assert (written.returncode, written.stdout, written.stderr) == (0, expected, "")
    failed = script("build", tmp_path / "none.pt", "-o", tmp_path / "out")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == f"error: {tmp_path}/none.pt: the checkpoint does not exist\n"
    assert list(tmp_path.iterdir()) == []


def test_help() -> None:
    for arguments in ([], ["--help"]):
        shown = done(*arguments).out
        assert all(verb in shown for verb in ("build", "inspect", "verify", "distill", "generate", "bench"))
