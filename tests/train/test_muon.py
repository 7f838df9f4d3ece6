import pytest
import torch

from minillm.config import TrainConfig
from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.train.build import build_optimizer
from minillm.train.muon import Muon, muon_groups, orthogonalise


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalise(matrix, dtype=torch.float64)
    inner = u.mT @ made @ vh.mT  # diagonal where the singular vectors are the same
    values = inner.diagonal()
    # the quintic's fixed band, for singular values that are not tiny beside the largest
    assert values[s > 0.05 * s.max()].min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(inner, values.diag(), rtol=0, atol=1e-10)


def test_one_step_of_the_quintic_by_hand():
    a, b, c = 3.4445, -4.7750, 2.0315
    made = orthogonalise(torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64), steps=1, dtype=torch.float64)
    expected = [a * s + b * s ** 3 + c * s ** 5 for s in (0.6, 0.8)]  # 3 and 4 over the norm 5
    torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float64).diag(), rtol=1e-12, atol=1e-12)


def test_muon_equals_torchs(monkeypatch):
    """torch's own rounds to bfloat16; with that switched off, both compute the same in float64."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)

    def run(build):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((12, 30), (30, 12), (8, 8))]
        optimizer = build(weights)
        for _ in range(6):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        return torch.cat([w.detach().flatten() for w in weights])

    ours = run(lambda w: Muon([{"params": w, "weight_decay": 0.2, "matrices": True}], lr=0.02, betas=(0.9, 0.95), eps=1e-8))
    theirs = run(lambda w: torch.optim.Muon(w, lr=0.02, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)  # float64, thirty products of rounding


def test_bfloat16_gives_nearly_the_same_direction():
    torch.manual_seed(0)
    matrix = torch.randn(20, 48)
    exact, rounded = orthogonalise(matrix, dtype=torch.float64), orthogonalise(matrix)
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.999  # 8 bits a number


def test_the_blocks_matrices_go_to_muon_and_all_else_to_adamw():
    model = Transformer(preset("gpt2", vocab_size=50, layers=1, width=16, heads=2, context=8, tied=False))
    named = dict(model.named_parameters())
    names = {id(p): n for n, p in named.items()}
    groups = muon_groups(named.items(), 0.1)
    inner = {names[id(p)] for p in groups[0]["params"]}
    assert inner == {f"blocks.0.{part}.weight" for part in ("attention.q", "attention.k", "attention.v", "attention.out",
                                                            "ffn.up", "ffn.down")}
    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(named)
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", lr=0.01))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert set(optimizer.state[model.embed.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[model.blocks[0].ffn.up.weight]) == {"step", "momentum_buffer"}
