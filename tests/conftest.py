"""Shape checking for the whole suite: jaxtyping's annotations are enforced by beartype wherever tensors are."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import shapes  # noqa: F401  its import switches the hook on
import torch

torch.set_num_threads(1)
