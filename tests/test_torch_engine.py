"""torch's engine on several ranks against ours in one process, for families of each kind. One launch per number of ranks."""

from dataclasses import replace

import pytest
import torch
from ranks import functions_travel_by_value  # noqa: F401  a fixture
from runs import PLAN
from steps import like_one_process, share, take_step, trained

from minillm.config import ParallelConfig
from minillm.engine import Engine
from minillm.model import families
from minillm.model.transformer import Transformer
from minillm.parallel.launch import launch
from minillm.torch_engine import TorchEngine, build_engine

# 301 tokens and 42 hidden units divide by none of 2 and 4 ranks evenly (42 by 2).
SMALL = dict(vocab_size=301, layers=2, width=16, heads=4, ffn_width=42, context=32)
LLAMA = replace(families.llama, **SMALL, kv_heads=2)  # grouped KV heads
MODELS = {"gpt2": replace(families.gpt2, **SMALL), "llama": LLAMA,
          "everything": replace(families.gemma3, **SMALL | dict(kv_heads=2), head_dim=6, window=3)}
BASE = replace(PLAN, batch_size=8, lr=1e-2, clip_norm=0.1)
PLANS = {"plain": BASE, "accumulated, z-loss": replace(BASE, microbatch_size=2, z_loss=1e-2)}
LAYOUTS = {2: [dict(dp=2), dict(tp=2), dict(tp=2, sequence_parallel=True)],
           4: [dict(dp=4), dict(dp=2, tp=2), dict(dp=2, tp=2, sequence_parallel=True), dict(tp=4)]}
CASES = [(ranks, number, model) for ranks, layouts in LAYOUTS.items() for number in range(len(layouts)) for model in MODELS]


def everything(me, layouts):
    found = []
    for layout in layouts:
        parallel = ParallelConfig(**layout, bucket_mb=0.01, engine="torch")
        for name, model in MODELS.items():
            model = replace(model, kv_heads=4) if parallel.tp == 4 else model
            found.append({plan: trained(model, config, parallel) for plan, config in PLANS.items()})
    return found


if __name__ == "__main__":
    import sys, time
    for ranks, layouts in LAYOUTS.items():
        t = time.time()
        got = launch(everything, ranks, layouts, backend="gloo")
        print(ranks, time.time() - t)
        it = [iter(g) for g in got]
        for layout in layouts:
            for name, model in MODELS.items():
                model = replace(model, kv_heads=4) if layout.get("tp") == 4 else model
                rs = [next(i) for i in it]
                for plan, config in PLANS.items():
                    w = trained(model, config)
                    for r in rs:
                        try:
                            like_one_process(r[plan], w)
                        except AssertionError as e:
                            print("BAD", layout, name, plan, str(e)[:300])
                            break
                    else:
                        print("ok", layout, name, plan, r[plan]["held"], w["held"])
