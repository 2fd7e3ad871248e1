"""Tokenizer, command line, and what importing the package brings along."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lhruntime
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lhruntime import ArgumentError, ByteTokenizer, FormatError, IdsOnly, Session, StreamDecoder
from lhruntime.__main__ import main
from toy_models import manifest_of, save, toy, write_manifest

PACKAGE_ROOT = Path(lhruntime.__file__).resolve().parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=False)


@settings(deadline=None)
@given(text=st.text())
def test_text_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int64
    assert bytes(tokens.tolist()) == text.encode()
    assert tokenizer.decode(tokens) == text


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 300)))
def test_streaming_equals_decoding_at_once(tokens: list[int]) -> None:
    decoder = StreamDecoder()
    streamed = "".join(decoder.feed(token) for token in tokens) + decoder.finish()
    assert streamed == ByteTokenizer().decode(tokens)


def test_a_character_appears_when_it_is_complete() -> None:
    decoder = ByteTokenizer().stream()
    assert [decoder.feed(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert decoder.feed(0xC3) == ""
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.feed(300, 65) == "\N{REPLACEMENT CHARACTER}A"


def test_bytes_of_a_command_line_that_are_not_utf8_survive() -> None:
    assert ByteTokenizer().encode(os.fsdecode(b"a\xff")).tolist() == [97, 255]
    with pytest.raises(ArgumentError, match="the text cannot be encoded"):
        ByteTokenizer().encode("\ud800")


def test_other_tokenizers_take_ids_only(tmp_path: Path) -> None:
    directory = save(toy(), tmp_path / "ids")
    write_manifest(directory, manifest_of(toy()) | {"tokenizer": {"kind": "file", "file": "tokenizer.json"}})
    tokenizer = Session.load(directory).tokenizer
    assert isinstance(tokenizer, IdsOnly)
    message = "the model's tokenizer is of kind 'file': text is not supported, pass token ids"
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1]), tokenizer.stream):
        with pytest.raises(ArgumentError, match=message):
            call()


def test_importing_brings_neither_torch_nor_onnx() -> None:
    code = "import lhruntime, sys; print([m for m in ('torch', 'onnx', 'lhcompile') if m in sys.modules])"
    result = python("-c", code)
    assert (result.stdout.strip(), result.stderr) == (b"[]", b"")


def test_public_names() -> None:
    assert lhruntime.__all__ == sorted(lhruntime.__all__)
    for name in lhruntime.__all__:
        assert getattr(lhruntime, name).__doc__


def test_the_readme_runs(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    text = (PACKAGE_ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)


def test_command_line(built: Path) -> None:
    command = [str(built), "--prompt", "Once é", "--max-new-tokens", "20", "--seed", "3", "--top-k", "40"]
    result = python("-m", "lhruntime", *command)
    assert (result.returncode, result.stderr) == (0, b"")
    session = Session.load(built)
    prompt = session.tokenizer.encode("Once é")
    tokens = [int(token[0]) for token in session.generate(prompt, 20, seed=3, top_k=40)]
    expected = "Once é" + session.tokenizer.decode(tokens) + "\n"
    assert result.stdout.decode().replace("\r\n", "\n") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "error: the prompt is empty: give at least one position\n"),
        (["--prompt", "a", "--top-p", "2"], "error: top_p is 2.0, expected more than 0 and at most 1\n"),
        (["--prompt", "a", "--threads", "0"], "error: threads is 0, expected at least 1\n"),
    ],
)
def test_command_line_mistakes(
    built: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(built), *arguments]) == 2
    assert capsys.readouterr().err == message


def test_command_line_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--prompt", "a"]) == 2
    assert "not a built directory" in capsys.readouterr().err
    assert issubclass(FormatError, lhruntime.LhruntimeError)
