"""How much memory does building a large checkpoint take, beside what the built directory holds?

    python -m bench.memory --out docs/bench      writes memory.json and the table made from it

A random StripedHyena checkpoint of the published width (4096, inner 14336, vocabulary 32000, bfloat16) and of reduced
depth is built by the command line in a process of its own, `--exact`. Resident memory is read twenty times a second
from the system, mapped files included. The bound: bytes of the built directory and one and a half times those of the
largest layer in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.machine import describe

__all__ = ["checkpoint", "figures", "table", "write"]

WIDTH, INNER, HEADS, VOCABULARY, STATE = 4096, 14336, 32, 32000, 2
PERIOD = 0.05
MEMORY = ("VmRSS", "RssAnon", "RssFile")


def checkpoint(directory: Path, layers: int, width: int = WIDTH) -> list[str]:
    """Writes model.pt and config.yml, attention in every second layer; returns the arguments that name them."""
    inner, rows = INNER * width // WIDTH, width + width // 2
    options = {
        "model_name": "sh-7b", "vocab_size": VOCABULARY, "hidden_size": width, "num_filters": width,
        "num_layers": layers, "attn_layer_idxs": list(range(1, layers, 2)),
        "hyena_layer_idxs": list(range(0, layers, 2)), "num_attention_heads": HEADS, "proj_groups": 4,
        "state_size": STATE, "inner_mlp_size": inner, "short_filter_length": 3, "short_filter_bias": True,
        "eps": 1e-5, "rotary_emb_base": 500000, "column_split_hyena": True, "column_split": False,
        "tie_embeddings": False, "mha_out_proj_bias": False, "qkv_proj_bias": False, "max_seqlen": 32768,
        "use_flash_rmsnorm": True,
    }  # fmt: skip
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float) -> torch.Tensor:
        return (size * torch.randn(*shape, generator=draw)).bfloat16()

    state = {
        "embedding_layer.weight": normal(VOCABULARY, width, size=1.0),
        "unembed.weight": normal(VOCABULARY, width, size=width**-0.5),
        "norm.scale": torch.ones(width).bfloat16(),
    }
    for layer in range(layers):
        if layer % 2:
            mixer = {
                "inner_mha_cls.Wqkv.weight": normal(rows, width, size=width**-0.5),
                "inner_mha_cls.out_proj.weight": normal(width, width, size=width**-0.5),
            }
        else:
            poles = torch.polar(
                0.2 + 0.78 * torch.rand(width, STATE, 1, generator=draw),
                3 * torch.rand(width, STATE, 1, generator=draw),
            )
            mixer = {
                "projections.weight": normal(3 * width, width, size=width**-0.5),
                "projections.bias": normal(3 * width, size=0.1),
                "filter.short_filter_weight": normal(3 * width, 1, 3, size=0.5),
                "filter.short_filter_bias": normal(3 * width, size=0.1),
                "filter.poles": torch.view_as_real(poles),
                "filter.residues": normal(width, STATE, 1, 2, size=0.4).float(),
                "filter.D": normal(width, size=0.4),
                "out_filter_dense.weight": normal(width, width, size=width**-0.5),
                "out_filter_dense.bias": normal(width, size=0.1),
            }
        mlp = {
            "pre_norm.scale": torch.ones(width).bfloat16(),
            "post_norm.scale": torch.ones(width).bfloat16(),
            "mlp.l1.weight": normal(inner, width, size=width**-0.5),
            "mlp.l2.weight": normal(inner, width, size=width**-0.5),
            "mlp.l3.weight": normal(width, inner, size=inner**-0.5),
        }
        state |= {f"blocks.{layer}.{key}": value for key, value in (mixer | mlp).items()}
    torch.save(state, directory / "model.pt")
    (directory / "config.yml").write_text(yaml.safe_dump(options))
    return [str(directory / "model.pt"), "--config", str(directory / "config.yml")]


def largest_layer(width: int = WIDTH) -> int:
    """Bytes in float32: of a block with convolution, or of the embedding where that is more."""
    inner = INNER * width // WIDTH
    block = 4 * width * width + 3 * inner * width + 3 * width * 4 + width * (4 * STATE + 1) + 4 * width + 2 * width
    return 4 * max(block, VOCABULARY * width)


def figures(layers: int, width: int = WIDTH, tokens: int = 64) -> dict[str, Any]:
    """Builds a checkpoint of so many layers; peak memory by stage, sizes and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = checkpoint(place, layers, width)
        command = [
            sys.executable, "-m", "lhcompile", "build", *model, "-o", str(place / "out"), "--exact",
            "--context", str(tokens), "--sequences", "2",
        ]  # fmt: skip
        started = time.perf_counter()
        peaks = _watch(command)
        seconds = time.perf_counter() - started
        output = sum(file.stat().st_size for file in (place / "out").iterdir())
        manifest = json.loads((place / "out" / "manifest.json").read_text())
        bound = output + 3 * largest_layer(width) // 2
        peak = max(stage["VmRSS"] for stage in peaks.values())
        return {
            "layers": layers,
            "width": width,
            "parameters": manifest["model"]["parameters"],
            "checkpoint_bytes": (place / "model.pt").stat().st_size,
            "output_bytes": output,
            "largest_layer_bytes": largest_layer(width),
            "bound_bytes": bound,
            "peak_bytes": peak,
            "peak_over_bound": peak / bound,
            "seconds": seconds,
            "stages": peaks,
            "max_logit_difference": json.loads((place / "out" / "report.json").read_text())["stages"][-1][
                "max_difference"
            ],
        }


