"""What alignment keeps in memory, held against the tensors of running models, and against what is known of InstructGPT."""

from dataclasses import asdict

import pytest
import torch

from minillm.align.grpo import grpo, policy_batch
from minillm.align.ppo import critic_loss, experience, ppo
from minillm.align.reward import Scorer, scores_of
from minillm.align.rollout import sample
from minillm.config import ModelConfig, TrainConfig
from minillm.engine import Engine
from minillm.model.transformer import Transformer, num_params
from minillm.peft.freeze import count_trained
from minillm.peft.lora import LoraConfig, add_lora
from minillm.plan.memory import STAGES, States, alignment_bytes
from minillm.train.live_bytes import LiveBytes

SMALL = ModelConfig(vocab_size=50, layers=2, width=24, heads=2, context=32)
PLAN = TrainConfig(batch_size=4, warmup_steps=0, weight_decay=0.0, device="cpu")


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def held_by(model: torch.nn.Module, engine: Engine | None = None) -> States:
    """Weights, gradients and moments that are there now."""
    moments = [m for state in engine.optimizer.state.values() for m in state.values() if m.ndim] if engine else []
    return States(bytes_of(model.parameters()), bytes_of(p.grad for p in model.parameters()), 0, bytes_of(moments))


def one_step(stage: str, adapter: bool = False):
    """The models and Engines of a stage, after a step and before the second one's update."""
    policy, models, engines = Transformer(SMALL, seed=1), {}, {}
    reference = policy if adapter else Transformer(SMALL, seed=1)
    if adapter:
        add_lora(policy, LoraConfig(rank=2))
    scorer = Scorer.of(reference)
    rollouts = sample(policy, [[1, 2, 3]] * 4, 5, (), generator=torch.Generator().manual_seed(0))
    scores = scores_of(scorer, rollouts.batch) + torch.arange(4.0)
    if stage == "ppo":
        models["critic"] = Scorer.of(reference)
        batch, _ = experience(rollouts, scores, reference, models["critic"], beta=0.1)
        engines["critic"] = Engine(models["critic"], PLAN, loss=critic_loss())
    else:
        batch = policy_batch(rollouts, scores.view(1, 4), reference)
    engines["policy"] = Engine(policy, PLAN, loss=ppo() if stage == "ppo" else grpo())
    for engine in engines.values():
        engine.forward_backward(batch)
        engine.step()
        engine.forward_backward(batch)
    models |= {"policy": policy, "reward": scorer} | ({} if adapter else {"reference": reference})
    return models, engines


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_bytes_are_those_of_the_models_at_work(stage):
    with LiveBytes() as live:
        models, engines = one_step(stage)
        alive = live.now
    sizes = {name: num_params(model) for name, model in models.items()}
    wanted = alignment_bytes(stage, sizes["policy"], sizes["reward"], "fp32")
    assert {name: held_by(model, engines.get(name)) for name, model in models.items()} == wanted
    # nothing large is missing: beside these there are only buffers, and AdamW's count of steps in 4 bytes a weight
    counts = sum(4 * len(engine.weights) for engine in engines.values())
    rest = alive - sum(states.total for states in wanted.values()) - counts
    assert 0 <= rest <= bytes_of(b for model in models.values() for b in model.buffers()) + 4096


def test_an_adapter_is_its_own_reference():
    models, engines = one_step("grpo", adapter=True)
    size = count_trained(models["policy"])
    wanted = alignment_bytes("grpo", size.total - size.trained, num_params(models["reward"]), "fp32", adapters={"policy": size.trained})
    assert wanted["policy"] == held_by(models["policy"], engines["policy"]) and wanted["reference"].total == 0


def test_instructgpt():
    """arXiv:2203.02155 §3.5 and appendix C: 175B policy, 6B reward model and critic, all begun from GPT-3's family."""
    found = alignment_bytes("ppo", 175 * 10 ** 9, 6 * 10 ** 9)
    assert {name: states.total // 10 ** 9 for name, states in found.items()} == {
        "policy": 2800, "critic": 96, "reference": 350, "reward": 12}
    equal = alignment_bytes("ppo", 175 * 10 ** 9)
    assert equal["critic"].total - found["critic"].total == 16 * 169 * 10 ** 9


def test_what_each_stage_needs_and_how_it_is_cut():
    total = {stage: sum(s.total for s in alignment_bytes(stage, 1000).values()) / 1000 for stage in STAGES}
    assert total == {"sft": 16, "reward": 16, "dpo": 18, "ppo": 36, "grpo": 20}
    assert sum(s.total for s in alignment_bytes("dpo", 1000, without=["reference"]).values()) == 16_000
    assert sum(s.total for s in alignment_bytes("grpo", 1000, without=["reward", "reference"]).values()) == 16_000
    cut = alignment_bytes("ppo", 1000, adapters={"policy": 10, "critic": 10})
    assert {name: asdict(states)["gradients"] for name, states in cut.items()} == {"policy": 20, "critic": 20, "reference": 0, "reward": 0}
    assert sum(s.total for s in cut.values()) == 3 * 2000 + 2 * 160


def test_what_takes_no_part():
    with pytest.raises(ValueError, match="no stage is called 'rlhf': choose from sft, reward, dpo, ppo, grpo"):
        alignment_bytes("rlhf", 1)
    with pytest.raises(ValueError, match="critic takes no part in grpo, which has policy, reference, reward"):
        alignment_bytes("grpo", 1, adapters={"critic": 3})
