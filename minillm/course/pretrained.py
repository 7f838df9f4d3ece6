"""The course's own checkpoints: what lessons load when they need a model that has learned something, or to answer.

`make pretrained` trains them again, by the commands below, and stores weights, tokenizer and metrics in
minillm/course/pretrained/ and its folder chat/, which is the first tuned on instructions and kept in 16 bits. Under 4 MB each. A
test measures both again and holds them to what metrics.json says.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from minillm.course.align_gains import QUESTIONS
from minillm.course.align_stages import MEASURED
from minillm.course.judge import judge
from minillm.data.instructions import instructions
from minillm.data.stories import stories
from minillm.files import write_atomically
from minillm.model.huggingface import load_pretrained, save_pretrained
from minillm.model.transformer import Transformer
from minillm.text.bpe import BPETokenizer
from minillm.text.chat import TEMPLATES
from minillm.train.checkpoint import latest_checkpoint
from minillm.train.loss import bits_per_byte, cross_entropy

FOLDER = Path(__file__).with_name("pretrained")
COMMAND = ["train", "--train.steps", "1000", "--train.seed", "1"]
FILES = ("config.json", "model.safetensors", "tokenizer.json")
TUNE = ["align", "--method", "sft"]
CHAT = FOLDER / "chat"
TEST_SEED = 12_345  # of stories that training, which uses seed 0, has not seen


def load_course_model() -> tuple[Transformer, BPETokenizer]:
    """The course's model, in evaluation mode, and its tokenizer."""
    return load_pretrained(FOLDER).eval(), BPETokenizer.load(FOLDER)


def load_course_chat() -> tuple[Transformer, BPETokenizer]:
    """The same model, tuned to answer in the template TEMPLATES["minillm"]: sums such as 56+21=, and the beginnings of stories."""
    return load_pretrained(CHAT).eval(), BPETokenizer.load(CHAT)


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


def measure_chat(model: Transformer, tokenizer: BPETokenizer) -> dict[str, float]:
    """On 256 held-out sums, those of `minillm align`."""
    asked = list(islice(instructions(MEASURED, "test", ["add"]), QUESTIONS))
    return judge(model, tokenizer, TEMPLATES["minillm"], asked, 16).numbers()


def pretrain() -> None:
    """Train the first one, measure it and store it."""
    with tempfile.TemporaryDirectory() as folder:
        _minillm(*COMMAND, "--out", f"{folder}/run")
        _store(latest_checkpoint(Path(folder, "run")), FOLDER, FILES)
    _note(FOLDER, COMMAND, measure(*load_course_model()))


def tune() -> None:
    """Tune it on instructions, measure that and store it."""
    with tempfile.TemporaryDirectory() as folder:
        _minillm(*TUNE[:1], FOLDER, *TUNE[1:], "--out", f"{folder}/run")
        save_pretrained(load_pretrained(latest_checkpoint(Path(folder, "run", "sft")), dtype=torch.bfloat16), CHAT)
        shutil.copy(FOLDER / "tokenizer.json", CHAT)
    _note(CHAT, TUNE, measure_chat(*load_course_chat()))


def _minillm(*words) -> None:
    subprocess.run([sys.executable, "-m", "minillm", *map(str, words)], check=True)


def _store(checkpoint: Path, folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(checkpoint / name, folder / name)


def _note(folder: Path, command: list[str], found: dict[str, float]) -> None:
    noted = {"command": "minillm " + " ".join(command)} | {name: round(value, 4) for name, value in found.items()}
    write_atomically(folder / "metrics.json", json.dumps(noted, indent=1))


if __name__ == "__main__":
    for which in sys.argv[1:] or ("pretrain", "tune"):
        {"pretrain": pretrain, "tune": tune}[which]()
