"""A user's mistake is one line that says what is wrong and exit code 2; the destination is as it was."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from commands import contents, refused, run
from safetensors.torch import save_file
from torch import Tensor

from lhcompile.load.safari import HyenaLM
from lhcompile.package import write

State = dict[str, Tensor]
Site = Callable[..., None]
OLD_BUILD = '{"format": "lhcompile"}'


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Builds over an older build and into a new place, and expects both to be refused and left as they were."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "manifest.json").write_text(OLD_BUILD)
    (old / "step.onnx").write_text("an older graph")

    def check(message: str, *arguments: object, code: int = 2) -> None:
        before = contents(tmp_path)
        refused(run("build", *arguments, "-o", old, "--force"), message, code)
        assert contents(tmp_path) == before
        refused(run("build", *arguments, "-o", tmp_path / "new" / "out"), message, code)
        assert contents(tmp_path) == before

    return check


@pytest.fixture
def state(bytes_model: HyenaLM) -> State:
    return {key: value.clone() for key, value in bytes_model.state_dict().items()}


# ---- checkpoints ---------------------------------------------------------------------------------------------------


class Acts:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_execute_code(site: Site, state: State, tmp_path: Path, zipped: bool) -> None:
    (tmp_path / "models").mkdir()
    trace = tmp_path / "models" / "ran"
    acts = {**state, "x": Acts(os.mkdir, str(trace))}
    torch.save(acts, tmp_path / "models" / "model.ckpt", _use_new_zipfile_serialization=zipped)
    message = r"model\.ckpt: opening it would run code \(\w+\.mkdir\); save a plain state_dict"
    site(message, tmp_path / "models" / "model.ckpt")
    (tmp_path / "models" / "bare.pt").write_bytes(pickle.dumps(Acts(os.mkdir, str(trace)), protocol=2))
    site(r"bare\.pt: .*(would run code|not a checkpoint)", tmp_path / "models" / "bare.pt")
    assert not trace.exists()
    pickle.loads((tmp_path / "models" / "bare.pt").read_bytes())
    assert trace.exists()  # it would have


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_truncated_file(site: Site, state: State, checkpoint: Path, tmp_path: Path, kept: float) -> None:
    data = checkpoint.read_bytes()
    (tmp_path / "model.pt").write_bytes(data[: int(kept * len(data))])
    site(r"model\.pt: the file is truncated", tmp_path / "model.pt")
    save_file({key: value.clone() for key, value in state.items() if "lm_head" not in key}, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[: int(kept * len(data))])
    site(r"m\.safetensors: truncated, or not a safetensors file", tmp_path / "m.safetensors")


def test_files_that_are_no_checkpoints(site: Site, tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    site(r"empty\.pt: the file is empty", tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("hello")
    site(r"text\.pt: not a checkpoint", tmp_path / "text.pt")
    (tmp_path / "text.txt").write_text("hello")
    site(r"text\.txt: not a checkpoint: the name ends in none of \.pt, ", tmp_path / "text.txt")
    site(r"none\.pt: the checkpoint does not exist", tmp_path / "none.pt")
    site(r"old: the folder holds no weights ", tmp_path / "old")
    (tmp_path / "text.pt2").write_text("hello")
    site(r"text\.pt2: ", tmp_path / "text.pt2")
    site(r"none\.pt2: the archive does not exist", tmp_path / "none.pt2")


LN = "backbone.ln_f.weight"
FAULTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing key": (lambda s: s.pop(LN), rf"missing key '{LN}' of shape \[16\]"),
    "unexpected key": (lambda s: s.update(extra=s[LN]), "unexpected key 'extra'"),
    "wrong shape": (lambda s: s.update({LN: s[LN][:3]}), rf"'{LN}' has shape \[3\], expected \[16\]"),
    "NaN": (lambda s: s[LN].__setitem__(2, float("nan")), f"'{LN}' holds NaN or infinite values"),
    "Inf": (lambda s: s[LN].__setitem__(2, float("-inf")), f"'{LN}' holds NaN or infinite values"),
    "another family": (
        lambda s: [s.update({f"h.{key}".replace("mixer", "attn"): s.pop(key)}) for key in list(s)],
        r"the keys \('h\.\S+', …\) are of no known family; give package\.module:factory and --checkpoint",
    ),
    "context of 1": (
        lambda s: s.update({key: value[:, :1] for key, value in s.items() if ".pos_emb." in key}),
        "holds a context length of 1; there is nothing to stream",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_dict_with_a_fault(site: Site, state: State, tmp_path: Path, fault: str) -> None:
    edit, message = FAULTS[fault]
    edit(state)
    torch.save(state, tmp_path / "model.pt")
    site(rf"model\.pt: .*{message}", tmp_path / "model.pt")


def test_a_factorys_state_dict_with_a_fault(site: Site, tmp_path: Path) -> None:
    state = dict(factories.Language().state_dict())
    torch.save({**state, "mixers.1.taps": state["mixers.1.taps"] / 0}, tmp_path / "inf.pt")
    site(r"inf\.pt: 'mixers\.1\.taps' holds NaN", "factories:Language", "--checkpoint", tmp_path / "inf.pt")
    del state["mixers.1.taps"]
    torch.save(state, tmp_path / "part.pt")
    site(r"part\.pt: missing key 'mixers\.1\.taps'", "factories:Language", "--checkpoint", tmp_path / "part.pt")


def test_configurations(site: Site, checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    for text, message in (
        ("{d_model: 32}", r"the option d_model is 32, but '.+' in the checkpoint makes it 16"),
        ("{activations: id}", "unknown option 'activations'; is 'activation' meant"),
        ("{activation: magic}", "the option activation is 'magic', not one of id, "),
        ("[1, 2", "the configuration is not valid YAML or JSON"),
    ):
        config.write_text(text)
        site(rf"config\.yaml: {message}", checkpoint, "--config", config)
    site(r"none\.yaml: the configuration cannot be read", checkpoint, "--config", tmp_path / "none.yaml")
    site("--checkpoint goes with package.module:factory", checkpoint, "--checkpoint", checkpoint)


# ---- modules -------------------------------------------------------------------------------------------------------


def test_a_module_that_looks_ahead(site: Site) -> None:
    place = r"\(\S+factories\.py:\d+: .+\)"
    site(rf"the model: fft_irfft: .* \(it looks ahead\); it takes 63 or more {place}$", "factories:Circular")
    site(rf"conv: conv1d: looks ahead by 1 positions {place}$", "factories:Centred")


def test_a_filter_that_grows(site: Site) -> None:
    message = "the model: filter 0 grows: each quarter of its taps has .*; --exact keeps taps as they are"
    site(message, "factories:Growing")
    site(message, "factories:Growing", "--order", 4, "--sequences", 2)


def test_a_filter_that_grows_can_be_kept(tmp_path: Path) -> None:
    outcome = run("build", "factories:Growing", "-o", tmp_path / "out", "--exact", "--sequences", 2)
    assert outcome.code == 0
    assert outcome.rows["loss, compiled"].endswith("(+0.000%)")


def test_a_context_length_of_1(site: Site, checkpoint: Path, tmp_path: Path) -> None:
    site("context 1: a sequence of at least 2 is needed", checkpoint, "--context", 1)
    site("--context: Input should be greater than or equal to 1", checkpoint, "--context", 0)
    site("context 65 is not between 2 and the checkpoint's l_max 64", checkpoint, "--context", 65)
    (tmp_path / "short.yaml").write_text("{length: 1}")
    site("the context length is 1; a model needs at least 8", "factories:Tiny", "--config", tmp_path / "short.yaml")


def test_factories_that_make_nothing(site: Site, tmp_path: Path) -> None:
    site(r"nowhere:model: importing nowhere failed: ModuleNotFoundError", "nowhere:model")
    site("factories:Nothing: factories has no 'Nothing'", "factories:Nothing")
    site("factories:VOCAB: is a int, not a factory", "factories:VOCAB")
    (tmp_path / "sizes.yaml").write_text("{depth: 3}")
    site(r"calling Tiny failed: TypeError: .*'depth'", "factories:Tiny", "--config", tmp_path / "sizes.yaml")
    site("torch.export cannot trace the module at .*: no kernel for", "factories:Failing")


# ---- destinations --------------------------------------------------------------------------------------------------


def test_destinations(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("full", "built"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / "built" / "manifest.json").write_text(OLD_BUILD)
    before = contents(tmp_path)
    for place, force, message in (
        ("file/out", [], r"cannot write into .*/file: Not a directory"),
        ("file", ["--force"], r"/file is a file; name a directory to create"),
        ("full", [], r"/full is not empty; --force replaces a built directory whole"),
        ("built", [], r"/built is not empty; --force replaces a built directory whole"),
        ("full", ["--force"], r"/full is not empty and not a built directory; --force will not delete it"),
        (".", ["--force"], "not a built directory"),
        ("n" * 300, [], "cannot .*: File name too long"),
    ):
        refused(run("build", checkpoint, "-o", tmp_path / place, *force), message)
        assert contents(tmp_path) == before
    monkeypatch.chdir(tmp_path / "built")
    refused(run("build", checkpoint, "-o", ".", "--force"), "holds the current directory")
    assert contents(tmp_path) == before


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--order", 4, "--exact"], "--order and --exact exclude each other"),
        (["--order", 4, "--budget", 0.1], "--budget and --order exclude each other"),
        (["--budget", 0.1, "--exact"], "--budget and --exact exclude each other"),
        (["--order", 0], "--order: Input should be greater than or equal to 1"),
        (["--order", "four"], r"Invalid value for '--order': .*integer.*; see lhcompile build --help"),
        (["--budget", -1], "--budget: Input should be greater than 0"),
        (["--budget", "nan"], "--budget: Input should be "),
        (["--budget", "inf"], "--budget: Input should be a finite number"),
        (["--max-order", 1000], "--max-order: Input should be less than or equal to 512"),
        (["--target", "toaster"], r"'--target': 'toaster' is not one of .*'portable'.*; see lhcompile build --help"),
        (["--target", "cpu", "--target", "cpu"], "--target: cpu is named twice"),
        (["--quantize", "int3"], r"'--quantize': 'int3' is not one of .*'int4'.*; see lhcompile build --help"),
        (["--method", "magic"], r"'--method': 'magic' is not one of .*'hankel'.*; see lhcompile build --help"),
        (["--sequences", 1], "--sequences: Input should be greater than or equal to 2"),
        (["--colour", "red"], r"No such option: --colour.*; see lhcompile build --help"),
        (["and", "more"], r"unexpected extra arguments?.*; see lhcompile build --help"),
    ],
)
def test_options(site: Site, checkpoint: Path, options: list[object], message: str) -> None:
    site(message, checkpoint, *options)


def test_commands() -> None:
    refused(run("compile"), "No such command 'compile'; see lhcompile --help")
    refused(run("build"), r"Missing .*; see lhcompile build --help")
    refused(run("build", "model.pt"), r"Missing option '--output' / '-o'; see lhcompile build --help")
    refused(run("inspect", "none.pt", "--context", 0), "--context: Input should be greater than or equal to 1")


# ---- calibration ---------------------------------------------------------------------------------------------------


def test_calibration_files(site: Site, checkpoint: Path, tmp_path: Path) -> None:
    def calibrated(name: str, content: bytes, message: str, *options: object) -> None:
        (tmp_path / name).write_bytes(content)
        model = "factories:Tiny" if name.endswith(".npy") else checkpoint
        site(message, model, "--calibration", tmp_path / name, *options)

    def array(values: Any) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=True)
        return buffer.getvalue()

    calibrated("short.txt", b"import", r"short\.txt holds 6 tokens; calibration needs at least 16")
    calibrated("empty.txt", b"", r"empty\.txt holds 0 tokens; calibration needs at least 16")
    calibrated("high.npy", array(np.full(99, 16)), r"high\.npy holds token id 16; the model has 16 tokens")
    calibrated("low.npy", array(np.full(99, -1)), r"low\.npy holds token id -1; the model has 16 tokens")
    calibrated("real.npy", array(np.full(99, 0.5)), r"real\.npy holds float64; token ids are integers")
    calibrated("objects.npy", array(np.array([{}])), r"cannot read calibration tokens from .*objects\.npy: .*pickle")
    calibrated("empty.npy", b"", r"cannot read calibration tokens from .*empty\.npy: ")
    calibrated("noise.npy", b"\x00\x01\x02" * 99, r"cannot read calibration tokens from .*noise\.npy: ")
    site(r"cannot read \S+none\.txt: No such file", checkpoint, "--calibration", tmp_path / "none.txt")
    site(r"cannot read \S+old: Is a directory", checkpoint, "--calibration", tmp_path / "old")
    broken = ["--tokenizer", tmp_path / "old" / "manifest.json"]
    calibrated("text.txt", b"import os\n" * 99, r"cannot read the tokenizer .*manifest\.json: ", *broken)


def test_text_for_a_model_of_unknown_tokens(site: Site, text: Path) -> None:
    site(
        "the model has 16 tokens, so text needs --tokenizer .*token ids as .npy",
        "factories:Tiny",
        "--calibration",
        text,
    )


def test_a_budget_that_cannot_be_met(site: Site) -> None:
    best = (
        r"no order up to 2 keeps the rise of the loss within 1e-05%: the best is \+\d+\.\d+% at mean order 2; allow "
        "more with --budget"
    )
    site(best, "factories:Tiny", "--budget", 1e-7, "--max-order", 2, "--sequences", 4, code=3)
    site("no order up to 1 keeps", "factories:Tiny", "--budget", 1e-7, "--max-order", 1, "--sequences", 4, code=3)


# ---- built directories ---------------------------------------------------------------------------------------------

VERBS: dict[str, list[object]] = {
    "verify": [],
    "generate": ["-n", 5],
    "bench": ["--steps", 2],
    "inspect": [],
}


@pytest.fixture
def damaged(order_4: Path, tmp_path: Path) -> Path:
    """A built directory to break."""
    return shutil.copytree(order_4, tmp_path / "built")


@pytest.mark.parametrize("verb", VERBS)
def test_a_checksum_that_does_not_match(damaged: Path, verb: str) -> None:
    graph = damaged / "step.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    before = contents(damaged)
    refused(run(verb, damaged, *VERBS[verb]), r"step\.onnx.* sha256 ")
    graph.write_bytes(data[:-7])
    refused(run(verb, damaged, *VERBS[verb]), r"step\.onnx.* has \d+ bytes, .*\d+")
    graph.unlink()
    refused(run(verb, damaged, *VERBS[verb]), r"step\.onnx")
    graph.write_bytes(data)
    assert contents(damaged) == before


@pytest.mark.parametrize("verb", VERBS)
def test_manifests(damaged: Path, verb: str) -> None:
    manifest = damaged / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    refused(run(verb, damaged, *VERBS[verb]), r"format_version.* 9[;,] this \w+ reads .*1")
    manifest.write_text("{")
    refused(run(verb, damaged, *VERBS[verb]), r"manifest\.json: ")


@pytest.mark.parametrize("verb", ["verify", "generate", "bench"])
def test_no_directory(tmp_path: Path, verb: str) -> None:
    refused(run(verb, tmp_path / "none", *VERBS[verb]), r"not a built directory")
    refused(run(verb, tmp_path, *VERBS[verb]), r"not a built directory")


def test_verify_options(order_4: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    refused(run("verify", order_4, "--calibration", text), "name it with --against")
    refused(run("verify", order_4, "--against", tmp_path / "none.pt"), r"none\.pt: the checkpoint does not exist")
    other = "factories:Tiny is another model: it has 272 parameters, .* was built from one of 11456"
    refused(run("verify", order_4, "--against", "factories:Tiny"), other)
    options = ["--against", checkpoint, "--calibration", tmp_path / "none.txt"]
    refused(run("verify", order_4, *options), r"none\.txt: No such file")
    refused(run("verify", order_4, "--sequences", 1), r"'--sequences': .*2; see lhcompile verify --help")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", -1], "temperature is -1.0, expected a finite number of at least 0"),
        (["--top-k", -1], "top_k is -1, expected a whole number of at least 0"),
        (["--top-p", 2], "top_p is 2.0, expected more than 0 and at most 1"),
        (["--seed", -4], "seed is -4, expected a whole number of at least 0"),
        (["--prompt", ""], "the prompt is empty"),
        (["-n", 0], "'-n': .*1; see lhcompile generate --help"),
    ],
)
def test_generate_options(order_4: Path, options: list[object], message: str) -> None:
    refused(run("generate", order_4, *options), message)


def test_generate_without_a_tokenizer(tmp_path: Path) -> None:
    assert run("build", "factories:Tiny", "-o", tmp_path / "out", "--order", 2, "--sequences", 2).code == 0
    needs_ids = "the model has no tokenizer: give token ids as the prompt, as in --prompt '1 2 3'"
    refused(run("generate", tmp_path / "out", "--prompt", "import os"), needs_ids)
    refused(run("generate", tmp_path / "out", "--prompt", "1 99"), r"token id 99 at \[0, 1\] is outside 0\.\.15")


# ---- interruptions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_write", "_move_into_place"])
def test_a_build_interrupted_while_it_writes(site: Site, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = getattr(write, name)

    def interrupted(*arguments: Any) -> Any:
        if "out" in str(arguments[0]) or "old" in str(arguments[0]):
            raise KeyboardInterrupt
        return original(*arguments)  # the rehearsal's own directory

    monkeypatch.setattr(write, name, interrupted)
    site("interrupted; nothing was written", "factories:Tiny", "--order", 2, "--sequences", 2, code=130)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, scratch = tmp_path / "place" / "out", tmp_path / "scratch"
    scratch.mkdir()  # onnxruntime leaves a file of its own there
    command = [str(Path(sys.executable).parent / "lhcompile"), "build", str(checkpoint), "-o", str(out)]
    environment = os.environ | {"TMPDIR": str(scratch)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job hands down an ignored SIGINT
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert re.match(r"✓ load", line), line
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "error: interrupted; nothing was written"
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == [scratch]
    assert not any(path.is_dir() for path in scratch.iterdir())
