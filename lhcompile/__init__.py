"""lhcompile: trained long-convolution models as stateful ONNX graphs that run token by token.

    import lhcompile
    report = lhcompile.build("model.pt", output="out/", config="model.yaml", calibration="text.txt")
    reduction = lhcompile.distill(taps, order=4)  # filters on their own: arrays [filters, length]

Everything the command line does is a function here. Importing this package is cheap: each name is loaded when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lhcompile.api import build, inspect, verify_directory
    from lhcompile.distill.filters import distill_filters as distill
    from lhcompile.errors import LhcompileError
    from lhcompile.running import bench, generate

__all__ = ["LhcompileError", "bench", "build", "distill", "generate", "inspect", "verify_directory"]

_HOMES = {"LhcompileError": "lhcompile.errors", "bench": "lhcompile.running", "generate": "lhcompile.running"}


def __getattr__(name: str) -> Any:
    if name == "distill":  # a package that is a function too
        return importlib.import_module("lhcompile.distill")
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "lhcompile.api")), name)
    raise AttributeError(f"module 'lhcompile' has no attribute {name!r}")
