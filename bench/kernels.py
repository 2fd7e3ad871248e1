"""The GPU kernels of runtimes/ops called by themselves on torch tensors, without onnxruntime."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["LIBRARY", "Kernels"]

Call = Callable[[], None]
LIBRARY = Path(os.environ.get("LHCOMPILE_OPS", Path(__file__).parents[1] / "build" / "ops" / "liblhcompile_ops.so"))

_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.float16: 10,
    torch.bfloat16: 16,
    torch.float8_e4m3fn: 17,
}  # as ONNX numbers them
_NORMS = {"none": 0, "layer": 1, "rms": 2}
_ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2}


def _structure(name: str, *groups: tuple[Any, str]) -> type[ctypes.Structure]:
    """A C structure as runtimes/ops/src/args.h has it."""
    fields = [(field, kind) for kind, names in groups for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_long, _int, _address = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
_MixerArgs = _structure(
    "MixerArgs",
    (_long, "batch time channels taps order states block outer"),
    (_int, "signal conv recurrent"),
    (_address, "projected conv_state state weight bias own other readout direct index"),
    (_address, "mixed new_conv_state new_state"),
    (_address, " ".join(f"past_{n}" for n in range(7))),
)
_LinearArgs = _structure(
    "LinearArgs",
    (_long, "rows width out"),
    (_int, "signal weight_type bias_type norm activation"),
    (ctypes.c_float, "epsilon"),
    (_address, "x weight bias residual weight_scale norm_scale norm_bias y"),
    (_int, "bytes"),
    (_address, "x_unit reach y_unit"),
)
_EmbeddingArgs = _structure(
    "EmbeddingArgs", (_long, "rows width entries"), (_int, "table_type"), (_address, "table scale tokens x")
)
_SampleArgs = _structure(
    "SampleArgs",
    (_long, "batch vocab"),
    (_int, "signal"),
    (_address, "logits uniform temperature top_p top_k tokens"),
)


class Kernels:
    """The library's launchers. Each method makes the outputs and the scratch memory once, → (outputs, call).

    `call` starts the kernels on torch's current stream, every time on the same memory, so it can be captured.
    Raises RuntimeError with what the library says.
    """

    def __init__(self, library: Path = LIBRARY) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("mixer", "linear", "embedding", "sample"):
            getattr(self._library, f"lhcompile_{name}").restype = ctypes.c_char_p
        for name in ("mixer", "linear"):
            getattr(self._library, f"lhcompile_{name}_scratch").restype = ctypes.c_size_t

    def step(self, inputs: tuple[Tensor | None, ...], block: int, outer: int) -> tuple[list[Tensor], Call]:
        """inputs as those of HyenaStep"""
        projected, state, weight, own = (_there(inputs[i]) for i in (0, 1, 2, 4))
        index, past = inputs[8], [_there(token) for token in inputs[9:]]
        batch, _, wide = projected.shape
        mixed, after = (_poisoned(x) for x in (projected.new_empty(batch, 1, wide // 3), torch.empty_like(state)))
        args = _MixerArgs(
            *(batch, 1, wide // 3, len(weight), len(own)),
            *(0 if index is None else state[0].numel(), block, outer),
            *(_TYPES[x.dtype] for x in (projected, projected, state)),
            *(_pointer(x) for x in (projected, None, *inputs[1:9], mixed, None, after, *past)),
        )
        return [mixed, after], self._call("mixer", args, (inputs, mixed, after))

    def mixer(
        self, inputs: tuple[Tensor | None, ...], block: int, outer: int, in_place: bool = False
    ) -> tuple[list[Tensor], Call]:
        """inputs as those of HyenaMixer; in_place: the new states take the place of the old ones"""
        index = inputs[-1]
        projected, conv, state, weight, own = (_there(inputs[i]) for i in (0, 1, 2, 3, 5))
        batch, time, wide = projected.shape
        mixed = _poisoned(projected.new_empty(batch, time, wide // 3))
        after = [conv, state] if in_place else [_poisoned(torch.empty_like(x)) for x in (conv, state)]
        args = _MixerArgs(
            *(batch, time, wide // 3, len(weight), len(own)),
            *(0 if index is None else state[0].numel(), block, outer),
            *(_TYPES[x.dtype] for x in (projected, conv, state)),
            *(_pointer(x) for x in inputs),
            *(_pointer(x) for x in (mixed, *after)),
        )
        return [mixed, *after], self._call("mixer", args, (inputs, mixed, after))

    def linear(
        self,
        inputs: tuple[Tensor | None, ...],
        norm: str = "none",
        activation: str = "none",
        epsilon: float = 1e-5,
    ) -> tuple[list[Tensor], Call]:
        x, weight = (_there(inputs[i]) for i in (0, 1))
        bias, residual, scale, shift, *rest = inputs[2:]
        weight_scale = rest[0] if rest else None
        y = _poisoned(x.new_empty(*x.shape[:-1], len(weight)))
        args = _LinearArgs(
            *(x[..., 0].numel(), x.shape[-1], len(weight)),
            *(_type(v) for v in (x, weight, bias)),
            *(_NORMS[norm], _ACTIVATIONS[activation], epsilon),
            *(_pointer(v) for v in (x, weight, bias, residual, weight_scale, scale, shift, y)),
        )
        return [y], self._call("linear", args, (inputs, y))

    def mlp(
        self,
        inputs: tuple[Tensor | None, ...],
        norm: str = "none",
        activation: str = "none",
        epsilon: float = 1e-5,
    ) -> tuple[list[Tensor], Call]:
        """inputs as those of MlpFp8"""
        x, up, down = (_there(inputs[i]) for i in (0, 1, 3))
        up_bias, down_bias, residual, scale, shift, up_scale, down_scale, reach = inputs[2:3] + inputs[4:]
        rows = x[..., 0].numel()
        codes = torch.empty(rows, len(up), dtype=torch.uint8, device=x.device)
        units, y = _poisoned(torch.empty(rows, device=x.device)), _poisoned(x.new_empty(*x.shape[:-1], len(down)))
        settings = _NORMS[norm], _ACTIVATIONS[activation], epsilon
        first = _LinearArgs(
            *(rows, up.shape[1], len(up), *(_type(v) for v in (x, up, up_bias)), *settings),
            *(_pointer(v) for v in (x, up, up_bias, None, up_scale, scale, shift, codes)),
            *(0, None, _pointer(reach), _pointer(units)),
        )
        second = _LinearArgs(
            *(rows, down.shape[1], len(down), *(_type(v) for v in (x, down, down_bias)), 0, 0, 0.0),
            *(_pointer(v) for v in (codes, down, down_bias, residual, down_scale, None, None, y)),
            *(0, _pointer(units), None, None),
        )
        halves = [self._call("linear", args, (inputs, codes, units, y)) for args in (first, second)]

        def call() -> None:
            for half in halves:
                half()

        return [y], call

    @contextmanager
    def withheld(self, withheld: bool = True) -> Iterator[None]:
        """Calls do without the products that need compute capability 9.0, as on other GPUs."""
        self._library.lhcompile_withhold(int(withheld))
        try:
            yield
        finally:
            self._library.lhcompile_withhold(0)

    def embedding(self, inputs: tuple[Tensor | None, ...]) -> tuple[list[Tensor], Call]:
        """inputs as those of Embedding, or of EmbeddingInt4"""
        table, tokens = (_there(inputs[i]) for i in (0, 1))
        scale = inputs[2] if len(inputs) > 2 else None
        width, dtype = (table.shape[1], table.dtype) if scale is None else (32 * table.shape[1], torch.float16)
        x = _poisoned(torch.empty(*tokens.shape, width, dtype=dtype, device=table.device))
        args = _EmbeddingArgs(
            *(tokens.numel(), width, len(table), _TYPES[table.dtype]),
            *(_pointer(each) for each in (table, scale, tokens, x)),
        )
        return [x], self._call("embedding", args, (inputs, x), scratch=False)

    def sample(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Call]:
        logits, uniform, temperature, top_k, top_p = inputs
        tokens = torch.full((len(logits), 1), -1, dtype=torch.int64, device=logits.device)
        args = _SampleArgs(
            *(len(logits), logits.shape[-1], _TYPES[logits.dtype]),
            *(_pointer(x) for x in (logits, uniform, temperature, top_p, top_k, tokens)),
        )
        return [tokens], self._call("sample", args, (inputs, tokens), scratch=False)

    def _call(self, name: str, args: ctypes.Structure, held: object, scratch: bool = True) -> Call:
        """held: what must live as long as the call"""
        memory = []
        if scratch:
            size = getattr(self._library, f"lhcompile_{name}_scratch")(ctypes.byref(args))
            memory.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

        def call() -> None:
            _ = held
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            addresses = [ctypes.c_void_p(x.data_ptr()) for x in memory]
            problem = getattr(self._library, f"lhcompile_{name}")(ctypes.byref(args), *addresses, stream)
            if problem:
                raise RuntimeError(problem.decode())

        return call


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _type(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _TYPES[tensor.dtype]


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _poisoned(tensor: Tensor) -> Tensor:
    """Filled with NaN, so that what is not written is seen."""
    return tensor.fill_(float("nan"))
