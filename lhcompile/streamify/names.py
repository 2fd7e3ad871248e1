"""Names of the states in the graphs."""

from __future__ import annotations

import re
from collections import Counter

__all__ = ["names_of"]

_LAYER_STATE = {"fir": "conv_state", "modal": "recurrent_state", "key": "key", "value": "value"}
_KNOWN_LAYERS = (["fir", "modal"], ["key", "value"])


def names_of(layers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(input name, output name) of each state, from its (kind, module path).

    A layer with exactly one fir and one modal state, or with the keys and values of one attention, the only such layer
    of its number, has the names that generation runtimes look for; any other layout is named by module and kind.
    """
    numbers = [re.match(r"(.*?\b(\d+))\b", path) for _, path in layers]
    prefixes = [match.group(1) if match else "" for match in numbers]
    kinds: dict[str, list[str]] = {}
    for prefix, (kind, _) in zip(prefixes, layers, strict=True):
        kinds.setdefault(prefix, []).append(kind)
    known = {prefix for prefix, held in kinds.items() if prefix and sorted(held) in _KNOWN_LAYERS}
    per_number = Counter(re.findall(r"\d+$", prefix)[0] for prefix in known)
    seen: Counter[str] = Counter()
    names = []
    for prefix, match, (kind, path) in zip(prefixes, numbers, layers, strict=True):
        if match and prefix in known and per_number[match.group(2)] == 1:
            stem = f"{match.group(2)}.{_LAYER_STATE[kind]}"
            names.append((f"past_key_values.{stem}", f"present.{stem}"))
            continue
        stem = f"{path}.{kind}".replace(" ", "_")
        seen[stem] += 1
        stem += f".{seen[stem] - 1}" if seen[stem] > 1 else ""
        names.append((f"past.{stem}", f"present.{stem}"))
    return names
