"""The course's own checkpoint: what lessons load when they need a model that has learned something.

`make pretrained` trains it again, by the command below, and stores weights, tokenizer and metrics in
minillm/course/pretrained/, under 4 MB. A test measures its loss again and holds it to what metrics.json says.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from minillm.data.stories import stories
from minillm.files import write_atomically
from minillm.model.huggingface import load_pretrained
from minillm.model.transformer import Transformer
from minillm.text.bpe import BPETokenizer
from minillm.train.loss import bits_per_byte, cross_entropy

FOLDER = Path(__file__).with_name("pretrained")
COMMAND = ["train", "--train.steps", "1000", "--train.seed", "1"]
FILES = ("config.json", "model.safetensors", "tokenizer.json")
TEST_SEED = 12_345  # of stories that training, which uses seed 0, has not seen


def load_course_model() -> tuple[Transformer, BPETokenizer]:
    """The course's model, in evaluation mode, and its tokenizer."""
    return load_pretrained(FOLDER).eval(), BPETokenizer.load(FOLDER)


@torch.no_grad()
def measure(model: Transformer, tokenizer: BPETokenizer, count: int = 200) -> dict[str, float]:
    """Loss on fresh stories, each read from its beginning: nats a token and bits a byte, and the best possible."""
    nats = tokens = size = truth = 0
    for story in stories(count, TEST_SEED):
        ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(story.text), tokenizer.end_of_text]])
        nats += float(cross_entropy(model(ids[:, :-1]), ids[:, 1:]))
        tokens, size, truth = tokens + ids.shape[1] - 1, size + len(story.text.encode()), truth + story.nats
    return {"stories": count, "loss": nats / tokens, "bits_per_byte": bits_per_byte(nats, size),
            "best_possible_loss": truth / tokens, "best_possible_bits_per_byte": bits_per_byte(truth, size)}


def main() -> None:
    """Train, measure and store."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "minillm", *COMMAND, "--out", f"{folder}/run"], check=True)
        last = sorted(Path(folder, "run").glob("step-*"))[-1]
        FOLDER.mkdir(exist_ok=True)
        for name in FILES:
            shutil.copy(last / name, FOLDER / name)
    found = {name: round(value, 4) for name, value in measure(*load_course_model()).items()}
    write_atomically(FOLDER / "metrics.json", json.dumps({"command": "minillm " + " ".join(COMMAND), **found}, indent=1))


if __name__ == "__main__":
    main()
