"""The trained example, built as the README builds it: how close it is, and that it stays so for a long time."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from commands import done
from lhruntime import Session
from onnx import helper, numpy_helper

from lhcompile.package import Manifest, verify_files
from lhcompile.verify.model import Report

ROOT = Path(__file__).parents[2]
STEPS = 100_000
LAYERS = 6


@dataclass(frozen=True)
class Build:
    """The built directory, and what the build left in it; tests must not change it."""

    path: Path
    report: Report
    manifest: Manifest

    @property
    def step(self) -> onnx.ModelProto:
        return onnx.load(self.path / "step.onnx")


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A default build on a few sequences, by relative paths, in a process of its own."""
    return build_of(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The same of standard operators alone."""
    return build_of(tmp_path_factory.mktemp("portable"), "--target", "portable")


def build_of(place: Path, *more: str) -> Build:
    shutil.copytree(ROOT / "examples" / "pysource", place / "pysource")
    command = "build pysource/model.pt --config pysource/config.yaml --calibration pysource/heldout.txt -o out"
    script = str(Path(sys.executable).parent / "lhcompile")
    built = subprocess.run(
        [script, *command.split(), "--sequences", "8", *more],
        cwd=place, capture_output=True, check=False, encoding="utf-8",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    path = place / "out"
    return Build(path, Report.model_validate_json((path / "report.json").read_bytes()), verify_files(path))


# ---- what was built ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_on_text_that_was_held_out(example: Build) -> None:
    """The build chose its orders on the first half of the text; these figures are of the second."""
    rise = example.report.loss_rise
    assert rise is not None
    assert rise <= 1e-3
    assert [stage.tokens for stage in example.report.stages] == [8 * 1023] * 5
    assert 0.7 < (example.report.stages[0].loss or 0) < 1.1
    fidelity = example.manifest.fidelity
    assert fidelity is not None
    assert (fidelity.loss_reference, fidelity.loss_compiled) == (
        example.report.stages[0].loss,
        example.report.stages[-1].loss,
    )


@pytest.mark.slow
def test_the_stages_after_distilling_change_nothing(example: Build) -> None:
    reference, captured, distilled, streamed, onnx_ = example.report.stages
    assert captured.loss == pytest.approx(reference.loss, abs=1e-6)
    assert streamed.loss == pytest.approx(distilled.loss, abs=1e-6)
    assert onnx_.loss == pytest.approx(distilled.loss, abs=1e-6)
    assert (onnx_.top1_agreement or 0) > 0.97


@pytest.mark.slow
def test_the_orders(example: Build) -> None:
    assert example.report.order_mean is not None
    assert example.report.order_mean <= 4
    assert [layer.module for layer in example.report.layers] == [f"backbone.layers.{i}.mixer" for i in range(LAYERS)]
    assert example.report.state_bytes < 75_000


@pytest.mark.slow
def test_the_report_needs_nothing_beside_it(example: Build) -> None:
    html = (example.path / "report.html").read_text("utf-8")
    assert not re.findall(r"""(?:src|href)=["']?(?!#|data:)[^"'\s>]+""", html)
    assert not re.findall(r"<link|<iframe|@import|url\(\s*['\"]?(?!data:|#)|fetch\(|XMLHttpRequest", html)
    assert html.count("<svg") >= 4


@pytest.mark.slow
def test_no_file_tells_of_the_place_it_was_made_in(example: Build) -> None:
    places = {str(ROOT), str(example.path.parent), sys.prefix, str(Path.home()), str(Path(onnx.__file__).parents[1])}
    places -= {"/"}
    for file in example.path.iterdir():
        data = file.read_bytes()
        assert not [place for place in places if place.encode() in data], file.name
    assert example.report.command.startswith("lhcompile build pysource/model.pt ")


# ---- the graphs ----------------------------------------------------------------------------------------------------


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from all_nodes(inner)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step.onnx", "prefill.onnx"])
def test_portable_graphs_are_standard_onnx(portable: Build, name: str) -> None:
    model = onnx.load(portable.path / name)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert 17 <= model.opset_import[0].version <= 21
    assert {node.domain for node in all_nodes(model.graph)} == {""}
    assert not model.functions
    assert not [weight.name for weight in model.graph.initializer if weight.data_location]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step.onnx", "prefill.onnx"])
def test_every_other_operator_has_a_function_of_standard_ones(example: Build, name: str) -> None:
    model = onnx.load(example.path / name)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {"", "lhcompile"}
    functions = {(function.domain, function.name, function.overload) for function in model.functions}
    assert {(node.domain, node.op_type, node.overload) for node in all_nodes(model.graph) if node.domain} == functions
    inlined = onnx.inliner.inline_local_functions(model)
    onnx.checker.check_model(inlined, full_check=True)
    assert {node.domain for node in all_nodes(inlined.graph)} == {""}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["example", "portable"])
def test_the_step_graph_does_only_what_it_must(target: str, request: pytest.FixtureRequest) -> None:
    example: Build = request.getfixturevalue(target)
    graph = example.step.graph
    counts = Counter(node.op_type for node in all_nodes(graph))
    assert not {"Scan", "Loop", "If", "Shape", "Range", "Sin", "Cos", "Transpose", "Cast"} & set(counts)
    weights = {weight.name for weight in graph.initializer}
    for node in graph.node:
        assert not set(node.input) <= weights, f"{node.op_type} of nothing but weights: {node.output}"
    assert len(graph.node) / LAYERS <= 35
    assert example.report.graph is not None
    assert example.report.graph.step_nodes == len(graph.node)


@pytest.mark.slow
def test_onnxruntime_has_nothing_to_remark(example: Build) -> None:
    code = (
        "import sys, onnxruntime as ort\n"
        "for file in sys.argv[1:]:\n"
        "    ort.InferenceSession(file, providers=['CPUExecutionProvider'])"
    )
    files = [str(example.path / "step.onnx"), str(example.path / "prefill.onnx")]
    loaded = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, check=False, encoding="utf-8")
    assert (loaded.returncode, loaded.stdout, loaded.stderr) == (0, "", "")


