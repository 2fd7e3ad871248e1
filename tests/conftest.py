"""What all tests share. The helper modules beside this file (`models`, `streams`) are imported by their names."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # the models are tiny: a second thread only waits for the first
