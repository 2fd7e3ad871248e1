"""Refuses torch.export archives that could run code when loaded.

torch.export.load is not made for files nobody vouches for. It unpickles without restriction, evaluates size
expressions as Python, writes names into source code that it compiles, looks operators up by attribute
anywhere under `torch`, and opens compiled libraries. So every part it reads is checked first, by lists of
what is allowed, on the very bytes that torch will read:

1. nothing pickled, compiled or opaque, except sample inputs that pass the weights-only loader
2. size expressions: numbers, size symbols, arithmetic and the functions torch itself writes
3. operators: aten, prims and lhc, Python's arithmetic, and two wrappers; none that touches files
4. any other text that may reach generated code: plain names, or arguments that code holds quoted
Guards, which torch compiles from text, are not checked because they are never built (`check_guards=False`).
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lhcompile.errors import CheckpointError

__all__ = ["refuse_unsafe"]

PLAIN = re.compile(r"[\w.:+-]*")
EXPRESSION = re.compile(r"(?:\s|[A-Za-z_]\w*(?!\w)|\d+(?:\.\d+)?(?![\w.])|[-+*/%(),<>=!&|~])*")  # no attributes
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
SYMBOL = re.compile(r"(s|u|zuf|zf)\d+")
DECLARED = re.compile(r"Symbol\('((?:s|u|zuf|zf)\d+)'(?:, [a-z]+=(?:True|False))*\)")
FUNCTIONS = {
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt",
    "IsNonOverlappingAndDenseIndicator", "RoundToInt", "RoundDecimal", "ToFloat", "Identity", "Max", "Min",
    "floor", "ceiling", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Abs", "True", "False", "oo",
    "int_oo", "Add", "Mul", "Pow", "Integer", "Rational", "true", "false", "Equality", "Unequality", "LessThan",
    "StrictLessThan", "GreaterThan", "StrictGreaterThan",
}  # fmt: skip
SPEC = re.compile(r"[\w\s\[\]{}\",:.\\]*")  # a tree of containers as JSON, names inside quoted once more
SPEC_ESCAPE = re.compile(r'\\(?![\\"])')
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|lhc)\.((?!__|from_file\b)\w+|__(and|or|xor)__)(\.(?!__)\w+)?"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_(int|float|max|min|not|ite|sum|sqrt)"
    r"|torch\._sym_sqrt"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt|pow)"
)
QUOTED = {"as_string", "as_strings"}  # an operator's arguments: code holds them as quoted literals
NAMES = {"name", "as_name", "forward_arg_names"}  # become variables of generated code
EVALUATED = {"expr_str", "target", "as_operator"}


def refuse_unsafe(data: bytes, path: Path) -> None:
    """data: the archive's bytes. Raises CheckpointError naming the first part that is not allowed."""
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        names = reader.get_all_records()
        plain_names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        kind = reader.get_record("archive_format") if "archive_format" in names else b""
    except (RuntimeError, zipfile.BadZipFile):
        raise CheckpointError(f"{path}: truncated, or not a torch.export archive") from None
    if kind != b"pt2" or "version" in plain_names or "serialized_exported_program.json" in plain_names:
        raise CheckpointError(
            f"{path}: not a torch.export archive of format pt2; save it again with torch 2.9 or later"
        )
    for name in names:
        for reason in _objections(name, reader):
            raise CheckpointError(f"{path}: loading it could run code: {name} holds {reason}")


def _objections(name: str, reader: Any) -> Iterator[str]:
    if name.startswith(("data/aotinductor/", "executorch/")):
        yield "compiled code"
    elif name.startswith("models/"):
        program = _json(reader.get_record(name))
        yield from _in_program({k: v for k, v in program.items() if k != "guards_code"}, "")
    elif name.endswith("_config.json"):
        yield from _in_payloads(_json(reader.get_record(name)))
    elif name.startswith("data/sample_inputs/"):
        try:
            torch.load(io.BytesIO(reader.get_record(name)), weights_only=True, map_location="cpu")
        except Exception as error:  # any failure makes torch fall back to the unrestricted loader
            yield f"a pickle that is not plain tensors ({type(error).__name__})"
    elif name.startswith(("data/weights/", "data/constants/")) and name.endswith(".pt"):
        yield "pickled weights"


def _json(record: bytes) -> Any:
    try:
        content = json.loads(record)
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {"?": "?"}  # which is refused as a name


def _in_payloads(config: Any) -> Iterator[str]:
    payloads = config.get("config") if isinstance(config, dict) else None
    for key, payload in payloads.items() if isinstance(payloads, dict) else [("it", None)]:
        if not isinstance(payload, dict) or payload.get("use_pickle") is not False:
            yield f"{key!r} in pickled form"
        elif not re.fullmatch(r"(weight|tensor|constant)_\d+", str(payload.get("path_name"))):
            yield f"{key!r} as an object that is no tensor"


def _in_program(value: Any, key: str) -> Iterator[str]:
    """What is not allowed anywhere below a value of the program; `key` is the field it stands in."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name == "metadata" and _only_remarks(part):
                continue
            if not PLAIN.fullmatch(name):
                yield f"the name {name[:60]!r}"
            yield from _in_program(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _in_program(part, key)
    elif isinstance(value, str):
        yield from _in_text(value, key)


def _only_remarks(value: Any) -> bool:
    """Whether this is a node's metadata (texts by name), and no size or operator in disguise."""
    return isinstance(value, dict) and EVALUATED.isdisjoint(value) and all(isinstance(v, str) for v in value.values())


def _in_text(text: str, key: str) -> Iterator[str]:
    if key == "expr_str":
        text = DECLARED.sub(r"\1", text)
        names = IDENTIFIER.findall(text)
        if not EXPRESSION.fullmatch(text) or not all(n in FUNCTIONS or SYMBOL.fullmatch(n) for n in names):
            yield f"the expression {text[:60]!r}"
    elif key in ("target", "as_operator"):
        if not OPERATOR.fullmatch(text):
            yield f"the operator {text[:60]!r}"
    elif key in ("in_spec", "out_spec"):
        if not SPEC.fullmatch(text) or SPEC_ESCAPE.search(text) or "__enum__" in text:
            yield f"the structure {text[:60]!r}"
    elif key in NAMES:
        if text and not IDENTIFIER.fullmatch(text):
            yield f"the name {text[:60]!r}"
    elif key not in QUOTED and not PLAIN.fullmatch(text):
        yield f"the text {text[:60]!r}"