# ---- the verbs and the scripts -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verify(example: Build) -> None:
    assert done("verify", example.path).rows["cuts"] == "4 ways of feeding a sequence agree, outputs and states"


@pytest.mark.slow
def test_the_script_that_generates(example: Build) -> None:
    script = ROOT / "examples/pysource/generate.py"
    command = [sys.executable, str(script), str(example.path), "--tokens", "120", "--prompt", "import "]
    first, second = (
        subprocess.run([*command, "--seed", seed], capture_output=True, check=False, encoding="utf-8")
        for seed in ("1", "1")
    )
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("import ")
    assert first.stdout == second.stdout
    words = re.findall(r"\b(?:import|from|def|return|self|class|if|in|for|None)\b", first.stdout)
    assert len(words) >= 3, first.stdout


def test_the_script_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a very small model on the standard library alone; what it leaves is a model that loads."""
    stdlib = sysconfig.get_paths()["stdlib"]
    paths = {"stdlib": stdlib, "purelib": str(tmp_path / "none"), "platlib": str(tmp_path / "none")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sizes = "--steps 2 --batch 2 --width 16 --layers 1 --context 64 --train-mb 0.2 --heldout-kb 4"
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "out"), *sizes.split()])
    runpy.run_path(str(ROOT / "examples/pysource/train.py"), run_name="__main__")
    monkeypatch.delitem(sys.modules, "corpus")
    log = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert log[0]["heldout_bytes"] == (tmp_path / "out" / "heldout.txt").stat().st_size <= 4096
    assert log[1]["step"] == 2
    assert log[-1]["heldout_loss"] == pytest.approx(np.log(256), abs=0.3)
    shown = done("inspect", tmp_path / "out" / "model.pt", "--config", tmp_path / "out" / "config.yaml")
    assert shown.rows["model"] == "safari-hyena, 20,256 parameters, vocabulary 256, context 64"


# ---- a long time ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generating_stays_within_bounds(example: Build) -> None:
    """No logit and no state leaves the finite numbers, and no state grows but as a sum over all that was heard may.

    A filter that hardly decays within the context lets its state wander for as long, so the norms are compared half
    with half; a pole beyond the unit circle by 10⁻⁴ would make the second half exceed the first e⁵ times.
    """
    session = Session.load(example.path, threads=1)
    norms = []
    # a logit that is not finite raises in the sampler
    for count, _ in enumerate(session.generate(session.tokenizer.encode("import os\n"), STEPS, seed=1), 1):
        if count % 500 == 0:
            norms.append([float(np.linalg.norm(state)) for state in session.states().values()])
    found = np.array(norms)
    assert found.shape == (STEPS // 500, 2 * LAYERS)
    assert np.isfinite(found).all()
    early, late = found[: len(found) // 2].max(0), found[len(found) // 2 :].max(0)
    assert (late <= 10 * early).all(), (early, late)


@pytest.mark.slow
def test_reading_on_is_no_worse_than_starting_anew(example: Build) -> None:
    """After 64 000 bytes of text, far beyond the context, the loss on the next 16 windows is below that of windows
    which each start without memory: what the states keep of long ago does no harm."""
    text = np.frombuffer((ROOT / "examples/pysource/heldout.txt").read_bytes(), np.uint8).astype(np.int64)
    windows = text[64_000 : 64_000 + 16 * 1024].reshape(16, 1024)
    session = Session.load(example.path)
    session.prefill(text[:64_000], last_only=True)
    onward = [mean_loss(session.prefill(window)[0], window) for window in windows]
    anew = []
    for window in windows:
        session.reset()
        anew.append(mean_loss(session.prefill(window)[0], window))
    assert np.mean(onward) < np.mean(anew)


def mean_loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Nats a token of tokens [time] after the first, predicted by logits [time, vocabulary]."""
    scores = logits[:-1].astype(np.float64)
    top = scores.max(-1)
    chosen = np.take_along_axis(scores, tokens[1:, None], -1)[:, 0]
    return float((top + np.log(np.exp(scores - top[:, None]).sum(-1)) - chosen).mean())


