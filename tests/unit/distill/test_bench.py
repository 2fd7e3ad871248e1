"""The benchmark of the methods runs, and its tables are those of its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lhcompile.distill import METHODS

ROOT = Path(__file__).parents[3]


def test_the_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.distill", "--quick", "--parts", "planted", "cost", "scale"]
    command += ["--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that share so little mostly wait for each other
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"distill.json", "distill.md", "distill.svg"}
    parts = json.loads((tmp_path / "distill.json").read_text())
    found = {name: part["rows"] for name, part in parts.items()}
    fast = {method for method in METHODS if not method.startswith("gradient")}
    assert {row["method"] for row in found["planted"]} == {row["method"] for row in found["cost"]} == fast
    exact = [row for row in found["planted"] if row["method"] == "varpro" and row["noise"] == 0]
    assert len(exact) == 2
    assert all(row["error_worst"] < 1e-9 for row in exact)
    table = (tmp_path / "distill.md").read_text("utf-8")
    for row in found["planted"]:
        cells = [row["kind"], f"{row['noise']:g}", str(row["order"]), row["method"], f"{row['error_mean']:.2e}"]
        assert f"| {' | '.join(cells)} |" in table
    assert (tmp_path / "distill.svg").read_text("utf-8").count("<svg") == 1
