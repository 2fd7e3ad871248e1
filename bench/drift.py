"""States kept in fewer bits: how far 100 000 steps carry a model away from itself with states in float32.

    python -m bench.drift --out docs/bench          writes drift.json and the table made from it
    python -m bench.drift --steps 2000              fewer steps, to see that it works

The example model at order 4, built with each type of state by the command line's pipeline, reads the half of its
held-out text that calibration does not use, byte by byte; every step rounds every state. Beside the loss stands how far
the logits are from those with float32 states, as a share of their root mean square, and the divergence from them. A
state whose drift added up would be worse in later rows than in earlier ones. The modulus of a pole says for how long
it keeps an error; slow are those that keep half of it for more than 68 steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lhruntime import Session
from numpy.typing import NDArray

from bench.machine import describe
from lhcompile.api import build
from lhcompile.verify.model import Report

EXAMPLE = Path(__file__).parents[1] / "examples/pysource"
TYPES = ("float32", "float16", "int8")
STEPS, SLOW = 100_000, 0.99
EDGES = (1_000, 10_000, 30_000, 100_000)
Row = dict[str, Any]
Array = NDArray[Any]


def measured(steps: int, sequences: int | None) -> Row:
    """Builds every type and feeds all of them side by side."""
    options: Row = {"config": EXAMPLE / "config.yaml", "calibration": EXAMPLE / "heldout.txt", "order": 4}
    options |= {} if sequences is None else {"sequences": sequences}
    text = np.frombuffer((EXAMPLE / "heldout.txt").read_bytes(), np.uint8)
    text = text[len(text) // 2 :][: steps + 1]
    if len(text) <= steps:
        raise SystemExit(f"the held-out text has {len(text)} bytes, fewer than {steps} steps take")
    with tempfile.TemporaryDirectory() as place:
        reports = {
            dtype: build(str(EXAMPLE / "model.pt"), state=dtype, output=Path(place) / dtype, **options)
            for dtype in TYPES
        }
        sessions = {dtype: Session.load(Path(place) / dtype, threads=1) for dtype in TYPES}
        windows, seconds = _fed(sessions, text.astype(np.int64), steps)
    moduli = np.concatenate([np.hypot(cloud.re, cloud.im) for cloud in reports["float32"].poles])
    return {
        "steps": steps,
        "poles": {"count": len(moduli), "slow": float((moduli > SLOW).mean()), "largest": float(moduli.max())},
        "types": {dtype: _of(report, seconds[dtype]) for dtype, report in reports.items()},
        "windows": windows,
    }


def _of(report: Report, seconds: list[float]) -> Row:
    cost = next((each.rise for each in report.passes if each.after.endswith("states")), None)
    return {"state_bytes": report.state_bytes, "rise_in_build": cost, "step_ms": 1e3 * float(np.median(seconds))}


def _fed(sessions: dict[str, Session], text: Array, steps: int) -> tuple[list[Row], dict[str, list[float]]]:
    """Figures of every window of steps, and the time of every step."""
    edges = [edge for edge in EDGES if edge < steps] + [steps]
    windows, seconds, start = [], {dtype: [0.0] * 0 for dtype in sessions}, 0
    for edge in edges:
        sums = {dtype: np.zeros(4) for dtype in sessions}
        for at in range(start, edge):
            exact: Array | None = None
            for dtype, session in sessions.items():
                begun = time.perf_counter()
                logits = session.step(text[at : at + 1])[0].astype(np.float64)
                seconds[dtype].append(time.perf_counter() - begun)
                exact = logits if exact is None else exact
                sums[dtype] += _figures(logits, exact, int(text[at + 1]))
        windows.append(_window(start, edge, sums))
        print(windows[-1], flush=True)
        start = edge
    return windows, seconds


def _figures(logits: Array, exact: Array, following: int) -> Array:
    """Loss, divergence from the exact logits, squared difference and square."""
    ours, theirs = (x - np.log(np.exp(x - x.max()).sum()) - x.max() for x in (logits, exact))
    divergence = np.exp(theirs) @ (theirs - ours)
    return np.array([-ours[following], divergence, np.square(logits - exact).mean(), np.square(exact).mean()])


def _window(start: int, end: int, sums: dict[str, Array]) -> Row:
    base = sums["float32"][0]
    types = {
        dtype: {
            "loss": float(total[0] / (end - start)),
            "rise": float(total[0] / base - 1),
            "kl": max(0.0, float(total[1] / (end - start))),
            "share": float(np.sqrt(total[2] / total[3])),
        }
        for dtype, total in sums.items()
    }
    return {"from": start, "to": end, "types": types}


def table(found: Row) -> Iterator[str]:
    """The figures as Markdown."""
    poles = found["poles"]
    yield (
        f"{poles['count']} poles, {poles['slow']:.0%} of modulus above {SLOW}, the largest {poles['largest']:.7f}.\n"
    )
    yield "| states | bytes a sequence | step, ms | rise of the loss in the build |"
    yield "|---" * 4 + "|"
    for dtype, kept in found["types"].items():
        rise = "–" if kept["rise_in_build"] is None else f"{kept['rise_in_build']:+.3%}"
        yield f"| {dtype} | {kept['state_bytes']:,} | {kept['step_ms']:.3f} | {rise} |"
    yield ""
    yield "| steps | loss, float32 | float16 | logits off by | KL | int8 | logits off by | KL |"
    yield "|---" * 8 + "|"
    for window in found["windows"]:
        types = window["types"]
        cells = [f"{window['from']:,} to {window['to']:,}", f"{types['float32']['loss']:.5f}"]
        for dtype in TYPES[1:]:
            one = types[dtype]
            cells += [f"{one['rise']:+.3%}", f"{one['share']:.2%}", f"{one['kl']:.1e}"]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sequences", type=int, help="calibration and held-out sequences of the builds")
    parser.add_argument("--out", type=Path, help="folder for drift.json and drift.md")
    options = parser.parse_args()
    command = f"python -m bench.drift --steps {options.steps}"
    command += "" if options.sequences is None else f" --sequences {options.sequences}"
    result = {"command": command, "machine": describe(), **measured(options.steps, options.sequences)}
    machine: Any = result["machine"]
    made = f"Made by `{command}` on {machine['processor']}, {machine['cores']} cores, one thread, batch 1."
    about = (__doc__ or "").strip().splitlines()[5:]
    text = "\n".join(["# Drift of states\n", *about, "", *table(result), "", made, ""])
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "drift.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "drift.md").write_text(text)


if __name__ == "__main__":
    main()
