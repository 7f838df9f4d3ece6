"""A pretrained model with another head: what GPT-1 was for. The last token has read the whole text, so its vector is asked.

The language model's own head is left out; everything below it is fine-tuned together with the new, small head. Source: A.
Radford et al., Improving Language Understanding by Generative Pre-Training (2018), §3.2. Left out: the language model's
loss as a second task while fine-tuning.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.model.transformer import Transformer


class Classifier(nn.Module):
    """Shapes: ids (B, T) -> one score for each class (B, K). padding_mask: False on padding, which stands on the left."""

    def __init__(self, model: Transformer, classes: int, *, seed: int = 0):
        super().__init__()
        self.model = model
        self.score = nn.Linear(model.config.width, classes, bias=False, device=model.embed.weight.device)
        with torch.no_grad():
            start = torch.randn(self.score.weight.shape, generator=torch.Generator().manual_seed(seed))
            self.score.weight.copy_(model.config.init_std * start)

    def forward(self, ids: Int[Tensor, "B T"], padding_mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B K"]:
        """Scores of the classes; raises ValueError for a text that ends in padding, whose last token says nothing."""
        if padding_mask is not None and not padding_mask[:, -1].all():
            raise ValueError(f"row {int((~padding_mask[:, -1]).nonzero()[0])} ends in padding: put it on the left, so that the last "
                             f"token is the text's own.")
        return self.score(self.model(ids, padding_mask=padding_mask, return_hidden=True).hidden[-1][:, -1])
