"""manifest.json: what a built directory holds and how a runtime drives it (format_version 1).

A manifest is a contract with runtimes that this package never sees, so it is read strictly: an unknown key, a
wrong type or a number that is not finite is an error, and so is a file name that leaves the directory.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lhcompile.errors import LhcompileError

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Distillation",
    "ExternalWeights",
    "FeatureFidelity",
    "FileEntry",
    "Graph",
    "Graphs",
    "Inputs",
    "Manifest",
    "ModelInfo",
    "Outputs",
    "PackageError",
    "State",
    "TokenFidelity",
    "Tokenizer",
    "Weight",
    "inside",
    "read_manifest",
]

FORMAT: Literal["lhcompile"] = "lhcompile"
FORMAT_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"


class PackageError(LhcompileError):
    """A built directory is not one, is damaged, or was written by a newer version."""


def inside(name: str) -> str:
    """Passes a relative posix path that stays in its directory; ValueError for any other."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and path.parts and not set("\\\0") & set(name)
    if not plain or ".." in path.parts:
        raise ValueError(f"{name!r} is not a file inside the built directory")
    return name


Target = Literal["portable", "cpu", "cuda", "web", "mcu"]
FileName = Annotated[str, AfterValidator(inside)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
NonNegative = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelInfo(_Part):
    """The model that was compiled. `vocab_size` is absent for models of continuous signals."""

    family: Name
    vocab_size: Positive | None = None
    context_length: Positive
    parameters: Count


class Tokenizer(_Part):
    """How text becomes token ids: `bytes` (one id per UTF-8 byte), or a kind that reads `file`."""

    kind: Name
    file: FileName | None = None


class Weight(_Part):
    """One tensor in a file of weights: its first byte, its dtype by numpy's name, its shape."""

    offset: Count
    dtype: Name
    shape: list[Count]


class ExternalWeights(_Part):
    """The initializers of a graph that lie in a file beside it, by name; a runtime may map them once for all graphs."""

    file: FileName
    tensors: dict[Name, Weight]


class Graph(_Part):
    """One ONNX file, and its weights where they lie in another."""

    file: FileName
    weights: ExternalWeights | None = None


class Past(_Part):
    """A state [batch, positions, channels] in tensors of its own, [batch, 1, channels] for each of its positions.

    inputs: in its place among the inputs, the oldest position first
    output: in its place among the outputs, the position that is the newest in the next call; the others become older
    dtype: of the tensors, where it is not the state's: those of a float32 state may be bfloat16, which holds all of it
    """

    inputs: list[Name]
    output: Name
    dtype: Literal["bfloat16"] | None = None


class Graphs(_Part):
    """Two graphs with the same inputs and outputs in the same order; step takes one position a call.

    decode: the step graph with the choice of the next token behind it. Its inputs are those of the step graph, then
        uniform float32 in [0, 1), temperature float32, top_k int64 and top_p float32, all [batch]; its outputs are
        tokens int64 [batch, 1] in place of the logits, and the new states
    past: of the states, by their input in the step, those that decode has in tensors of their own
    batch: rows that they are for, any number if it is not said
    """

    step: Graph
    prefill: Graph
    decode: Graph | None = None
    past: dict[Name, Past] | None = None
    batch: Positive | None = None

    @property
    def apart(self) -> dict[Name, list[Name]]:
        """The inputs of each state in `past`."""
        return {name: each.inputs for name, each in (self.past or {}).items()}


class Inputs(_Part):
    """The data input's name: `tokens` int64 [batch, seq] or `features` float32 [batch, seq, channels]."""

    tokens: Name | None = None
    features: Name | None = None


class Outputs(_Part):
    """The name of the data output: `logits` [batch, seq, vocab] or `values` [batch, seq, channels]."""

    logits: Name | None = None
    values: Name | None = None


class State(_Part):
    """A tensor carried from call to call, zero at the start; `shape` names its dynamic axes.

    capacity: how many positions a state that grows with the sequence has room for
    """

    input: Name
    output: Name
    shape: list[Count | Name]
    dtype: Literal["float32", "float16", "int8", "int64", "int32"]
    kind: Name
    module: str
    capacity: Positive | None = None

    @model_validator(mode="after")
    def _has_batch(self) -> State:
        if self.shape.count("batch") != 1:
            raise ValueError(f"state {self.input} needs exactly one axis named batch, not {self.shape}")
        return self


class Distillation(_Part):
    """What became of one module's long filters. Orders count real state dimensions.

    tap_error: relative l2 distance of the taps, worst filter
    hankel_bound: what the discarded Hankel singular values say about it, in the same unit
    """

    module: Name
    method: Name
    filters: Positive
    order_max: Count
    order_mean: NonNegative
    tap_error: NonNegative
    hankel_bound: NonNegative | None = None


class TokenFidelity(_Part):
    """The compiled model against its source on the same tokens. Losses and KL in nats per token."""

    tokens: Positive
    loss_reference: float
    loss_compiled: float
    kl_mean: float
    top1_agreement: Annotated[float, Field(ge=0, le=1)]


class FeatureFidelity(_Part):
    """The same for continuous signals: relative l2 error and largest absolute difference of the outputs."""

    positions: Positive
    relative_error: NonNegative
    max_difference: NonNegative


class FileEntry(_Part):
    """Checksum (lower-case hexadecimal) and size of one file."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Count


class Manifest(_Part):
    """The whole of manifest.json.

    graphs: those of `target`; variants: those of other targets, with the same states
    masked: those with an attention_mask [batch, total] behind the tokens, of the first target for cpu or cuda
    files: empty until the directory is written (`write.package`)
    """

    format: Literal["lhcompile"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    lhcompile_version: Name
    target: Target
    quantize: Literal["none", "fp16", "bf16", "fp8", "int8", "int4"] | None = None
    model: ModelInfo
    tokenizer: Tokenizer | None = None
    graphs: Graphs
    variants: dict[Target, Graphs] | None = None
    masked: Graphs | None = None
    inputs: Inputs
    outputs: Outputs
    states: list[State]
    distillation: list[Distillation] = []
    fidelity: TokenFidelity | FeatureFidelity | None = None
    timings: dict[str, NonNegative] = {}
    files: dict[FileName, FileEntry] = {}

    @model_validator(mode="after")
    def _one_kind_of_model(self) -> Manifest:
        tokens = self.inputs.tokens is not None and self.inputs.features is None
        logits = self.outputs.logits is not None and self.outputs.values is None
        features = self.inputs.features is not None and self.inputs.tokens is None
        values = self.outputs.values is not None and self.outputs.logits is None
        if not (tokens and logits) and not (features and values):
            raise ValueError("a model goes from tokens to logits or from features to values")
        if tokens and self.model.vocab_size is None:
            raise ValueError("a token model needs model.vocab_size")
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> Manifest:
        names = [state.input for state in self.states] + [state.output for state in self.states]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two states share the name {min(twice)}")
        missing = [name for name in self.named_files if self.files and name not in self.files]
        if missing:
            raise ValueError(f"{missing[0]} is named but not listed in files")
        return self

    @property
    def named_files(self) -> list[str]:
        """The files that other parts of the manifest refer to."""
        pairs = [pair for pair in (self.graphs, *(self.variants or {}).values(), self.masked) if pair is not None]
        graphs = [graph for pair in pairs for graph in (pair.step, pair.prefill, pair.decode) if graph is not None]
        named = [graph.file for graph in graphs]
        named += sorted({graph.weights.file for graph in graphs if graph.weights is not None})
        if self.tokenizer is not None and self.tokenizer.file is not None:
            named.append(self.tokenizer.file)
        return named

    def to_json(self) -> str:
        """The text of manifest.json; keys that hold nothing are left out."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks directory/manifest.json; the files it lists are not opened (`write.verify_files`).

    Raises PackageError, one line: no such file, not JSON, another format or version, the first wrong entry.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PackageError(
            f"{directory} is not a built directory: cannot read {MANIFEST_NAME} ({error.strerror})"
        ) from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise PackageError(f"{path}: {_first_problem(error)}") from None
    if not {"format", "format_version", "files"} <= manifest.model_fields_set:
        raise PackageError(f"{path}: format, format_version and files must all be there")
    return manifest


def _first_problem(error: ValidationError) -> str:
    """The first validation error as `where: what`, with a count of the others."""
    problems: list[Any] = list(error.errors(include_url=False))
    first = min(problems, key=lambda p: p["loc"][:1] not in (("format",), ("format_version",)))
    where = ".".join(str(part) for part in first["loc"])
    what = re.sub(r"^Value error, ", "", first["msg"])
    if where in ("format", "format_version"):
        what = f"is {first['input']!r}; this version reads {FORMAT} manifests of version {FORMAT_VERSION}"
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {what}{others}" if where else f"{what}{others}"
