"""Shape checking for the whole suite: jaxtyping's annotations are enforced by beartype wherever tensors are.

`minillm.config` is left out: its own errors for a wrong value are part of what is tested.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook([f"minillm.{part}" for part in ("data", "nn", "model", "train", "parallel", "infer", "plan", "engine", "trainer")],
                    "shapes.checked")
