"""What the tests of this folder share: a tiny model, a tokenizer whose text is letters, and pairs of answers."""

from dataclasses import replace
from itertools import islice

from minillm.config import TrainConfig
from minillm.data.instructions import preferences
from minillm.model.families import preset
from minillm.text.bpe import BPETokenizer
from minillm.text.chat import TEMPLATES

TOKENIZER = BPETokenizer.train(["the answer is 0 1 2 3 4 5 6 7 8 9 + - = Sort: Reverse: what is "], 262, split_digits=True)
TEMPLATE = TEMPLATES["minillm"]
MODEL = preset("first", vocab_size=262, layers=2, width=32, heads=2, context=96)
PLAN = TrainConfig(steps=100, batch_size=8, lr=3e-3, schedule="constant", warmup_steps=0, device="cpu")
ACCUMULATED = replace(PLAN, microbatch_size=2)


def pairs(count, seed=0, split="train", **options):
    """Preferences about sums."""
    return list(islice(preferences(seed, split, ["sum"], **options), count))
