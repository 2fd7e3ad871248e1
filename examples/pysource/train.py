"""Trains the example model, a byte-level Hyena language model of Python source, from nothing.

    python examples/pysource/train.py --out examples/pysource

Writes model.pt (state dict under safari's key names), config.yaml, heldout.txt and train_log.jsonl. The last
line of the log is measured on model.pt as it was stored. Runs on CUDA when there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from corpus import installed_sources, joined, split  # noqa: E402

from lhcompile.load.safari import HyenaConfig, HyenaLM  # noqa: E402

KEPT_FLOAT32 = ("pos_emb.z", "pos_emb.t", "modulation.deltas", "freq")  # the filters stay as trained


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=64, help="windows per step")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256, help="d_model; d_inner is twice that")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-mb", type=float, default=100, help="at most this much training text")
    parser.add_argument("--heldout-kb", type=float, default=256)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    return parser.parse_args()


STEPS = 10_000


def initialise(model: HyenaLM) -> None:
    """Normal weights of deviation 0.02; the two projections into the residual are smaller with depth."""
    layers = len(model.backbone.layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            into_residual = name.endswith(("out_proj", "fc2"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if into_residual else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def filters_in_float32(model: HyenaLM, device: str) -> None:
    """Keeps the implicit filters, and with them the FFTs, out of autocast."""
    for layer in model.backbone.layers:
        filter_fn = layer.mixer.filter_fn

        def full(length: int, inner: Any = filter_fn.filter) -> Tensor:
            with torch.autocast(device, enabled=False):
                return inner(length)

        filter_fn.filter = full


def optimizer_for(model: HyenaLM, lr: float) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only, and slower rates for the filters and their position tables."""
    groups: dict[str, list[Tensor]] = {"matrix": [], "vector": [], "filter": [], "table": []}
    for name, parameter in model.named_parameters():
        if name.endswith("pos_emb.z"):
            kind = "table"
        elif "filter_fn" in name:
            kind = "filter"
        else:
            kind = "matrix" if parameter.ndim == 2 else "vector"
        groups[kind].append(parameter)
    settings = {"matrix": (lr, 0.1), "vector": (lr, 0.0), "filter": (min(lr, 1e-3), 0.0), "table": (1e-5, 0.0)}
    return torch.optim.AdamW(
        [{"params": p, "lr": settings[k][0], "weight_decay": settings[k][1]} for k, p in groups.items()],
        betas=(0.9, 0.95),
    )


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def tokens_of(text: bytes, device: str) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


@torch.no_grad()
def loss_on(model: nn.Module, tokens: Tensor, context: int) -> float:
    """Mean loss in nats per byte over windows of `context` bytes, each starting without memory.

    tokens: uint8 [bytes]; every byte but the first of the text, and what does not fill a window, is predicted once
    """
    windows = tokens[: (len(tokens) - 1) // context * context + 1].unfold(0, context + 1, context)
    total = 0.0
    for batch in windows.split(16):
        logits = model(batch[:, :-1].long()).float()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].long().flatten(), reduction="sum"))
    return total / (len(windows) * context)


def stored(model: HyenaLM) -> dict[str, Tensor]:
    """The state dict as it is saved: half precision but for the tables; equal tensors are stored once."""
    kept: dict[bytes, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu().to(torch.float32 if key.endswith(KEPT_FLOAT32) else torch.float16)
        content = str(value.shape).encode() + value.contiguous().numpy().tobytes()
        state[key] = kept.setdefault(content, value)
    return state


def safari_config(config: HyenaConfig) -> dict[str, Any]:
    """The configuration in the form of a safari experiment."""
    layer = {
        "_name_": "hyena",
        "l_max": config.l_max,
        "order": config.order,
        "filter_order": config.filter_order,
        "short_filter_order": config.short_filter_order,
        "emb_dim": config.emb_dim,
        "num_inner_mlps": config.num_inner_mlps,
        "w": config.w,
        "modulate": config.modulate,
        "shift": config.shift,
    }
    model = {
        "_name_": "lm",
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "d_inner": config.d_inner,
        "vocab_size": config.vocab_size,
        "layer": layer,
        "layer_norm_epsilon": config.layer_norm_epsilon,
    }
    return {"model": model}


def train(model: HyenaLM, text: Tensor, heldout: Tensor, args: argparse.Namespace, log: Log) -> None:
    device = text.device.type
    optimizer = optimizer_for(model, args.lr)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s, args.steps, args.warmup))
    filters_in_float32(model, device)
    run = torch.compile(model) if args.compile else model
    picks = torch.Generator(device=device).manual_seed(args.seed)
    within = torch.arange(args.context + 1, device=device)
    recent: list[Tensor] = []
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(text) - args.context, (args.batch, 1), generator=picks, device=device)
        window = text[starts + within].long()
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = run(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        recent.append(loss.detach())
        if step % args.eval_every == 0 or step == args.steps:
            line = {"step": step, "loss": float(torch.stack(recent).mean())}
            log.write(line | {"heldout_loss": loss_on(model, heldout, args.context)})
            recent.clear()


class Log:
    """JSON lines, each with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.perf_counter()
        path.write_text("")

    def write(self, line: dict[str, Any]) -> None:
        line = {k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}
        text = json.dumps(line | {"seconds": round(time.perf_counter() - self.start, 1)})
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    log = Log(args.out / "train_log.jsonl")
    files, kept_out = split(installed_sources(), int(args.heldout_kb * 1024), int(args.train_mb * 1e6))
    text, heldout = tokens_of(joined(files), device), tokens_of(joined(kept_out), device)
    (args.out / "heldout.txt").write_bytes(joined(kept_out))

    width = args.width
    config = HyenaConfig(
        d_model=width, n_layer=args.layers, d_inner=2 * width, vocab_size=256, l_max=args.context,
        emb_dim=33, filter_order=64, w=14.0,
    )  # fmt: skip
    model = HyenaLM(config).to(device)
    initialise(model)
    log.write(
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_bytes": len(text),
            "train_files": len(files),
            "heldout_bytes": len(heldout),
            "heldout_files": [source.name for source in kept_out],
            "options": {k: v for k, v in vars(args).items() if k != "out"},
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
    )
    train(model, text, heldout, args, log)

    torch.save(stored(model), args.out / "model.pt")
    (args.out / "config.yaml").write_text(yaml.safe_dump(safari_config(config), sort_keys=False))
    trained = loss_on(model, heldout, args.context)
    state = torch.load(args.out / "model.pt", map_location=device, weights_only=True)
    again = HyenaLM(config).to(device).eval()
    again.load_state_dict({key: value.float() for key, value in state.items()})
    loss = loss_on(again, heldout, args.context)
    log.write(
        {
            "file_bytes": (args.out / "model.pt").stat().st_size,
            "heldout_loss_before_storing": trained,
            "heldout_loss": loss,
            "heldout_bits_per_byte": loss / math.log(2),
        }
    )


if __name__ == "__main__":
    main()