def _watch(command: list[str]) -> dict[str, dict[str, int]]:
    """Runs a command; the largest resident memory, bytes, while each of the stages ran that it names as it ends."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks: dict[str, dict[str, int]] = {}
    now = dict.fromkeys(MEMORY, 0)
    lines: list[str] = []

    def sample() -> None:
        while process.poll() is None:
            for name, value in _memory(process.pid):
                now[name] = max(now[name], value)
            time.sleep(PERIOD)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("✓ "):
            peaks[line.split()[1]] = dict(now)
            now.update(dict.fromkeys(MEMORY, 0))
    sampler.join()
    if process.wait():
        raise RuntimeError("".join(lines[-20:]))
    return peaks


def _memory(pid: int) -> Iterable[tuple[str, int]]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it ended between two looks
        return []
    fields = (line.split() for line in lines)
    return [(name.rstrip(":"), 1024 * int(rest[0])) for name, *rest in fields if name.rstrip(":") in MEMORY]


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown, GB."""
    titles = "layers | parameters | checkpoint | output | largest layer | bound | peak | peak / bound | s"
    rows = [f"| {titles} |", "|---" * 9 + "|"]
    for one in result["builds"]:
        sizes = " | ".join(
            f"{one[f'{name}_bytes'] / 1e9:.2f}" for name in ("checkpoint", "output", "largest_layer", "bound", "peak")
        )
        rows.append(
            f"| {one['layers']} | {one['parameters'] / 1e6:.0f} M | {sizes} | {one['peak_over_bound']:.2f} "
            f"| {one['seconds']:.0f} |"
        )
    stages = list(result["builds"][0]["stages"])
    rows += ["", "| layers | " + " | ".join(stages) + " |", "|---" * (1 + len(stages)) + "|"]
    for one in result["builds"]:
        cells = " | ".join(f"{one['stages'][stage]['VmRSS'] / 1e9:.2f}" for stage in stages)
        rows.append(f"| {one['layers']} | {cells} |")
    return "\n".join(rows) + "\n"


def write(result: dict[str, Any], folder: Path) -> None:
    (folder / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "memory.md").write_text(
        "# Memory of a build\n\nMade by `python -m bench.memory --out docs/bench`. StripedHyena-7B's width at reduced "
        "depth, peak resident memory in GB, first of the build, then of each stage.\n\n" + table(result)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--out", type=Path, default=Path("docs/bench"))
    arguments = parser.parse_args()
    result = {"machine": describe(), "builds": [figures(layers, arguments.width) for layers in arguments.layers]}
    write(result, arguments.out)
    print(table(result))


if __name__ == "__main__":
    main()
