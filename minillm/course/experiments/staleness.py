"""Lesson 11: what gradients that come late cost, with and without PipeDream's weight stashing, at several rates.

A small LLaMA, a block a stage, and an update after each microbatch: on one rank, where nothing is late; on four with stash;
on four without. Its embedding is not its head, since the two copies would drift apart.
Source: PipeDream, arXiv:1806.03377 §3.3.

What came out, with three seeds. At a small rate all three are one. Without delay the best rate is 0.004 (2.82 nats), with it
0.002: 3.19 with stash, 3.25 without, where seeds differ by 0.05. Above that the stash fails later: at 0.004 it is 3.33 against
3.83 without, at 0.008 4.15 against 4.56, and 2.92 where nothing is late.
"""

from functools import partial

from minillm.config import ModelConfig, TrainConfig
from minillm.course.experiments import families
from minillm.data.loader import Batch, Loader
from minillm.data.prepare import DataConfig, Prepared
from minillm.model.families import preset
from minillm.model.stages import cut_stages
from minillm.model.transformer import Transformer
from minillm.parallel.launch import launch
from minillm.parallel.pipeline import Pipeline
from minillm.parallel.rank import Rank
from minillm.parallel.schedules import balance, pipedream
from minillm.parallel.stage_weights import gather_stages
from minillm.train.build import build_optimizer
from minillm.train.loss import next_token_loss
from minillm.train.schedule import learning_rate

CONTEXT, SEEDS, DATA = 32, (0, 1, 2), DataConfig(size=400_000, val_fraction=0.1)
MODEL = preset("first", vocab_size=512, layers=4, width=32, heads=2, context=CONTEXT, tied=False)
PLAN = TrainConfig(steps=400, batch_size=8, warmup_steps=20, schedule="constant", clip_norm=0)
WAYS = {"no delay": (1, True), "stash": (4, True), "no stash": (4, False)}
"""Ranks, and whether they keep old weights."""
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def without_stopping(me: Rank, config: ModelConfig, plan: TrainConfig, batches: list[Batch], seed: int, stash: bool) -> tuple[list[float], dict]:
    """One stage of a pipeline that takes a step after each microbatch: the losses (on the last rank), all stages' weights."""
    (stage,) = cut_stages(Transformer(config, seed=seed), balance([1] * config.layers, me.size)[me.rank::me.size])
    named, count = dict(stage.model.named_parameters()), batches[0].count
    optimizer = build_optimizer(named.items(), plan)

    def update(number: int, microbatch: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(microbatch, plan)
        optimizer.step()
        optimizer.zero_grad()
    pipe = Pipeline([stage], me.group, next_token_loss, stash=stash)
    losses = pipe.run(pipedream(me.size, len(batches)), batches, scale=1 / count, update=update)
    return [float(loss.detach()) / count for loss in losses], gather_stages(named, me.group)


def trained_late(ranks: int, stash: bool, config: ModelConfig, plan: TrainConfig, data: Prepared, context: int, seed: int) -> Transformer:
    """A model trained that way; its microbatches are the batches of the other experiments."""
    loader, model = Loader(data.train, batch_size=plan.batch_size, context=context, seed=seed), Transformer(config)
    batches = [next(loader) for _ in range(plan.steps)]
    model.load_state_dict(launch(without_stopping, ranks, config, plan, batches, seed, stash)[0][1])
    return model.eval()


ROWS = {f"{way}, lr {rate:g}": MODEL for way in WAYS for rate in RATES}
PLANS = {f"{way}, lr {rate:g}": {"lr": rate} for way in WAYS for rate in RATES}
TRAIN = {f"{way}, lr {rate:g}": partial(trained_late, *how) for way, how in WAYS.items() for rate in RATES}
measure = partial(families.measure, context=CONTEXT)
