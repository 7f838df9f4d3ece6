"""A model cut into stages for a pipeline: each rank keeps some of the blocks, under the names they have in the whole model.

The first stage has the embedding, the last the norm and the head. All ranks of a pipeline read the same batch, so each works
out positions, rotary turns and masks for itself, and only the stream (B, T, C) travels. Two things are on several stages: an
embedding that is also the head (first and last), and T5's table of relative positions (all).
The ranks' part of the work is in minillm/parallel/pipeline.py. Left out: caches, so a cut model cannot generate.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.flops import forward_parts, layer_parts
from minillm.model.transformer import Transformer, default_positions


class Stage(nn.Module):
    """Neighbouring blocks of a model as a step of a pipeline: (stream, or None before the first; batch) -> stream or logits.

    batch: anything with ids (B, T), and positions and segment_ids or None. model: holds this rank's blocks, of all its stages.
    Shapes: (B, T, C) -> (B, T, C), at the end (B, T, V).
    """

    def __init__(self, model: Transformer, layers: range):
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, x: Float[Tensor, "B _ C"] | None, batch) -> Float[Tensor, "B _ _"]:
        model, ids = self.model, batch.ids
        positions = default_positions(ids, 0, None) if batch.positions is None else batch.positions
        x = model.embedded(ids, positions) if x is None else x
        views = model.views(ids, ids.shape[1], positions, segment_ids=batch.segment_ids)
        for layer in self.layers:
            block = model.blocks.get_submodule(str(layer))
            x, _ = block(x, *views[block.kind])
        if self.layers.stop < model.config.layers:
            return x
        return model.scores(x if model.norm is None else model.norm(x))


def layer_costs(config: ModelConfig) -> list[int]:
    """Forward operations of each block on one text of full length; the last with the head. What `balance` wants."""
    costs = [layer_parts(config, layer, config.context).total for layer in range(config.layers)]
    return [*costs[:-1], costs[-1] + forward_parts(config, config.context).head]


def cut_stages(model: Transformer, mine: Sequence[range]) -> list[Stage]:
    """Reduce a whole model, in place, to the blocks of one rank's stages, and what belongs to them; returns the stages.

    mine: which blocks each of the rank's stages has, such as balance(layer_costs(config), stages)[rank::ranks].
    Raises: ValueError for a stage without blocks, or with blocks that the model does not have.
    """
    config = model.config
    for layers in mine:
        if not layers or layers.start < 0 or layers.stop > config.layers:
            raise ValueError(f"a stage of blocks {layers.start} to {layers.stop - 1}: the model has {config.layers}, 0 to "
                             f"{config.layers - 1}, and each stage needs at least one.")
    first, last = any(layers.start == 0 for layers in mine), any(layers.stop == config.layers for layers in mine)
    blocks = nn.ModuleList()
    for layer in sorted(layer for layers in mine for layer in layers):
        blocks.add_module(str(layer), model.blocks[layer])
    model.blocks = blocks
    if not first:
        model.positions = model.embed_norm = None
    if not first and not (last and config.tied):
        model.embed = None
    if not last:
        model.norm = model.head = None
    return [Stage(model, layers) for layers in mine]
