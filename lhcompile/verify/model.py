"""What a build reports: the figures behind report.html, and report.json as they are.

Losses and KL are in nats per token, times in seconds, sizes in bytes, orders in real state dimensions. What
was not measured, or has no meaning for the model at hand, is None or an empty list. A figure that is not
finite is kept and written as the text NaN or Infinity, so that a report of a failure can still be read.
"""

from __future__ import annotations

from itertools import pairwise

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = [
    "BudgetReport",
    "FilterSample",
    "GraphReport",
    "HealingReport",
    "LayerReport",
    "ModelReport",
    "OrderTried",
    "PassReport",
    "PoleCloud",
    "Report",
    "RoundingBudget",
    "Spectrum",
    "StageFidelity",
    "WeightPrecision",
    "WeightsReport",
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class ModelReport(_Part):
    """The model that was compiled; `source` is the file or factory it came from.

    vocab_size of a token model; features, channels of the input of a continuous signal
    """

    family: str
    source: str
    parameters: int
    vocab_size: int | None = None
    features: int | None = None
    context_length: int


class StageFidelity(_Part):
    """The model after one stage, against the reference on the same tokens.

    name: reference, captured, distilled, streamed, onnx, and the precision of quantized graphs; of other targets than
        the first the target behind a comma
    tokens: predicted tokens, or positions of a continuous signal
    relative_error: of a continuous signal, relative l2 error of the outputs
    max_difference: largest absolute difference of any output (0 for the reference)
    """

    name: str
    tokens: int
    loss: float | None = None
    kl_mean: float | None = None
    top1_agreement: float | None = None
    relative_error: float | None = None
    max_difference: float | None = None


class LayerReport(_Part):
    """What one module's long convolution became; method "modal": a state space that the model had already.

    order_max, order_mean: 0 where taps are kept as they are, or where a direct term is enough
    tap_error: relative l2 distance of the taps, worst filter; None where taps are kept as they are
    hankel_bound: what no system of this order can go below for that filter, in the same unit
    heard_error: the distance weighted by what the filters hear, worst filter
    state_bytes: per sequence
    """

    module: str
    method: str
    filters: int
    channels: int
    order_max: int
    order_mean: float
    tap_error: float | None = None
    hankel_bound: float | None = None
    heard_error: float | None = None
    state_bytes: int

    @property
    def kept(self) -> bool:
        """Whether the taps are kept as they are."""
        return self.tap_error is None

    @property
    def given(self) -> bool:
        """Whether the model had a state space here already, which is exact."""
        return self.method == "modal"


class FilterSample(_Part):
    """One filter's taps and those of the system that replaced it, every `stride`-th of them.

    taps, fit: [length], entry i is the tap at distance i · stride into the past
    error: relative l2 distance over all taps
    """

    module: str
    filter: int
    taps: list[float]
    fit: list[float]
    error: float
    stride: int = 1

    @model_validator(mode="after")
    def _same_length(self) -> FilterSample:
        if len(self.taps) != len(self.fit) or not self.taps:
            raise ValueError(f"{self.module}: {len(self.taps)} taps but a fit of {len(self.fit)}")
        return self


class Spectrum(_Part):
    """Hankel singular values of one module's filters, largest first.

    hankel_singular_values: [count], the median over the filters; low and high: [count], a band about it
    order: the order that was chosen (the largest, where filters differ)
    """

    module: str
    hankel_singular_values: list[float]
    order: int
    low: list[float] = []
    high: list[float] = []


class PoleCloud(_Part):
    """All poles of one module; re, im: [poles]. A pole of exactly 0 is an unused entry and is not shown."""

    module: str
    re: list[float]
    im: list[float]

    @model_validator(mode="after")
    def _same_length(self) -> PoleCloud:
        if len(self.re) != len(self.im):
            raise ValueError(f"{self.module}: {len(self.re)} real parts and {len(self.im)} imaginary parts")
        return self


class OrderTried(_Part):
    """One allocation of the search for the budget.

    order: mean over the filters; rise: of the loss on calibration tokens, relative to the reference
    expected: an upper bound of the rise on other text, which is held against the budget
    """

    order: float
    loss: float
    rise: float
    expected: float


class BudgetReport(_Part):
    """The relative rise of the loss that was allowed, what was measured in the end, and what was tried.

    Of a continuous signal: the relative l2 error of the outputs.
    """

    requested: float
    measured: float | None = None
    orders: list[OrderTried] = []


class HealingReport(_Part):
    """Loss (KL for tokens sampled from the model) before and after fine-tuning, on tokens it did not train on.

    kept: whether it fell, and the healed systems were taken
    """

    before: float
    after: float
    kept: bool


class WeightsReport(_Part):
    """One kind of weight that was quantized: number of distinct tensors, their bytes before and after."""

    name: str
    tensors: int
    before: int
    after: int


class WeightPrecision(_Part):
    """The precision that one weight was given by what rounding it costs, and its bytes as stored.

    alone: the divergence where it alone is rounded to the fewest bits, nats per token; left: what is expected of it as
    it is
    """

    name: str
    precision: str
    bytes: int
    alone: float
    left: float


class RoundingBudget(_Part):
    """The relative rise of the loss that rounding weights was allowed, what was measured, and what each weight got."""

    requested: float
    measured: float | None = None
    weights: list[WeightPrecision] = []

    @property
    def counts(self) -> dict[str, int]:
        """precision → number of weights"""
        names = [weight.precision for weight in self.weights]
        return {name: names.count(name) for name in dict.fromkeys(names)}


class PassReport(_Part):
    """One step that rounds numbers: the stage after it against the stage before it, on the same tokens.

    rise: of the loss, relative to the loss before; None where that is 0, and for a continuous signal, which has errors
    """

    before: str
    after: str
    loss_before: float | None = None
    loss_after: float | None = None
    rise: float | None = None
    error_before: float | None = None
    error_after: float | None = None


class GraphReport(_Part):
    """Sizes of the step graph in ONNX nodes."""

    step_nodes: int
    nodes_per_layer: float | None = None


class Report(_Part):
    """Everything a build has to say. `stages` begins with the reference; the last one is what was written.

    calibration: where the sequences came from; notes: what loading assumed or skipped; genai: what to know of
        onnxruntime-genai, or why it cannot run the build
    layers: in the model's order; timings: stage → seconds; files: name → bytes
    state: what states are kept in; pole_bits, poles_coded: bits of a decay and an angle, and what the codes take
    fixed_signals: signals of products that are rounded by fixed scales, of how many; the others by each token's own
    passes: every step that rounds numbers, of the first target
    state_bytes: all states of one sequence, short convolutions included; capacity: positions that those which grow
        with it have room for, None where none does
    """

    model: ModelReport
    target: str
    quantize: str = "none"
    weights: list[WeightsReport] = []
    state: str = "float32"
    pole_bits: int | None = None
    poles_coded: WeightsReport | None = None
    rounding: RoundingBudget | None = None
    fixed_signals: tuple[int, int] | None = None
    passes: list[PassReport] = []
    command: str
    versions: dict[str, str] = {}
    calibration: str | None = None
    notes: list[str] = []
    genai: list[str] = []
    stages: list[StageFidelity]
    layers: list[LayerReport] = []
    samples: list[FilterSample] = []
    spectra: list[Spectrum] = []
    poles: list[PoleCloud] = []
    budget: BudgetReport | None = None
    healing: HealingReport | None = None
    graph: GraphReport | None = None
    state_bytes: int
    capacity: int | None = None
    timings: dict[str, float] = {}
    files: dict[str, int] = {}

    @model_validator(mode="after")
    def _has_stages(self) -> Report:
        if not self.stages:
            raise ValueError("a report needs at least its reference stage")
        return self

    @property
    def loss_rise(self) -> float | None:
        """(last loss − reference loss) / reference loss; None where there is no loss."""
        first, last = self.stages[0].loss, self.stages[-1].loss
        return None if first is None or last is None or first == 0 else (last - first) / abs(first)

    def measured(self, stages: list[StageFidelity], files: dict[str, int], timings: dict[str, float]) -> Report:
        """The same with the figures of every stage. The budget is held against the graphs before quantization."""
        seconds = {name: round(value, 3) for name, value in timings.items()}
        report = self.model_copy(update={"stages": stages, "files": files, "timings": seconds})
        distilled = next(stage for stage in stages if stage.name == "onnx")
        rise = self.model_copy(update={"stages": [stages[0], distilled]}).loss_rise
        measured = rise if distilled.relative_error is None else distilled.relative_error
        budget = self.budget and self.budget.model_copy(update={"measured": measured})
        passes = _passes(stages)
        cost = next((each for each in passes if each.before == "onnx"), None)
        rounding = self.rounding and self.rounding.model_copy(
            update={"measured": cost and (cost.error_after if cost.rise is None else cost.rise)}
        )
        return report.model_copy(update={"budget": budget, "passes": passes, "rounding": rounding})

    @property
    def order_mean(self) -> float | None:
        """Mean order over the filters that were made modal; None if there are none."""
        modal = [layer for layer in self.layers if not layer.kept]
        filters = sum(layer.filters for layer in modal)
        return sum(layer.order_mean * layer.filters for layer in modal) / filters if filters else None


_EXACT = ("reference", "captured", "distilled", "streamed", "onnx")
"""Stages that round nothing by intention."""


def _passes(stages: list[StageFidelity]) -> list[PassReport]:
    """The steps of the first target that round numbers, each beside the stage before it."""
    first = [stage for stage in stages if "," not in stage.name]
    return [_pass(*pair) for pair in pairwise(first) if pair[1].name not in _EXACT]


def _pass(before: StageFidelity, after: StageFidelity) -> PassReport:
    rise = None
    if before.loss is not None and after.loss is not None and before.loss != 0:
        rise = (after.loss - before.loss) / abs(before.loss)
    return PassReport(
        before=before.name,
        after=after.name,
        loss_before=before.loss,
        loss_after=after.loss,
        rise=rise,
        error_before=before.relative_error,
        error_after=after.relative_error,
    )
