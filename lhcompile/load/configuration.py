"""Reads a configuration file: YAML or JSON, with the simple interpolations experiments use."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lhcompile.errors import ConfigError

__all__ = ["read_mapping", "resolved"]

INNERMOST = re.compile(r"\$\{([^${}]*)\}")
DEPTH = 20
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping of a YAML or (by its suffix) JSON file. Raises ConfigError when missing, malformed or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: the configuration cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        number = where.line + 1 if where else getattr(error, "lineno", None)
        line = f" at line {number}" if number else ""
        raise ConfigError(f"{path}: the configuration is not valid YAML or JSON{line}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the configuration is no mapping of options")
    return content


def resolved(section: Mapping[str, Any], root: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of a section with `${...}` replaced, and the names of those that could not be.

    Options that are mappings have their own replaced too, one level deep. `${a.b}` is looked up
    from the root, `${.a}` in the section, `${eval:…}` is arithmetic.
    """
    found: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in section.items():
        try:
            if isinstance(value, Mapping):
                found[str(name)] = {str(part): _value(inner, value, root) for part, inner in value.items()}
            else:
                found[str(name)] = _value(value, section, root)
        except (LookupError, ValueError, SyntaxError, ArithmeticError):
            unknown.append(str(name))
    return found, unknown


def _value(value: Any, section: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    for _ in range(DEPTH):
        match = INNERMOST.search(value) if isinstance(value, str) else None
        if match is None:
            return value
        inner = _interpolated(match[1].strip(), section, root)
        whole = match.span() == (0, len(value))
        value = inner if whole else value[: match.start()] + str(inner) + value[match.end() :]
    raise ValueError("too deep")


def _interpolated(text: str, section: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    if text.startswith("eval:"):
        return _arithmetic(ast.parse(text.removeprefix("eval:").strip(), mode="eval").body)
    scope: Any = section if text.startswith(".") else root
    for part in text.removeprefix(".").split("."):
        if not isinstance(scope, Mapping):
            raise LookupError(text)
        scope = scope[part]
    if isinstance(scope, Mapping | list):
        raise LookupError(text)
    return scope


def _arithmetic(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](_arithmetic(node.left), _arithmetic(node.right))
    raise ValueError("not arithmetic")
