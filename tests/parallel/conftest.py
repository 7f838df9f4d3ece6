"""Ranks in tests, on gloo and, where there are GPUs, NCCL."""

import pytest
import torch
from ranks import functions_travel_by_value  # noqa: F401  a fixture of every module here


@pytest.fixture(params=["gloo", "nccl"])
def backend(request):
    """Both ways to talk, for tests of four ranks."""
    if request.param == "nccl" and torch.cuda.device_count() < 4:
        pytest.skip(f"NCCL needs a GPU for each of 4 ranks; this machine has {torch.cuda.device_count()}")
    return request.param
