"""Generates text from a built directory with numpy and onnxruntime alone: python generate.py build/pysource

All that a program needs to know stands in manifest.json: the files of the two graphs, the names of their
inputs and outputs, and the states, which start at zero and are handed from each call to the next.
"""

from __future__ import annotations

import argparse
import codecs
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


class Decoder:
    """A model that reads and predicts one sequence; it remembers what it has read."""

    def __init__(self, directory: Path) -> None:
        manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
        if manifest.get("tokenizer") != {"kind": "bytes"}:
            raise SystemExit(f"{directory}: this example is for models whose tokens are bytes")
        self._step = ort.InferenceSession(directory / manifest["graphs"]["step"]["file"])
        self._prefill = ort.InferenceSession(directory / manifest["graphs"]["prefill"]["file"])
        self._tokens: str = manifest["inputs"]["tokens"]
        self._names = [state["input"] for state in manifest["states"]]
        self._outputs = [manifest["outputs"]["logits"], *(state["output"] for state in manifest["states"])]
        self._states = [
            np.zeros([1 if axis == "batch" else axis for axis in state["shape"]], state["dtype"])
            for state in manifest["states"]
        ]

    def read(self, tokens: list[int]) -> np.ndarray:
        """Reads tokens after those read so far; returns the logits of the next one, [vocab]."""
        session = self._step if len(tokens) == 1 else self._prefill
        feeds: dict[str, Any] = {self._tokens: np.array([tokens], np.int64)}
        feeds.update(zip(self._names, self._states, strict=True))
        logits, *self._states = session.run(self._outputs, feeds)
        return logits[0, -1].astype(np.float64)


def sample(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """Draws from softmax(logits / temperature), logits [vocab]; temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / temperature)
    return int(random.choice(len(weights), p=weights / weights.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--prompt", default='def read_lines(path):\n    """')
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.prompt or options.temperature < 0:
        parser.error("the prompt must not be empty and the temperature not negative")

    decoder, random = Decoder(options.directory), np.random.default_rng(options.seed)
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(options.prompt, end="", flush=True)
    logits = decoder.read(list(options.prompt.encode()))
    for _ in range(options.tokens):
        token = sample(logits, options.temperature, random)
        print(text.decode(bytes([token])), end="", flush=True)
        logits = decoder.read([token])
    print(text.decode(b"", final=True))


if __name__ == "__main__":
    main()
