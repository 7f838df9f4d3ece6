import pytest
import torch

from minillm.config import TrainConfig
from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.train.build import build_optimizer
from minillm.train.optim import decay_groups


@pytest.mark.parametrize("optimizer", ["by_hand", "fused"])
def test_adamw_equals_torchs_plain_one(optimizer):
    def run(build):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).double()
        opt = build(model)
        for step in range(10):
            opt.param_groups[0]["lr"] = 0.01 * (step + 1)
            opt.zero_grad()
            model(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
            opt.step()
        return torch.cat([p.flatten() for p in model.parameters()])

    config = TrainConfig(optimizer=optimizer, lr=0.01, weight_decay=0.3, beta1=0.8, beta2=0.97, adam_eps=1e-6)
    expected = run(lambda m: torch.optim.AdamW(decay_groups(m, 0.3), lr=0.01, betas=(0.8, 0.97), eps=1e-6,
                                               foreach=False, fused=False))
    # float64; the bias corrections are multiplied in another order
    torch.testing.assert_close(run(lambda m: build_optimizer(m, config)), expected, rtol=1e-10, atol=1e-12)


def test_only_matrices_decay_and_tied_weights_are_counted_once():
    model = Transformer(preset("gpt2", vocab_size=50, layers=1, width=16, heads=2, context=8))
    matrices, vectors = decay_groups(model, 0.1)
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0.0
    assert {p.ndim for p in matrices["params"]} == {2} and {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_tables_decay_only_when_they_should():
    model = Transformer(preset("gpt2", vocab_size=50, layers=1, width=16, heads=2, context=8))
    named = {id(p): n for n, p in model.named_parameters()}
    decayed = {named[id(p)] for p in decay_groups(model, 0.1, embeddings=False)[0]["params"]}
    assert "embed.weight" not in decayed and "positions.weight" not in decayed and "blocks.0.ffn.up.weight" in decayed
    everything = {named[id(p)] for p in decay_groups(model, 0.1)[0]["params"]}
    assert everything - decayed == {"embed.weight", "positions.weight"}
