"""Lesson 16: the course's model, which has read stories alone, learns to read Python's documentation, by every method.

Full fine-tuning, the methods of minillm/peft, and LoRA in every matrix at several ranks. All see the same batches. A method has
the best of the rates that were tried for it, two to four a factor of 2 to 3 apart, in one run of the same length with seed 99
(r = 1, the embeddings and QLoRA: the neighbouring row's). Measured are the loss on documentation that was not trained on, the
loss on stories afterwards, the bytes of gradients and moments, and all bytes of a step at its peak. BitFit is missing: this
model has no biases. Time is missing, too: the lesson measures it, all methods in turn.

What came out: 3.48 nats fully tuned, where seeds differ by 0.05; LoRA in every matrix 5.10, 4.62 and 4.33 at ranks 1, 8 and 64,
3.88 with the embeddings too; four bits cost nothing (4.58); adapters 4.69; q and v alone 5.26; prefix 5.35; LLaMA-Adapter 5.56;
a prompt 8.67, of 10.30 untouched. Stories, 0.60 before, are then at 7.1 fully tuned and 4.7 to 5.9 by LoRA.
"""

from collections.abc import Callable
from functools import partial

import torch

from minillm.config import ModelConfig, TrainConfig
from minillm.course.experiments import drive
from minillm.course.pretrained import FOLDER, load_course_model
from minillm.course.pretrained import measure as measure_stories
from minillm.data.loader import Loader, evaluation_batches
from minillm.data.prepare import DataConfig, Prepared
from minillm.engine import Engine
from minillm.model.transformer import Transformer, num_params
from minillm.nn.quantize import quantize_linears
from minillm.peft.adapter import add_adapters
from minillm.peft.freeze import count_trained, train_all
from minillm.peft.llama_adapter import add_llama_adapter
from minillm.peft.lora import LoraConfig, add_lora
from minillm.peft.prefix import add_prefix
from minillm.peft.prompt import add_prompt
from minillm.text.bpe import BPETokenizer
from minillm.train.live_bytes import LiveBytes

CONTEXT, SEEDS = 128, (0, 1, 2)
DATA = DataConfig(source="python-docs", size=400_000, val_fraction=0.1)
PLAN = TrainConfig(steps=60, batch_size=8, warmup_steps=10, weight_decay=0.0)
EVERYWHERE = ("attention.*", "ffn.*")


def low_rank(model: Transformer, seed: int, rank: int = 8, targets: tuple[str, ...] = EVERYWHERE,
             quantised: bool = False) -> None:
    """LoRA with alpha = 2 r, so that all ranks scale alike."""
    if quantised:
        quantize_linears(model, group="row", double=False)
    add_lora(model, LoraConfig(rank, 2.0 * rank, targets), seed=seed)


METHODS: dict[str, tuple[Callable, float]] = {
    "full fine-tuning": (lambda model, seed: train_all(model), 6e-3),
    "prompt, 16": (lambda model, seed: add_prompt(model, 16, seed=seed), 1.0),
    "prefix, 16": (lambda model, seed: add_prefix(model, 16, seed=seed), 3e-1),
    "LLaMA-Adapter, 16": (lambda model, seed: add_llama_adapter(model, 16, seed=seed), 3e-1),
    "adapters, 16": (lambda model, seed: add_adapters(model, 16, seed=seed), 3e-2),
    "parallel adapters, 16": (lambda model, seed: add_adapters(model, 16, parallel=True, seed=seed), 1e-2),
    "LoRA, q and v": (partial(low_rank, targets=("q", "v")), 1e-2),
    "LoRA, r = 1": (partial(low_rank, rank=1), 1e-2),
    "LoRA, r = 8": (low_rank, 1e-2),
    "QLoRA, r = 8": (partial(low_rank, quantised=True), 1e-2),
    "LoRA, r = 64": (partial(low_rank, rank=64), 3e-3),
    "LoRA, r = 64, embeddings too": (partial(low_rank, rank=64, targets=(*EVERYWHERE, "embed")), 3e-3)}
"""Row -> what it does to the model, and its learning rate."""
ROWS = dict.fromkeys(METHODS, load_course_model()[0].config)
PLANS = {row: {"lr": rate} for row, (_, rate) in METHODS.items()}


def tokenizer() -> BPETokenizer:
    """The base's, instead of one that is trained on the new text."""
    return BPETokenizer.load(FOLDER)


def tuned(method: Callable, config: ModelConfig, plan: TrainConfig, data: Prepared, context: int, seed: int,
          watch: Callable[[int, float], None] | None = None) -> Transformer:
    """The course's model, tuned by a method on `plan.steps` batches."""
    model = load_course_model()[0]
    method(model, seed)
    return drive(Engine(model, plan), Loader(data.train, plan.batch_size, context, seed=seed), watch)


TRAIN = {row: partial(tuned, method) for row, (method, _) in METHODS.items()}


@torch.no_grad()
def new_loss(model: Transformer, data: Prepared, sequences: int = 96) -> float:
    """Nats a token on documentation that nothing was trained on."""
    engine, total, count = Engine(model, PLAN), 0.0, 0
    for batch in evaluation_batches(data.val, batch_size=16, context=CONTEXT):
        total, count = total + engine.evaluate(batch), count + batch.count
        if count >= sequences * CONTEXT:
            break
    return total / count


def weight_bytes(model: Transformer) -> int:
    """Of all weights, packed ones as they are stored."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def costs(model: Transformer, data: Prepared) -> dict[str, float]:
    """Bytes of a step; changes the model."""
    engine = Engine(model, PLAN)
    with LiveBytes() as live:
        engine.forward_backward(next(Loader(data.train, PLAN.batch_size, CONTEXT)))
        engine.step()
    moments = sum(t.numel() * 4 for key, t in engine.state_dict().items() if key.startswith("exp_avg"))
    gradients = sum(w.numel() * w.element_size() for w in model.parameters() if w.requires_grad)
    held = weight_bytes(model)
    return {"states": gradients + moments, "weights": held, "peak": held + live.peak}


def measure(model: Transformer, data: Prepared) -> dict[str, float]:
    """Everything in one row of the table."""
    found = {"parameters": num_params(Transformer(model.config, device="meta")), "trained": count_trained(model).trained,
             "loss": new_loss(model, data), "stories": measure_stories(model, tokenizer(), 10)["loss"]}
    return found | costs(model, data)
