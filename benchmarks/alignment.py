"""What alignment's stages take: tokens a second of each, and a round of PPO and of GRPO in its three parts.

    python benchmarks/alignment.py [--rounds 5] [--steps 20] [--device cuda --preset gpt2 --precision bf16]

On a CPU the model is the course's; a preset has random weights, whose answers then have the greatest length. A tuning step
reads packed conversations, a step of the reward model pairs of answers; tokens are those of the rows, padding too. In a round,
`generate` writes the answers token by token and takes their log-probabilities, `score` asks reward model, reference and critic,
and `update` trains. Medians.
"""

import argparse
import statistics
import time
from dataclasses import replace
from itertools import islice

import torch

from minillm.align.online import Online, OnlineConfig
from minillm.align.pairs import pair_batch
from minillm.align.reward import Scorer, reward_loss, scores_of
from minillm.align.sft import pack
from minillm.config import TrainConfig
from minillm.course.judge import prompts_of, stops
from minillm.course.pretrained import load_course_chat
from minillm.data.instructions import demonstrations, instructions, preferences
from minillm.engine import Engine
from minillm.model.families import preset
from minillm.model.transformer import Transformer, num_params
from minillm.text.chat import TEMPLATES, render

TEMPLATE, KINDS = TEMPLATES["minillm"], ("add",)


def steps(engine: Engine, batches, count: int) -> float:
    """Tokens a second, the median over the steps."""
    speeds = []
    for batch in islice(batches, count):
        started = time.perf_counter()
        float(engine.forward_backward(batch))
        engine.clip(1.0)
        engine.step()
        speeds.append(batch.ids.numel() / (time.perf_counter() - started))
    return statistics.median(speeds)


def stages(model: Transformer, tokenizer, plan: TrainConfig, count: int) -> list[tuple[str, float]]:
    """Tuning with two optimizers, and the reward model."""
    rows = [render(TEMPLATE, tokenizer, talk) for talk in islice(demonstrations(0, "train", KINDS, told=0.03), 4_000)]
    packed = pack([row for row in rows if len(row.ids) <= 128], 128).split(16)
    pairs = pair_batch(TEMPLATE, tokenizer, list(islice(preferences(0, "train", KINDS), 32 * count))).split(64)
    found = [(f"tuning, {name}", steps(Engine(_copy(model), replace(plan, batch_size=16, optimizer=kind)), packed, count))
             for name, kind in (("AdamW", "fused"), ("Muon", "muon"))]
    return found + [("reward model", steps(Engine(Scorer.of(model), replace(plan, batch_size=64), loss=reward_loss), pairs, count))]


def rounds(model: Transformer, tokenizer, plan: TrainConfig, count: int, critic: bool) -> dict[str, float]:
    """A round's median numbers."""
    scorer = Scorer.of(model).eval()
    config = OnlineConfig(rounds=count)
    online = Online(_copy(model), _copy(model), lambda asked, rollouts: scores_of(scorer, rollouts.batch), stops(TEMPLATE, tokenizer), config,
                    replace(plan, steps=config.steps(64), batch_size=64), critic=Scorer.of(model) if critic else None)
    asked = instructions(0, "train", KINDS)
    taken = []
    for _ in range(count):
        some = list(islice(asked, config.prompts))
        taken.append(online.round(prompts_of(TEMPLATE, tokenizer, some), some))
    return {name: statistics.median(round_[name] for round_ in taken) for name in taken[0]}


def _copy(model: Transformer) -> Transformer:
    made = Transformer(model.config)
    made.load_state_dict(model.state_dict())
    return made.to(model.embed.weight.device)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset")
    parser.add_argument("--precision", default="fp32")
    asked = parser.parse_args()
    model, tokenizer = load_course_chat()
    if asked.preset:
        model = Transformer(preset(asked.preset))
    model = model.to(asked.device)
    plan = TrainConfig(steps=asked.steps, lr=1e-5, weight_decay=0.0, device=asked.device, precision=asked.precision)
    print(f"alignment of {num_params(model):,} parameters on {asked.device}, {torch.get_num_threads()} threads, {asked.precision}")
    print(f"{'':24}{'tokens/s':>10}")
    for name, speed in stages(model, tokenizer, plan, asked.steps):
        print(f"{name:24}{speed:>10,.0f}")
    print(f"\na round of 64 prompts with 4 answers{'generate':>10}{'score':>8}{'update':>8}{'all, s':>8}{'tokens written/s':>18}")
    for name, critic in (("PPO", True), ("GRPO", False)):
        taken = rounds(model, tokenizer, plan, asked.rounds, critic)
        parts = [taken[f"seconds_{part}"] for part in ("generate", "score", "update")]
        shares = "".join(f"{part / sum(parts):>{width}.0%}" for part, width in zip(parts, (10, 8, 8)))
        print(f"{name:36}{shares}{sum(parts):>8.2f}{taken['tokens'] / parts[0]:>18,.0f}")


if __name__ == "__main__":
    main()
