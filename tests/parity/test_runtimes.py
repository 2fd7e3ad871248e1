"""The graphs of a build in runtimes that are not onnxruntime: OpenVINO, onnx's reference evaluator, C by a compiler.

The portable graphs are driven unchanged. The mcu graph becomes C that allocates nothing; a driver written here feeds it
as firmware would, states double-buffered.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from commands import done
from emx_onnx_cgen.cli import main as generate_c
from factories import hyena
from lhruntime import Session
from models import CONTEXT, ORDERS, VOCAB, with_modal
from onnx.reference import ReferenceEvaluator
from streams import (
    Built,
    Stream,
    assert_close,
    assert_parity,
    onnx_stream,
    serialized,
    torch_stream,
    write_directory,
)
from torch import Tensor

from lhcompile.artifacts import LoadedModel, Lowered, Program
from lhcompile.capture import capture
from lhcompile.lower import lower
from lhcompile.lower.web import without_kernel
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify

Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], Sequence[np.ndarray]]
"""One graph in a runtime: input arrays by name → output arrays in order"""

CASES = [
    ("per channel", "exact"),
    ("per channel", "packed"),
    ("shared", "modal"),
    ("shared", "packed"),
    ("hybrid", "packed"),
]
CUTS = {"whole": [], "cut": [3, 5, 1, 1], "token by token": [1] * CONTEXT}
TOKENS = 8
"""Tokens that a call of a short web prefill takes."""
WEB_CUTS = CUTS | {"a step between": [8, 1, 8], "steps before": [1, 1, 1]}


def openvino_run(model: bytes) -> Run:
    """In float32: OpenVINO computes in bfloat16 where the processor has it, unless it is told otherwise."""
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(io.BytesIO(model)), "CPU", options)
    return lambda feeds: [np.array(value) for value in compiled(feeds).values()]


def reference_run(model: bytes) -> Run:
    evaluator = ReferenceEvaluator(onnx.load_model_from_string(model))
    return lambda feeds: evaluator.run(None, feeds)


def stream_of(runtime: Callable[[bytes], Run], lowered: Lowered) -> Stream:
    """Both graphs in a runtime: the step graph for single tokens, the prefill graph for more."""
    step, prefill = (runtime(serialized(model)) for model in (lowered.step, lowered.prefill))
    names = [str(value.name) for value in lowered.step.graph.inputs]

    def run(tokens: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        graph = step if tokens.shape[1] == 1 else prefill
        arrays = [value.numpy() for value in (tokens, *states)]
        logits, *after = graph(dict(zip(names, arrays, strict=True)))
        return torch.from_numpy(logits), [torch.from_numpy(np.asarray(state)) for state in after]

    return run


def random_tokens(rows: int, vocabulary: int = VOCAB, time: int = CONTEXT) -> Tensor:
    return torch.randint(0, vocabulary, (rows, time), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES, ids=", ".join)
@pytest.mark.parametrize("runtime", [openvino_run, reference_run], ids=["openvino", "reference"])
def test_portable_runs_unchanged(
    built: Callable[[str, str], Built], case: tuple[str, str], runtime: Callable[[bytes], Run]
) -> None:
    """Logits and final states as in onnxruntime fed whole. PARITY: 3.2e-7 was measured at most, in every cut."""
    model = built(*case)
    stream, truth = stream_of(runtime, model.lowered), onnx_stream(model.lowered)
    for cuts in CUTS.values():
        assert_parity(stream, truth, model.program.states, random_tokens(2), cuts)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_web_needs_no_operator_that_webgpu_lacks(
    built: Callable[[str, str], Built], case: tuple[str, str]
) -> None:
    """Both graphs, and they give the program's own logits and states in every cut, over several calls of prefill."""
    program = built(*case).program
    lowered = lower(replace(program, context=TOKENS), "web")
    for model in (lowered.step, lowered.prefill):
        assert without_kernel(model) == []
        assert arithmetic_of_64_bits(onnx.load_model_from_string(serialized(model))) == []
    assert list(lowered.prefill.graph.inputs[0].shape) == [1, TOKENS]
    for cuts in WEB_CUTS.values():
        assert_parity(onnx_stream(lowered), torch_stream(program), program.states, random_tokens(1), cuts)


def arithmetic_of_64_bits(model: onnx.ModelProto) -> list[str]:
    """Operators that compute with int64, which WebGPU has no numbers for; as an index or a shape it is no number."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    wide = {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.INT64}
    wide |= {value.name for value in graph.initializer if value.data_type == onnx.TensorProto.INT64}
    computing = {"Add", "Sub", "Mul", "Div", "Neg", "Mod", "Equal", "Greater", "Less", "Where"}
    return [node.op_type for node in graph.node if node.op_type in computing and wide & {*node.input}]


def test_portable_has_operators_that_webgpu_lacks(built: Callable[[str, str], Built]) -> None:
    """What the test above looks for is there to be found."""
    step = built("hybrid", "packed").lowered.step
    assert without_kernel(step) == ["ScatterElements"]
    assert set(arithmetic_of_64_bits(onnx.load_model_from_string(serialized(step)))) == {"Add", "Greater"}


# ---- C ---------------------------------------------------------------------------------------------------------------

PROMPT, NEW = 12, 40


def c_array(shape: Sequence[int]) -> str:
    return "".join(f"[{size}]" for size in shape)


def driver(model: onnx.ModelProto, prompt: Sequence[int]) -> str:
    """A C program that feeds the prompt and NEW greedy tokens, and writes each token's logits as bytes to stdout.

    Two buffers a state: a step reads one and writes the other, as its parameters are `restrict`.
    """
    kinds = {onnx.TensorProto.FLOAT: "float", onnx.TensorProto.INT64: "int64_t"}
    states = [
        (kinds[value.type.tensor_type.elem_type], [dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in list(model.graph.input)[1:]
    ]
    vocabulary = model.graph.output[0].type.tensor_type.shape.dim[2].dim_value
    buffers = [f"static {kind} state_{i}[2]{c_array(shape)};" for i, (kind, shape) in enumerate(states)]
    old, new = (", ".join(f"state_{i}[{side}]" for i in range(len(states))) for side in ("now", "1 - now"))
    ids = ", ".join(map(str, prompt))
    return f"""
