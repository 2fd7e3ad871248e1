"""Small models of other shapes than the example's, trained here and built with default settings.

    python -m bench.shapes --out docs/bench          writes shapes.json and the table made from it
    python -m bench.shapes --minutes 0.2             trained for seconds, to see that it works

Each is a byte-level language model of 4 layers, width 128, context 512, trained on the Python source found on this
machine, on a GPU where there is one (two CPU cores need hours for as much), and kept in build/shapes. Of the held-out
text, which no model was trained on, the build calibrates on a half and is judged on the other; the loss with all long
filters zero says how much they matter.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from bench.machine import describe
from lhcompile.api import build
from lhcompile.load.lm import LanguageModel
from lhcompile.load.multihyena import MultiHyenaConfig, MultiHyenaLM
from lhcompile.load.safari import HyenaConfig, HyenaFilter, HyenaLM

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples/pysource"))

from corpus import installed_sources, joined, split  # noqa: E402
from train import initialise, loss_on, optimizer_for, stored, tokens_of  # noqa: E402

CONTEXT, BATCH, WARMUP, RATE, HELDOUT = 512, 64, 0.05, 3e-3, 256 << 10
COMMON: dict[str, Any] = {"d_model": 128, "n_layer": 4, "d_inner": 256, "vocab_size": 256, "l_max": CONTEXT}
HYENA = COMMON | {"emb_dim": 33, "filter_order": 64, "w": 14.0}
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    options: Row
    module: Callable[[Row], LanguageModel]


def _hyena(options: Row) -> LanguageModel:
    return HyenaLM(HyenaConfig(**options))


def _multihyena(options: Row) -> LanguageModel:
    return MultiHyenaLM(MultiHyenaConfig(**options))


SHAPES = {
    "Hyena, order 2": Shape(HYENA | {"order": 2}, _hyena),
    "Hyena, order 3": Shape(HYENA | {"order": 3}, _hyena),
    "tied heads": Shape(HYENA | {"num_heads": 16, "use_norm": False}, _multihyena),
    "HyenaDNA settings": Shape(COMMON | {"emb_dim": 5, "filter_order": 64, "w": 10.0, "shift": 0.05}, _hyena),
}


def train(model: LanguageModel, text: Tensor, minutes: float) -> int:
    """Trains for so long, the rate rising, then falling as a cosine to nothing; returns the number of steps."""
    initialise(model)
    optimizer = optimizer_for(model, RATE)
    rates = [group["lr"] for group in optimizer.param_groups]
    device = text.device
    picks, within = torch.Generator(device).manual_seed(0), torch.arange(CONTEXT + 1, device=device)
    started, steps = time.perf_counter(), 0
    while (done := (time.perf_counter() - started) / (60 * minutes)) < 1:
        factor = min(1.0, done / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        first = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=picks, device=device)
        window = text[first + within].long()
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


def device_name(text: Tensor) -> str:
    return torch.cuda.get_device_name() if text.is_cuda else "cpu"


def without_filters(model: LanguageModel) -> LanguageModel:
    """The model, its long filters zero from now on."""
    for module in model.modules():
        if isinstance(module, HyenaFilter):
            nn.init.zeros_(module.get_parameter(f"implicit_filter.{len(module.implicit_filter) - 1}.weight"))
    return model


def trained(name: str, folder: Path, text: Tensor, heldout: Tensor, minutes: float) -> Row:
    """Writes model.pt and config.yaml, unless they are there, and figures.json about them."""
    figures = folder / "figures.json"
    if not figures.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shape = SHAPES[name]
        torch.manual_seed(0)
        model = shape.module(shape.options).to(text.device)
        steps = train(model, text, minutes)
        torch.save(stored(model), folder / "model.pt")
        (folder / "config.yaml").write_text(yaml.safe_dump(shape.options))
        row = {"steps": steps, "minutes": minutes, "device": device_name(text)}
        row["loss"] = loss_on(model.eval(), heldout, CONTEXT)
        row["loss_without_filters"] = loss_on(without_filters(model), heldout, CONTEXT)
        figures.write_text(json.dumps(row))
    return dict(json.loads(figures.read_text()))


def built(folder: Path) -> Row:
    """Figures of a build with default settings."""
    report = build(
        str(folder / "model.pt"), config=folder / "config.yaml", calibration=folder.parent / "heldout.txt",
        output=folder / "built", force=True,
    )  # fmt: skip
    last = report.stages[-1]
    return {"order_mean": report.order_mean, "rise": report.loss_rise, "kl": last.kl_mean, "tokens": last.tokens}


def table(result: Row) -> str:
    head = "| shape | loss | filters zero | mean order | rise | KL |\n|---|---|---|---|---|---|\n"
    rows = "".join(
        f"| {name} | {row['loss']:.4f} | {row['loss_without_filters']:.4f} | {row['order_mean']:.2f} "
        f"| {row['rise']:+.3%} | {row['kl']:.1e} |\n"
        for name, row in result["shapes"].items()
    )
    machine = result["machine"]
    devices = ", ".join(sorted({row["device"] for row in result["shapes"].values()}))
    made = f"Made by `{result['command']}`; trained on {devices}, built on {machine['processor']}.\n"
    said = (__doc__ or "").split("\n\n")[-1].strip()
    return f"# Other shapes\n\n{said}\n\n{head}{rows}\n{made}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.5, help="of training, each shape")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/shapes", help="where trained models are kept")
    parser.add_argument("--out", type=Path, help="folder for shapes.json and shapes.md")
    options = parser.parse_args()
    files, kept_out = split(installed_sources(), HELDOUT, 100_000_000)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text, heldout = (tokens_of(joined(part), device) for part in (files, kept_out))
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "heldout.txt").write_bytes(joined(kept_out))
    rows: Row = {}
    for name in SHAPES:
        folder = options.folder / name.replace(",", "").replace(" ", "-")
        rows[name] = trained(name, folder, text, heldout, options.minutes) | built(folder)
        print(name, rows[name], flush=True)
    command = f"python -m bench.shapes --minutes {options.minutes:g}"
    result = {"command": command, "machine": describe(), "shapes": rows}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "shapes.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "shapes.md").write_text(table(result))


if __name__ == "__main__":
    main()
