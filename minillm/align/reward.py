"""The reward model: a language model that gives one number instead of the next token, trained on which answer was preferred.

The head is replaced by one with a single row; the score is read at the answer's last token, which has seen everything.
Only differences of scores are ever trained, so their zero is arbitrary. It is a Transformer, so the Engine trains it as any
other. A critic (ppo.py) is the same model, read at every token. Its files are those of Hugging Face's sequence classifiers with
one label. Source: arXiv:2203.02155 §3.5 eq. 1. Left out: tensor ranks.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.align.pairs import Groups
from minillm.align.ppo import last_of
from minillm.config import ModelConfig
from minillm.data.loader import IGNORED, Batch
from minillm.files import write_atomically
from minillm.model.huggingface import CheckpointError, load_pretrained, load_tensors, save_pretrained, save_tensors
from minillm.model.transformer import Transformer

HEAD = "score.weight"


class Scorer(Transformer):
    """A decoder with one score at every token: ids (B, T) in, (B, T, 1) out. It begins with the score 0 for everything."""

    def __init__(self, config: ModelConfig, *, seed: int = 0):
        super().__init__(replace(config, tied=False), seed=seed)
        self.head = nn.Linear(config.width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    @classmethod
    def of(cls, model: Transformer) -> "Scorer":
        """A scorer on a trained model's body: a copy, which leaves the model as it is."""
        scorer = cls(model.config).to(model.embed.weight)
        body = {name: weight for name, weight in model.state_dict().items() if not name.startswith("head.")}
        scorer.load_state_dict(body, strict=False)
        return scorer


def ranking_loss(rewards: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """For K answers to each prompt, the best first: the mean over all K(K-1)/2 pairs of -ln sigmoid(better - worse).

    A prompt's pairs are one target, since they are anything but independent. Cost: K forward passes for K(K-1)/2 pairs.
    Raises: ValueError for fewer than two answers.
    """
    answers = rewards.shape[1]
    if answers < 2:
        raise ValueError(f"{answers} answer to a prompt: at least two are needed to compare.")
    better, worse = torch.triu_indices(answers, answers, 1, device=rewards.device)
    return -F.logsigmoid(rewards[:, better] - rewards[:, worse]).mean(1)


def final_scores(scores: Float[Tensor, "B T 1"], batch: Batch) -> Float[Tensor, "B"]:
    """Each row's score at the answer's last token, which is the one that was the target one place before."""
    return (scores[..., 0] * last_of(batch.targets != IGNORED).roll(1, 1)).sum(1)


def reward_loss(scores: Tensor, batch: Groups) -> Tensor:
    """The Engine's loss: the sum over prompts."""
    return ranking_loss(final_scores(scores, batch).view(-1, batch.group)).sum()


@torch.no_grad()
def scores_of(scorer: Scorer, batch: Batch) -> Float[Tensor, "B"]:
    """The reward of each row of a batch of `pair_batch`, or of rollouts."""
    batch = batch.to(scorer.embed.weight.device)
    return final_scores(scorer(batch.ids, positions=batch.positions, segment_ids=batch.segment_ids), batch)


def preference_accuracy(scorer: Scorer, batch: Groups) -> float:
    """How often the answer that was preferred has a higher score than all others."""
    best, others = scores_of(scorer, batch).view(-1, batch.group).split((1, batch.group - 1), dim=1)
    return float((best > others).all(1).double().mean())


# Files

def save_scorer(scorer: Scorer, folder: str | Path) -> None:
    """Write config.json and model.safetensors, so that `load_scorer` and AutoModelForSequenceClassification read them back."""
    folder = Path(folder)
    save_pretrained(scorer, folder)
    tensors = {HEAD if weight.shape == scorer.head.weight.shape and "head" in name else name: weight
               for name, weight in load_tensors(folder / "model.safetensors").items()}
    about = json.loads((folder / "config.json").read_text())
    kinds = [name.partition("For")[0] + "ForSequenceClassification" for name in about.get("architectures", [])]
    write_atomically(folder / "config.json", json.dumps(about | {"architectures": kinds, "num_labels": 1}, indent=2))
    save_tensors(folder / "model.safetensors", tensors)


def load_scorer(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Scorer:
    """The reward model of a folder. Raises: CheckpointError for what is none, or as `load_pretrained`."""
    scorer = Scorer.of(load_pretrained(folder, dtype=dtype, device=device, without=(HEAD,)))
    head = load_tensors(Path(folder) / "model.safetensors").get(HEAD)
    if head is None or head.shape != scorer.head.weight.shape:
        found = "no" if head is None else f"a {tuple(head.shape)}"
        raise CheckpointError(f"{folder} has {found} {HEAD}, and a reward model's is {tuple(scorer.head.weight.shape)}: it is a language "
                              f"model, or a classifier of several classes. Train a scorer from it with Scorer.of(model).")
    with torch.no_grad():
        scorer.head.weight.copy_(head)
    return scorer