#include "step.c"
#include <stdio.h>
{chr(10).join(buffers)}
static float logits[1][1][{vocabulary}];
static const int64_t prompt[] = {{{ids}}};

int main(void) {{
    int64_t token[1][1];
    int now = 0;
    for (int t = 0; t < {len(prompt) + NEW}; ++t, now = 1 - now) {{
        if (t < {len(prompt)}) {{
            token[0][0] = prompt[t];
        }} else {{
            token[0][0] = 0;
            for (int i = 1; i < {vocabulary}; ++i)
                if (logits[0][0][i] > logits[0][0][token[0][0]]) token[0][0] = i;
        }}
        step((const int64_t (*)[1])token, {old}, logits, {new});
        if (fwrite(logits, sizeof logits, 1, stdout) != 1) return 1;
    }}
    return 0;
}}
"""


def logits_in_c(directory: Path, prompt: Sequence[int], place: Path) -> np.ndarray:
    """step.onnx as C, compiled and run: float32 [tokens, vocabulary]."""
    gcc = shutil.which("gcc")
    assert gcc is not None, "gcc is needed to compile what the mcu target makes"
    options = ["--model-name", "step", "--large-temp-threshold", "0", "--large-weight-threshold", "0"]
    assert generate_c(["compile", str(directory / "step.onnx"), str(place / "step.c"), *options]) == 0
    source = (place / "step.c").read_text()
    assert not re.search(r"\b(malloc|calloc|realloc|free|alloca)\s*\(", source)
    model = onnx.load(directory / "step.onnx")
    (place / "main.c").write_text(driver(model, prompt))
    command = [gcc, "-O2", "-std=c11", "-Wall", "-Werror", "main.c", "-o", "main", "-lm"]
    compiled = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    written = subprocess.run([str(place / "main")], capture_output=True, check=True).stdout
    return np.frombuffer(written, np.float32).reshape(len(prompt) + NEW, -1)


def as_written(directory: Path) -> Callable[[list[int]], np.ndarray]:
    """step.onnx in onnxruntime, operator for operator: token [1] → logits [1, vocabulary], from zero states."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = directory / "step.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids, *states = session.get_inputs()
    memory = [np.zeros(state.shape, np.float32) for state in states]

    def step(token: list[int]) -> np.ndarray:
        feeds = {state.name: value for state, value in zip(states, memory, strict=True)}
        logits, *memory[:] = session.run(None, feeds | {ids.name: np.array([token], np.int64)})
        return np.asarray(logits)[:, 0]

    return step


def assert_same_tokens(directory: Path, place: Path, vocabulary: int, rounds_signals: bool = False) -> None:
    """Greedy tokens and logits of the C program are those of lhruntime on the directory.

    rounds_signals: a fused kernel of onnxruntime does, and no operator of the graph; then those as it is written
    """
    step = as_written(directory) if rounds_signals else Session.load(directory, threads=1).step
    prompt = random_tokens(1, vocabulary, PROMPT)[0].tolist()
    expected = [step([token])[0] for token in prompt]
    for _ in range(NEW):
        expected.append(step([int(expected[-1].argmax())])[0])
    found = logits_in_c(directory, prompt, place)
    assert found.argmax(1).tolist() == [int(row.argmax()) for row in expected]
    assert_close(torch.from_numpy(found.copy()), torch.from_numpy(np.stack(expected)), "logits of the C program")


def byte_program(order: int, form: str) -> Program:
    """A streamed Hyena of 256 tokens, two layers; `order` - 1 long convolutions each."""
    module = hyena(order=order)
    program = recognize(capture(LoadedModel(module, "safari-hyena", CONTEXT, 0, "tests")))
    if form != "exact":
        program = with_modal(program, orders=ORDERS if form == "packed" else None)
    return streamify(program)


@pytest.mark.parametrize(("order", "form"), [(2, "modal"), (2, "packed"), (2, "exact"), (3, "packed")])
def test_mcu_in_c_gives_the_same_tokens(order: int, form: str, tmp_path: Path) -> None:
    program = byte_program(order, form)
    directory = write_directory(program, lower(program, "mcu"), tmp_path / "out")
    assert_same_tokens(directory, tmp_path, 256)


@pytest.mark.parametrize("name", ["shared", "per channel"])
def test_mcu_in_c_of_other_layers(built: Callable[[str, str], Built], name: str, tmp_path: Path) -> None:
    """Products over heads, which torch writes as einsum, and short convolutions of every kind."""
    program = built(name, "packed").program
    directory = write_directory(program, lower(program, "mcu"), tmp_path / "out")
    assert_same_tokens(directory, tmp_path, VOCAB)


@pytest.mark.parametrize("precision", ["none", "fp16", "int8"])
def test_a_build_in_c_gives_the_same_tokens(precision: str, tmp_path: Path) -> None:
    """By the command line. int4 and bf16 become C of types (_BitInt, __bf16) that gcc 12 does not have."""
    checkpoint, out = tmp_path / "model.pt", tmp_path / "out"
    torch.save(hyena().state_dict(), checkpoint)
    done("build", checkpoint, "-o", out, "--order", 4, "--sequences", 2, "--target", "mcu", "--quantize", precision)
    assert_same_tokens(out, tmp_path, 256, rounds_signals=precision == "int8")
