"""A built directory in a loop on the device: states that change sides, tokens that are fed back where they were chosen.

The directory's graph `decode` takes the tokens, the states and how to choose, and gives the next tokens and states.
Everything is bound once, two times over: one side reads what the other wrote. On a GPU each side is a CUDA graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from lhruntime.manifest import read_manifest
from lhruntime.model import register_operators

from bench.decode_model import first_tokens, read_bytes

__all__ = ["Directory", "Loop"]

_TYPES = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
    "tensor(bfloat16)": (torch.bfloat16, 16),  # numpy has no name for it: the number of onnx
    "tensor(int64)": (torch.int64, np.int64),
    "tensor(int32)": (torch.int32, np.int32),
    "tensor(int8)": (torch.int8, np.int8),
    "tensor(uint8)": (torch.uint8, np.uint8),
}


class Directory:
    """A directory's decode graph in an onnxruntime session, for any batch.

    read: bytes of weights that a step reads; kind: "decode", or "step" where a directory has none: then the choice is
    torch's and each step waits for the other library; cuda_graph: whether a step is replayed
    Raises FileNotFoundError for a library of operators that is not there; operators None: without one.
    """

    def __init__(self, path: Path, device: str, operators: Path | None, cuda_graph: bool = True) -> None:
        manifest = read_manifest(path)
        pair = manifest.graphs[manifest.target]
        self.kind = "step" if pair.decode is None else "decode"
        file = path / (pair.decode or pair.step).file
        self.path, self.device, self.states, self.tokens = path, device, manifest.states, manifest.input
        self.output = manifest.output
        assert manifest.vocab_size is not None  # these are models of tokens
        self.vocabulary = manifest.vocab_size
        self.read = read_bytes(file)
        self.cuda_graph = cuda_graph and device == "cuda" and self.kind == "decode"
        self.operators = operators
        if operators is not None and not operators.is_file():
            raise FileNotFoundError(f"{operators} is not there: make ops")
        self.session = self._open(file)
        self._graphs = 0

    def _open(self, file: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        register_operators(options, self.operators)
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device == "cuda":
            settings = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
            settings["enable_cuda_graph"] = str(int(self.cuda_graph))
            providers = [("CUDAExecutionProvider", settings), *providers]
        session = ort.InferenceSession(file, options, providers=providers)
        if self.device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError(f"onnxruntime does not run on the GPU here, only on {session.get_providers()}")
        return session

    def number(self) -> str:
        """A name for a CUDA graph that no other one of this session has."""
        self._graphs += 1
        return str(self._graphs)

    @property
    def outputs(self) -> set[str]:
        return {value.name for value in self.session.get_outputs()}


class Loop:
    """Greedy decoding at a batch. state_bytes: of all states, held twice; traffic: read and written in a step."""

    def __init__(self, directory: Directory, batch: int) -> None:
        self._of, self.batch, self._now = directory, batch, 0
        self._device = torch.device(directory.device)
        types = {value.name: value.type for value in directory.session.get_inputs()}
        shapes = {state.input: state.sized(batch) for state in directory.states}

        def zeros() -> dict[str, torch.Tensor]:
            kinds = {name: _TYPES[types[name]][0] for name in shapes}
            return {name: torch.zeros(shapes[name], dtype=kinds[name], device=self._device) for name in shapes}

        self._sides = [zeros(), zeros()]
        self.state_bytes = sum(state.nbytes for state in self._sides[0].values())
        self.traffic = 2 * self.state_bytes
        first = torch.from_numpy(first_tokens(batch, directory.vocabulary))[:, None]
        self._tokens = [first.to(self._device) for _ in range(2)]
        self._kept: dict[str, torch.Tensor] = {}  # greedy: temperature 0, all tokens, no cut
        for value in directory.session.get_inputs():
            if value.name not in shapes and value.name != directory.tokens:
                kind = _TYPES[value.type][0]
                start = torch.ones if value.name == "top_p" else torch.zeros
                self._kept[value.name] = start([batch], dtype=kind, device=self._device)
        self._logits: torch.Tensor | None = None
        if directory.kind == "step":
            (logits,) = [value for value in directory.session.get_outputs() if value.name == directory.output]
            size = (batch, 1, int(logits.shape[-1]))
            self._logits = torch.empty(size, dtype=_TYPES[logits.type][0], device=self._device)
        self._runs = [self._bind(side) for side in (0, 1)]
        self._wait()

    def _bind(self, side: int) -> tuple[ort.IOBinding, ort.RunOptions]:
        directory = self._of
        binding = directory.session.io_binding()
        old, new = self._sides[side], self._sides[1 - side]
        for name, value in {directory.tokens: self._tokens[side], **old, **self._kept}.items():
            binding.bind_input(name, *_place(value))
        for state in directory.states:
            binding.bind_output(state.output, *_place(new[state.input]))
        if self._logits is not None:
            binding.bind_output(directory.output, *_place(self._logits))
        else:
            (tokens,) = directory.outputs - {state.output for state in directory.states}
            binding.bind_output(tokens, *_place(self._tokens[1 - side]))
        options = ort.RunOptions()
        if directory.device == "cuda":
            options.add_run_config_entry("gpu_graph_id", directory.number() if directory.cuda_graph else "-1")
            if self._logits is None:
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return binding, options

    def step(self) -> None:
        """One token for every sequence."""
        binding, options = self._runs[self._now]
        self._of.session.run_with_iobinding(binding, options)
        self._now = 1 - self._now
        if self._logits is not None:
            torch.argmax(self._logits, -1, out=self._tokens[self._now])
            self._wait()

    def generate(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """From tokens [batch] and states as they are, the next ones, [batch, count]."""
        self._tokens[self._now].copy_(tokens[:, None])
        self._wait()
        found = []
        for _ in range(count):
            self.step()
            self._wait()
            found.append(self._tokens[self._now].cpu().clone())
        return torch.cat(found, 1)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _place(value: torch.Tensor) -> tuple[str, int, Any, list[int], int]:
    """Device, its number, type, shape and address, as onnxruntime binds memory of others."""
    kind = next(number for dtype, number in _TYPES.values() if dtype == value.dtype)
    return value.device.type, value.device.index or 0, kind, list(value.shape), value.data_ptr()


def prepare() -> None:
    """Makes onnxruntime find the CUDA libraries that torch came with."""
    if torch.cuda.is_available() and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
