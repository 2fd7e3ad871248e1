"""Peers of the decoding benchmarks compute what they stand for, and the benchmarks write what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import decode_onnx
from bench.decode_cuda import fitting, sweep
from bench.decode_model import TINY
from bench.decode_timing import Rates, is_full
from bench.decode_torch import Attention, Convolution, Decoder, Mixer, Recurrence, Weights, leave, leave_fused

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
BATCH, TIME = 3, 24


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(TINY, CPU, torch.float32)


def _logits(weights: Weights, mixer: Mixer, tokens: Tensor) -> Tensor:
    """tokens [batch, time], fed one by one → [batch, time, vocabulary]"""
    decoder = Decoder(weights, mixer, len(tokens))
    found = []
    for position, column in enumerate(tokens.T):
        if hasattr(mixer, "position"):
            mixer.position = position
        decoder.tokens.copy_(column)
        found.append(decoder.logits_of(decoder.hidden()))
    return torch.stack(found, 1)


def _tokens() -> Tensor:
    return torch.randint(TINY.vocabulary, (BATCH, TIME), generator=torch.Generator().manual_seed(5))


def test_the_kept_convolution_is_the_recurrence(weights: Weights) -> None:
    tokens = _tokens()
    kept = _logits(weights, Convolution(weights, BATCH, TIME), tokens)
    distilled = _logits(weights, Recurrence(weights, BATCH), tokens)
    torch.testing.assert_close(kept, distilled, rtol=1e-4, atol=1e-4)
    assert (kept[:, 1:] - kept[:, :-1]).abs().max() > 0.1  # the past matters


def test_the_cache_gives_causal_attention(weights: Weights) -> None:
    tokens = _tokens()
    found = _logits(weights, Attention(weights, BATCH, TIME), tokens)
    width = TINY.width
    x = weights.embedding[tokens]
    for into, out, up, down in weights.layers:
        parts = F.linear(F.layer_norm(x, (width,)), into).view(BATCH, TIME, 3, TINY.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(heard, out)
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,)), up), approximate="tanh"), down)
    expected = F.linear(F.layer_norm(x, (width,)), weights.embedding)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # the fused GELU is the exact one on a CPU


def test_the_fused_block_is_the_block(weights: Weights) -> None:
    x, mixed = torch.randn(2, 5, TINY.width, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, TINY.inner)
    arguments = (mixed, weights.scale, weights.shift, bias, *weights.layers[0][1:])
    torch.testing.assert_close(leave_fused(x.clone(), *arguments), leave(x, *arguments), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [32, 4])
def test_the_graph_of_the_transformer_reads_its_cache(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "model.onnx"
    decode_onnx.write(TINY, path, bits)
    stepwise, anew = (decode_onnx.Graph(path, TIME, threads=1, position=0) for _ in range(2))
    tokens = _tokens()[0].numpy()
    for position, token in enumerate(tokens):
        for graph in (stepwise, anew):
            graph.place(position)
            graph.tokens[0, 0] = token
            graph.step()
    first, again = (graph.logits.copy() for graph in (stepwise, anew))
    np.testing.assert_array_equal(first, again)
    whole = _at_once(path, tokens)
    np.testing.assert_allclose(first[0, 0], whole, rtol=1e-3, atol=1e-3)
    anew.caches[0][0][:] = 0
    anew.step()
    assert np.abs(anew.logits - first).max() > 1e-2


def _at_once(path: Path, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The logits behind all tokens, fed in one call."""
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        "input_ids": tokens[None],
        "seqlens_k": np.array([len(tokens) - 1], np.int32),
        "total": np.array([len(tokens)], np.int32),
    }
    for value in session.get_inputs()[3:]:
        feeds[value.name] = np.zeros((1, TINY.heads, len(tokens), TINY.width // TINY.heads), np.float32)
    logits: np.ndarray[Any, np.dtype[np.float32]] = session.run(["logits"], feeds)[0][0, -1]
    return logits


def test_llama_forgets_its_steps(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the extra bench is not installed")
    from bench import decode_llama

    decode_llama.write(TINY, tmp_path / "model.gguf", "f32", positions=64)
    system = decode_llama.Llama(tmp_path / "model.gguf", context=32, threads=1, group=4)

    def logits(*tokens: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        found = [system.logits(token).copy() for token in tokens]
        system.rewind()
        return found[-1]

    first = logits(7, 8, 9)
    np.testing.assert_array_equal(logits(7, 8, 9), first)
    assert np.abs(logits(300, 8, 9) - first).max() > 1e-3
    assert system.cache_bytes == 2 * 2 * TINY.layers * TINY.width * 32


def test_a_sweep_ends_where_memory_or_the_rate_does() -> None:
    def measure(batch: int) -> dict[str, Any]:
        if batch > 1024:
            raise RuntimeError("during capture") from torch.OutOfMemoryError("no room")
        return {"seconds": 1.0, "floor_seconds": 0.5}

    saved: list[list[int]] = []
    sweep(measure, [1, 512, 1024, 2048, 4096], lambda rows: saved.append([row["batch"] for row in rows]))
    assert saved[-1] == [1, 512, 1024]
    least = sweep(measure, [512, 1100], lambda _: None)
    assert [row["batch"] for row in least] == [512, 960]
    slower = sweep(lambda batch: measure(1) | {"seconds": float(batch)}, [512, 1024, 2048], lambda _: None)
    assert [row["batch"] for row in slower] == [512, 1024]
    with pytest.raises(ValueError, match="another fault"):
        sweep(lambda _: _raise(ValueError("another fault")), [1], lambda _: None)


def _raise(error: Exception) -> dict[str, Any]:
    raise error


def test_full_memory_is_told_from_other_faults() -> None:
    assert is_full(RuntimeError("Failed to allocate memory for requested buffer of size 7"))
    assert not is_full(RuntimeError("shapes differ"))


def test_batches_that_fit() -> None:
    assert fitting((1, 64, 128), 1) == [1, 64, 128]


def test_the_floor_is_of_bytes_or_of_operations() -> None:
    rates = Rates(copy=2.0, read=4.0, matrix=8.0, nominal=10.0)
    assert rates.floor(weights=40, traffic=8, operations=10) == 12
    assert rates.floor(weights=40, traffic=8, operations=200) == 22
    assert rates.floor(weights=40, traffic=8, operations=200, measured=True) == 27
    assert rates.floor(weights=40, traffic=8, operations=200, speed=2.0) == 12


@pytest.mark.slow
def test_the_benchmark_drives_a_directory_and_writes_what_it_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.decode_cuda", "--device", "cpu", "--tiny", "--no-operators"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "runtimes/python")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "decode_cuda.json").read_text())["1.3B"]
    assert set(found["systems"]) == {"ours fp16", "transformer", "hyena", "loop", "loop, eager"}
    table = (tmp_path / "decode_cuda.md").read_text()
    for context, rows in found["systems"]["transformer"].items():
        best = max(rows, key=lambda row: row["tokens_per_second"])
        assert f"| {context} | transformer | {best['batch']} | {1e3 * best['seconds']:.2f} |" in table
    assert (tmp_path / "decode_cuda.svg").read_text().count("<svg") == 1
    assert found["builds"]["fp16"]["stages"]
    for row in found["systems"]["ours fp16"]["any"]:
        assert (row["graph"], row["ahead"], row["cuda_graph"], row["operators"]) == ("decode", 16, False, False)


@pytest.mark.slow
def test_systems_on_a_cpu_take_turns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.decode_cpu", "--tiny", "--rounds", "2", "--contexts", "16", "32"]
    names = ["ours float32", "onnxruntime float32", "torch float32"]
    command += ["--only", *names, "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "runtimes/python")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "decode_cpu.json").read_text())["contexts"]
    assert set(found) == {"16", "32"}
    for systems in found.values():
        assert set(systems) == set(names)
    assert len({systems["ours float32"]["cache_bytes"] for systems in found.values()}) == 1
    grown = [found[context]["torch float32"]["cache_bytes"] for context in ("16", "32")]
    assert grown[1] == 2 * grown[0]
    table = (tmp_path / "decode_cpu.md").read_text()
    row = found["32"]["onnxruntime float32"]
    assert f"| 32 | onnxruntime float32 | {1e3 * row['seconds']:.2f} | {1 / row['seconds']:.1f} |" in table
