"""The Transformer in llama.cpp: random weights in a GGUF file, architecture "gpt2", driven through its C functions."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from bench.decode_model import Shape

__all__ = ["Llama", "write"]

KINDS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}


def write(shape: Shape, path: Path, kind: str, positions: int, seed: int = 0) -> None:
    """All matrices in one of KINDS, the embedding too, which is the head; norms, biases and positions in float32."""
    stored, file = KINDS[kind]
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(positions)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(file)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = draw.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns))
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, stored), raw_dtype=stored)

    def vector(name: str, value: float, width: int = shape.width) -> None:
        writer.add_tensor(name, np.full(width, value, np.float32))

    d, inner = shape.width, shape.inner
    matrix("token_embd", shape.vocabulary, d)
    writer.add_tensor("position_embd.weight", draw.standard_normal((positions, d), np.float32) / 50)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            vector(f"{block}.{norm}.weight", 1)
            vector(f"{block}.{norm}.bias", 0)
        for name, rows, columns in (
            ("attn_qkv", 3 * d, d), ("attn_output", d, d), ("ffn_up", inner, d), ("ffn_down", d, inner)
        ):  # fmt: skip
            matrix(f"{block}.{name}", rows, columns)
            vector(f"{block}.{name}.bias", 0, rows)
    vector("output_norm.weight", 1)
    vector("output_norm.bias", 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp's log, of which errors alone are shown."""
    if level == 4:
        print(text.decode(errors="replace"), end="", flush=True)


class Llama:
    """Greedy decoding of one sequence whose cache holds `context` tokens after `group` steps.

    wide: keys and values in float32, otherwise as llama.cpp does it by itself, in float16
    """

    def __init__(self, path: Path, context: int, threads: int, group: int, wide: bool = False) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, min(context, 512), min(context, 512)
        options.n_threads = options.n_threads_batch = threads
        if wide:
            options.type_k = options.type_v = 0  # GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context of {context} tokens for {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._filled = context - group
        self._token = 1
        prompt = np.random.default_rng(0).integers(0, self._vocabulary, self._filled).astype(np.int32)
        for start in range(0, self._filled, options.n_batch):
            self._decode(prompt[start : start + options.n_batch])
        layers = llama_cpp.llama_model_n_layer(model)
        width = llama_cpp.llama_model_n_embd(model)
        self.cache_bytes = 2 * layers * width * context * (4 if wide else 2)

    def step(self) -> None:
        """One token."""
        self._token = int(self.logits(self._token).argmax())

    def logits(self, token: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Behind the token, [vocabulary]; overwritten by the next call."""
        self._decode(np.array([token], np.int32))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._vocabulary,))

    def rewind(self) -> None:
        """Forgets the steps."""
        memory = llama_cpp.llama_get_memory(self._context)
        if not llama_cpp.llama_memory_seq_rm(memory, 0, self._filled, -1):
            raise RuntimeError("llama.cpp does not forget single tokens")

    def _decode(self, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        pointer = np.ascontiguousarray(tokens).ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(pointer, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode says {status}")
