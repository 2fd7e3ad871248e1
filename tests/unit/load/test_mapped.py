"""Pages of a mapped checkpoint can be given back, and only those: memory of the process itself is left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lhcompile.load.mapped import MappedFiles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not show their maps")
ROWS = 1 << 20


def file_bytes() -> int:
    """Bytes of mapped files that are in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return 1024 * int(line.split()[1])


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_pages_go_and_come_back_as_they_were(tmp_path: Path, kind: str) -> None:
    truth = torch.arange(ROWS, dtype=torch.float32).repeat(8)
    if kind == "torch":
        torch.save({"a": truth}, tmp_path / "w")
        mapped = torch.load(tmp_path / "w", weights_only=True, mmap=True)["a"]
    else:
        safetensors.torch.save_file({"a": truth}, tmp_path / "w")
        mapped = safetensors.torch.load_file(tmp_path / "w")["a"]
    before = file_bytes()
    assert torch.equal(mapped, truth)
    read = file_bytes()
    assert read > before + 0.9 * truth.nbytes
    MappedFiles().let_go(mapped)
    assert file_bytes() < read - 0.9 * truth.nbytes
    assert torch.equal(mapped, truth)


def test_memory_that_is_no_file_keeps_its_contents() -> None:
    values = torch.arange(ROWS)
    MappedFiles().let_go(values)
    assert torch.equal(values, torch.arange(ROWS))
