"""Ranks in tests: forked from a server with the same shape checks as the suite, on gloo and, where there are GPUs, NCCL."""

import cloudpickle
import pytest
import torch

from minillm.parallel.forkserver import preload

preload("shapes")


@pytest.fixture(autouse=True, scope="module")
def functions_travel_by_value(request):
    """Else every rank would import the test module, and pytest with it."""
    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture(params=["gloo", "nccl"])
def backend(request):
    """Both ways to talk, for tests of four ranks."""
    if request.param == "nccl" and torch.cuda.device_count() < 4:
        pytest.skip(f"NCCL needs a GPU for each of 4 ranks; this machine has {torch.cuda.device_count()}")
    return request.param
