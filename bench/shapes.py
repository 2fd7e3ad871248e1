"""Small models of other shapes than the example's, trained here and built with default settings.

    python -m bench.shapes --out docs/bench          writes shapes.json and the table made from it
    python -m bench.shapes --minutes 0.2             trained for seconds, to see that it works

Each is a byte-level language model of 4 layers, width 128, context 512, trained on the Python source found on this
machine, on a GPU where there is one (two CPU cores need hours for as much), and kept in build/shapes. Of the held-out
text, which no model was trained on, the build calibrates on a half. The built graphs are judged on all of the other
half, not only on the few sequences that a report measures; the standard error beside the rise is that of 16 stretches
of it. The loss with all long filters zero says how much they matter.
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
from lhruntime import Session
from torch import Tensor, nn

from bench.machine import describe
from lhcompile.api import build
from lhcompile.distill.judge import block_error
from lhcompile.load import load
from lhcompile.load.lm import LanguageModel
from lhcompile.load.multihyena import MultiHyenaConfig, MultiHyenaLM
from lhcompile.load.safari import HyenaConfig, HyenaFilter, HyenaLM
from lhcompile.measure import losses, losses_and_divergences
from lhcompile.parallel import one_thread
from lhcompile.verify import SessionModel

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


def train_missing(folders: dict[str, Path], kept: Path, minutes: float) -> None:
    """Trains the models that are not there yet; kept: where the text is that none was trained on."""
    missing = [name for name, folder in folders.items() if not (folder / "figures.json").is_file()]
    if not missing:
        return
    files, kept_out = split(installed_sources(), HELDOUT, 100_000_000)
    if len(missing) < len(folders) and joined(kept_out) != kept.read_bytes():
        sys.exit(f"the text on this machine is no longer what models in {kept.parent} were trained on: remove them")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text, heldout = (tokens_of(joined(part), device) for part in (files, kept_out))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(joined(kept_out))
    for name in missing:
        trained(name, folders[name], text, heldout, minutes)


def trained(name: str, folder: Path, text: Tensor, heldout: Tensor, minutes: float) -> None:
    """Writes model.pt and config.yaml, and figures.json about them."""
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
    (folder / "figures.json").write_text(json.dumps(row))


def built(folder: Path) -> Row:
    """Figures of a build with default settings, and of its graphs on all of the text that it did not calibrate on."""
    text, source = folder.parent / "heldout.txt", str(folder / "model.pt")
    tokens = torch.tensor(list(text.read_bytes()))
    module = load(source, config=folder / "config.yaml").module
    known = json.loads((folder / "figures.json").read_text())["loss"]
    if not math.isclose(loss_on(module, tokens, CONTEXT), known, rel_tol=1e-3):
        sys.exit(f"{text} is not the text that {source} was measured on: it may have been trained on this one")
    started = time.perf_counter()
    report = build(
        source, config=folder / "config.yaml", calibration=text, output=folder / "built", force=True,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    windows = tokens[len(tokens) // 2 :].unfold(0, CONTEXT, CONTEXT)
    graphs = SessionModel(lambda rows: Session.load(folder / "built", batch=rows))
    with one_thread():  # a session is for one caller
        before, (after, costs) = losses(module, windows), losses_and_divergences(module, graphs, windows)
    rises = (after - before) / before.mean()
    reported = {"rise_in_report": report.loss_rise, "tokens_in_report": report.stages[-1].tokens}
    return reported | {
        "order_mean": report.order_mean, "rise": float(rises.mean()), "rise_error": block_error(rises),
        "kl": float(costs.mean()), "tokens": windows.numel(), "build_seconds": seconds,
        "trials": [vars(trial) for trial in report.budget.orders] if report.budget is not None else [],
    }  # fmt: skip


def table(result: Row) -> str:
    head = "| shape | loss | filters zero | mean order | rise | KL |\n|---|---|---|---|---|---|\n"
    rows = "".join(
        f"| {name} | {row['loss']:.4f} | {row['loss_without_filters']:.4f} | {row['order_mean']:.2f} "
        f"| {row['rise']:+.3%} ± {row['rise_error']:.3%} | {row['kl']:.1e} |\n"
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
    folders = {name: options.folder / name.replace(",", "").replace(" ", "-") for name in SHAPES}
    train_missing(folders, options.folder / "heldout.txt", options.minutes)
    rows: Row = {}
    for name, folder in folders.items():
        rows[name] = json.loads((folder / "figures.json").read_text()) | built(folder)
        print(name, rows[name], flush=True)
    minutes = max(row["minutes"] for row in rows.values())
    command = f"python -m bench.shapes --minutes {minutes:g}"
    result = {"command": command, "machine": describe(), "shapes": rows}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "shapes.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "shapes.md").write_text(table(result))


if __name__ == "__main__":
    main()