@pytest.mark.slow
def test_the_recurrence_in_single_precision_stays_with_double(portable: Build) -> None:
    """The step graph's own nodes from (state, input) to the next state, all layers, in float32 and in float64.

    Driven by the same normal inputs they stay within 5·10⁻⁴ of each other, as l2 distance of a layer's states: the
    rounding of one step is 6·10⁻⁸ of the state, and a state that forgets over N steps adds up N of them at random.
    """
    single, names, shapes = recurrences(portable.step, np.float32)
    double, _, _ = recurrences(portable.step, np.float64)
    narrow = [np.zeros(shape, np.float32) for shape in shapes]
    wide = [np.zeros(shape) for shape in shapes]
    draw = np.random.default_rng(0)
    worst = 0.0
    for _ in range(STEPS // 1000):
        for _ in range(1000):
            inputs = [draw.standard_normal(shape, np.float32) for shape in shapes]
            narrow = single.run(None, dict(zip(names, [*inputs, *narrow], strict=True)))
            wide = double.run(None, dict(zip(names, [*(x.astype(np.float64) for x in inputs), *wide], strict=True)))
        distances = [
            np.linalg.norm(mine - truth) / np.linalg.norm(truth) for mine, truth in zip(narrow, wide, strict=True)
        ]
        worst = max(worst, *map(float, distances))
    assert 0 < worst < 5e-4


def recurrences(
    model: onnx.ModelProto, dtype: Any
) -> tuple[onnxruntime.InferenceSession, list[str], list[tuple[int, ...]]]:
    """The part of a step graph between each layer's convolution input and its next modal state, in a dtype.

    Returns the graph, the names of its inputs (all convolution inputs, one number for each of the layer's states, then
    all states) and the states' shapes.
    """
    graph = model.graph
    producer = {output: node for node in graph.node for output in node.output}
    weights = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    states = [value for value in graph.input if value.name.endswith(".recurrent_state")]
    nodes: list[onnx.NodeProto] = []
    drives, kept = [], {}

    @cache
    def hears(name: str, state: str) -> bool:
        return name == state or (name in producer and any(hears(source, state) for source in producer[name].input))

    def keep(name: str) -> None:
        if name in weights:
            kept[name] = weights[name].astype(dtype) if weights[name].dtype == np.float32 else weights[name]
        elif name in producer and producer[name].op_type == "ArgMax":  # of one number: the zeros of a batch of one
            kept[name] = np.zeros((1, 1, 1), np.int64)
        elif name in producer and producer[name] not in nodes:
            for source in producer[name].input:
                keep(source)
            nodes.append(producer[name])

    after = [state.name.replace("past_key_values", "present") for state in states]
    for state, successor in zip(states, after, strict=True):
        assert producer[successor].op_type == "Add"  # what is left of the state, and the new input
        (drive,) = [source for source in producer[successor].input if not hears(source, state.name)]
        drives.append(drive)
        for source in producer[successor].input:
            if source != drive:
                keep(source)
        nodes.append(producer[successor])

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)

    names = [*drives, *(state.name for state in states)]
    constants = [numpy_helper.from_array(array, name) for name, array in kept.items()]
    part = helper.make_graph(nodes, "recurrences", [*map(value, names)], [*map(value, after)], constants)
    whole = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shapes = [tuple(dim.dim_value or 1 for dim in state.type.tensor_type.shape.dim) for state in states]
    return session, names, shapes
