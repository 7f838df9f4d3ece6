"""What a layout asks of the batch, the model and the training: said before anything is built or any rank waits.

What only torch's engine or ZeRO cannot do is said in minillm/torch_engine.py and minillm/zero_engine.py.
"""

from collections.abc import Callable

from torch import Tensor

from minillm.config import ModelConfig, ParallelConfig, TrainConfig
from minillm.data.loader import Batch
from minillm.model.sharding import why_not
from minillm.parallel.schedules import build_schedule
from minillm.train.loss import next_token_loss

Loss = Callable[[Tensor, Batch], Tensor]


def check_layout(model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, loss: Loss = next_token_loss) -> None:
    """Refuse a layout that the batch, the model or the training cannot have. Raises: ValueError that says what would work."""
    parallel.share(train.batch_size)
    if reason := why_not(model, parallel.tp):
        raise ValueError(reason)
    if parallel.sequence_parallel and model.context % parallel.tp:
        raise ValueError(f"a context of {model.context} tokens cannot be shared out to tp = {parallel.tp} ranks. Use another "
                         f"context, or leave sequence_parallel out.")
    untried = (train.compile, "it has not been tried with messages inside the model. Leave it out")
    refused = {
        ("tp", f"optimizer = {train.optimizer!r}"): (train.optimizer in ("muon", "adafactor"), "it looks at whole matrices, and a rank "
                                                     "has a part of each. Use \"fused\""),
        ("tp", "precision = 'fp8'"): (train.precision == "fp8", "its scales are those of whole matrices. Use \"bf16\""),
        ("tp", "compile"): untried, ("pp", "compile"): untried,
        ("tp", "a loss of its own"): (loss is not next_token_loss, "the logits are split by token, and only next_token_loss has a form "
                                      "that reads them so. Use that"),
        ("pp", "precision = 'fp8'"): (train.precision == "fp8", "it keeps the head in 16 bits, which most stages do not have. Use "
                                      "\"bf16\""),
    }
    for (axis, what), (asked, why) in refused.items():
        if asked and (size := getattr(parallel, axis)) > 1:
            raise ValueError(f"{axis} = {size} with {what}: {why}, or {axis} = 1.")
    if parallel.pp > 1:
        _check_pipeline(model.layers, train, parallel)


def _check_pipeline(layers: int, train: TrainConfig, parallel: ParallelConfig) -> None:
    """Refuse stages without layers, and microbatches that the share or the schedule does not divide into."""
    stages, share = parallel.pp * parallel.chunks, parallel.share(train.batch_size)
    if stages > layers:
        raise ValueError(f"pp = {parallel.pp} with chunks = {parallel.chunks} makes {stages} stages, and the model has {layers} layers: "
                         f"each stage needs at least one.")
    size = train.microbatch_size or share
    if share % size:
        raise ValueError(f"a rank's {share} sequences do not divide into microbatches of {size}, and a pipeline's must be alike. "
                         f"Use a microbatch_size that divides {share}.")
    build_schedule(parallel.schedule, parallel.pp, share // size, parallel.chunks)
