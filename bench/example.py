"""The figures of a built directory: how close, how small, how fast.

    python -m bench.example build/pysource --out docs/bench      writes example.json and the table made from it

Closeness is read from the build's report; speed is measured now, as medians. Beside a step stands the
time to move its weights and states through memory at the measured copy bandwidth: the floor of a model that does not
fit in the processor's cache.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from bench.machine import copy_bandwidth, describe
from lhcompile.api import bench
from lhcompile.verify.model import Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, help="folder for example.json and example.md")
    options = parser.parse_args()
    report = Report.model_validate_json((options.directory / "report.json").read_bytes())
    speed = bench(options.directory, steps=400)
    floor_ms = 1e3 * (speed.file_bytes["step.onnx"] + 2 * speed.state_bytes) / copy_bandwidth()
    first, last = report.stages[0], report.stages[-1]
    rows = [
        ("held-out loss of the source, nats a byte", f"{first.loss:.5f}"),
        ("held-out loss of the build", f"{last.loss:.5f} ({report.loss_rise:+.3%})"),
        ("KL from the source, nats", f"{last.kl_mean:.2e}"),
        ("same most likely byte", f"{last.top1_agreement:.2%}"),
        ("tokens measured on", f"{last.tokens}"),
        ("mean order of the filters", "exact taps" if report.order_mean is None else f"{report.order_mean:.2f}"),
        ("state of one sequence", f"{speed.state_bytes / 1e3:.1f} KB"),
        *((name, f"{speed.file_bytes[name] / 1e6:.1f} MB") for name in ("step.onnx", "prefill.onnx")),
        ("step", f"{speed.step_ms:.3f} ms (its bytes alone, from memory and not from caches, take {floor_ms:.3f} ms)"),
        ("prefill of 1024 tokens", f"{speed.prefill_tokens_per_second:,.0f} tokens/s"),
    ]
    table = "\n".join(["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    print(table)
    if options.out is not None:
        command = f"python -m bench.example {options.directory} --out {options.out}"
        result = {"command": command, "machine": describe(), "figures": dict(rows), "speed": asdict(speed)}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "example.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "example.md").write_text(f"Made by `{command}`, batch 1.\n\n{table}\n")


if __name__ == "__main__":
    main()
