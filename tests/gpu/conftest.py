"""The library of kernels, where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from bench.kernels import LIBRARY, Kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert LIBRARY.exists(), f"{LIBRARY} is not built (make ops)"
    return Kernels()
