"""One validated config per stage. The command line's options are made from these fields and their descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lhcompile.errors import ConfigError

__all__ = [
    "BuildConfig",
    "CalibrationConfig",
    "DistillConfig",
    "LoadConfig",
    "LowerConfig",
    "Method",
    "PackageConfig",
    "Precision",
    "QuantizeConfig",
    "StateType",
    "StreamConfig",
    "Target",
    "build_config",
    "validated",
]

Target = Literal["portable", "cpu", "cuda", "web", "mcu"]
Precision = Literal["none", "fp16", "bf16", "fp8", "int8", "int4"]
StateType = Literal["float32", "float16", "int8"]
Method = Literal["auto", "hankel", "varpro"]


Config = TypeVar("Config", bound="_Config")


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoadConfig(_Config):
    """Where the model comes from."""

    checkpoint: Path | None = Field(None, description="Weights for a package.module:factory model.")
    config: Path | None = Field(None, description="The model's configuration, yaml or json.")
    context: int | None = Field(
        None, ge=1, description="Longest sequence, where neither checkpoint nor module says it."
    )
    features: int | None = Field(
        None, ge=1, description="The package.module:factory model takes so many channels of a signal, not token ids."
    )


class CalibrationConfig(_Config):
    """The sequences that choose orders and the sequences that fidelity is measured on."""

    calibration: Path | None = Field(
        None,
        description="Text (or .npy token ids, or features) to calibrate and measure on; sampled from the model, or "
        "white noise, if not given. One half chooses the orders, the other half gives the figures.",
    )
    tokenizer: Path | None = Field(
        None, description="tokenizer.json for the text; models of 256 tokens read bytes without one."
    )
    sequences: int | None = Field(
        None,
        ge=2,
        description="Sequences that choose the orders, and that give the figures; four times as many hold the budget. "
        "Without this option 32, and 131072 tokens for the budget, fewer for large models.",
    )
    seed: int = Field(0, ge=0, description="Seed for calibration sequences made here.")


_EXCLUDED = {
    "budget": ("order", "exact"),
    "order": ("exact",),
    "head": ("order", "exact", "uniform"),
    "heal": ("exact",),
    "reduce": ("exact",),
}
"""Options of distillation that make no sense together."""


class DistillConfig(_Config):
    """How far convolutions are reduced. Budget is the default; order and exact exclude it."""

    budget: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Allowed relative rise of the loss on calibration tokens, or relative error of the outputs of a "
        "continuous signal; 0.001 without order or exact.",
    )
    order: int | None = Field(None, ge=1, le=512, description="The same order for every filter, whatever the loss.")
    exact: bool = Field(False, description="Keep every convolution's own taps over a ring buffer.")
    method: Method = Field(
        "auto",
        description="How filters are reduced: hankel (seconds), varpro (poles refined), or auto, which refines orders "
        "up to 8.",
    )
    max_order: int = Field(64, ge=1, le=512, description="Largest order the budget may use.")
    heal: int = Field(
        0, ge=0, le=100_000, description="Steps of fine-tuning poles and residues against the model's own logits."
    )
    head: int = Field(
        1,
        ge=1,
        le=128,
        description="Up to so many first taps of a layer are kept exactly, where that makes its state smaller.",
    )
    reduce: bool = Field(
        False, description="Reduce state spaces that the model already has, as if they were long convolutions."
    )
    uniform: bool = Field(False, description="One order for all filters, for runtimes that need equal states.")

    @model_validator(mode="after")
    def _one_way(self) -> DistillConfig:
        asked = {
            "budget": self.budget is not None,
            "order": self.order is not None,
            "exact": self.exact,
            "head": self.head > 1,
            "heal": self.heal > 0,
            "reduce": self.reduce,
            "uniform": self.uniform,
        }
        for one, others in _EXCLUDED.items():
            for other in others:
                if asked[one] and asked[other]:
                    raise ValueError(f"--{one} and --{other} exclude each other")
        return self

    @property
    def rise(self) -> float:
        """The budget in force."""
        return 0.001 if self.budget is None else self.budget


class StreamConfig(_Config):
    """How much of a sequence the states have room for."""

    max_context: int | None = Field(
        None,
        ge=2,
        description="Positions that states which grow with the sequence have room for; the model's context if not "
        "given.",
    )


class LowerConfig(_Config):
    """What the graphs are made for."""

    target: list[Target] = Field(
        ["cpu"], min_length=1, description="Kind of runtime the graphs are made for; more than once for several."
    )

    mask: bool = Field(
        False,
        description="Also graphs with an attention_mask that stops rows, for batches of prompts that differ in length "
        "(targets cpu and cuda).",
    )

    @field_validator("target", mode="before")
    @classmethod
    def _one_alone(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("target")
    @classmethod
    def _each_once(cls, value: list[Target]) -> list[Target]:
        twice = {target for target in value if value.count(target) > 1}
        if twice:
            raise ValueError(f"{min(twice)} is named twice")
        return value

    @model_validator(mode="after")
    def _mask_has_a_target(self) -> LowerConfig:
        if self.mask and not {"cpu", "cuda"} & set(self.target):
            raise ValueError("--mask is for the targets cpu and cuda")
        return self


class QuantizeConfig(_Config):
    """How numbers are stored."""

    quantize: Precision = Field(
        "none", description="Precision of the weights; residues, norms and biases stay in float32."
    )
    quantize_budget: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Relative rise of the loss that rounding weights may cost on calibration tokens: those that hurt "
        "most get more bits. Without it a --budget that is given holds for this too.",
    )
    activations: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="How products of --quantize int8 round signals: by what each holds, or by fixed scales from "
        "calibration (targets cpu and portable).",
    )
    poles: int | None = Field(
        None, ge=3, le=24, description="Bits for the decay and for the angle of every pole, in place of float32."
    )
    state: StateType = Field(
        "float32",
        description="What states are kept in between calls; int8 by fixed scales from calibration. Drift is measured "
        "within the context; far beyond it neither float16 nor int8 follows float32.",
    )

    @model_validator(mode="after")
    def _fits(self) -> QuantizeConfig:
        if self.activations == "static" and self.quantize != "int8":
            raise ValueError("--activations static is for --quantize int8")
        if self.quantize_budget is not None and self.quantize == "none":
            raise ValueError("--quantize-budget needs --quantize")
        return self


class PackageConfig(_Config):
    """Where the result goes."""

    output: Path = Field(description="Directory to create.")
    force: bool = Field(False, description="Replace an existing built directory whole.")


class BuildConfig(_Config):
    """Everything a build needs besides the model's name."""

    load: LoadConfig = LoadConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    distill: DistillConfig = DistillConfig()
    streamify: StreamConfig = StreamConfig()
    lower: LowerConfig = LowerConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    package: PackageConfig

    @model_validator(mode="after")
    def _fits(self) -> BuildConfig:
        others = {"cuda", "web", "mcu"} & set(self.lower.target)
        if self.quantize.activations == "static" and others:
            raise ValueError(f"--activations static is for the targets cpu and portable, not {min(others)}")
        if self.quantize.quantize == "fp8" and set(self.lower.target) != {"cuda"}:
            raise ValueError("--quantize fp8 is for the target cuda, whose products it takes")
        if self.quantize.state == "int8" and "web" in self.lower.target:
            raise ValueError("--state int8 is not for the target web: WebGPU has no numbers of 8 bits")
        return self

    @property
    def weights_budget(self) -> float | None:
        """The relative rise of the loss that rounding weights may cost; None: whatever it costs."""
        own = self.quantize.quantize_budget
        return self.distill.budget if own is None and self.quantize.quantize != "none" else own

    @classmethod
    def sections(cls) -> dict[str, type[_Config]]:
        """Stage name → its config class, in the order of the pipeline."""
        return {name: field.annotation for name, field in cls.model_fields.items()}  # type: ignore[misc]


def build_config(**values: object) -> BuildConfig:
    """A BuildConfig from flat values, each going to the stage that has a field of its name.

    Raises ConfigError, one line, for an unknown name or a value its field refuses.
    """
    sections: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        homes = [stage for stage, config in BuildConfig.sections().items() if name in config.model_fields]
        if not homes:
            raise ConfigError(f"there is no option {name!r}")
        sections.setdefault(homes[0], {})[name] = value
    return validated(BuildConfig, sections)


def validated(config: type[Config], values: Mapping[str, object]) -> Config:
    """A config from its fields' values. Raises ConfigError, one line, for a value its field refuses."""
    try:
        return config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][-1]).replace("_", "-") if first["loc"] else ""
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(reason if reason.startswith("--") else f"--{where}: {reason}") from None
