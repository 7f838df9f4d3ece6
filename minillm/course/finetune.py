"""`minillm finetune`: a model that is there, any text or JSONL file, and one of the methods of minillm/peft.

The base is a run, one of its checkpoints or a Hugging Face folder with a byte-level tokenizer.json. Checkpoints hold the adapter
alone, in PEFT's layout; for bitfit and full they are whole models. A run that was stopped goes on by the same command.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from minillm.config import ParallelConfig, TrainConfig
from minillm.data.prepare import DataConfig

Method = Literal["lora", "qlora", "prompt", "prefix", "adapter", "parallel-adapter", "llama-adapter", "bitfit", "full"]


@dataclass
class Finetune:
    """Fine-tune a trained model on other text: a small part of it, or all."""

    base: Annotated[Path, tyro.conf.Positional] = Path("runs/first")
    """A run, one of its checkpoints, or any Hugging Face folder with a byte-level tokenizer.json."""
    out: Path = Path("runs/tuned")
    """The folder of the run."""
    method: Method = "lora"
    """What is trained: low-rank changes (qlora: of a base in 4 bits); vectors, or keys and values, before the text; small layers
    in each block; gated prefixes; all biases; or everything."""
    rank: int = 8
    """lora: the inner size of the changes."""
    alpha: float = 16.0
    """lora: they are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q", "v")
    """lora: which layers, by the ends of their names or patterns, such as q v or *.ffn.*."""
    dropout: float = 0.0
    """lora: of what goes into the changes."""
    length: int = 16
    """prompt, prefix, llama-adapter: how many vectors."""
    size: int = 16
    """adapter: the width of the small layers."""
    data: DataConfig = field(default_factory=lambda: DataConfig(source="python-docs", size=1_000_000))
    context: int | None = None
    """Tokens in a training sequence; by default the base's."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200, lr=1e-3, warmup_steps=10, weight_decay=0.0))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    resume: Path | None = None
    """Go on from this checkpoint, not from the newest."""
    fresh: bool = False
    """Start over; what was in --out is kept beside it under another name."""

    def run(self) -> int:
        """Do it all."""
        from minillm.course.first_run import on_ranks
        return on_ranks(self, "finetune", _run)


def prepare_model(model, request: Finetune) -> None:
    """Make a loaded base ready for the method: what is frozen, what is added."""
    from minillm.nn.quantize import quantize_linears
    from minillm.peft import adapter, freeze, llama_adapter, lora, prefix, prompt
    if request.method == "qlora":
        quantize_linears(model)
    low_rank = partial(lora.add_lora, config=lora.LoraConfig(request.rank, request.alpha, request.targets, request.dropout))
    seed = request.train.seed
    {
        "lora": partial(low_rank, seed=seed), "qlora": partial(low_rank, seed=seed),
        "prompt": partial(prompt.add_prompt, length=request.length, seed=seed),
        "prefix": partial(prefix.add_prefix, length=request.length, seed=seed),
        "adapter": partial(adapter.add_adapters, size=request.size, seed=seed),
        "parallel-adapter": partial(adapter.add_adapters, size=request.size, parallel=True, seed=seed),
        "llama-adapter": partial(llama_adapter.add_llama_adapter, length=request.length, seed=seed),
        "bitfit": freeze.train_only_biases, "full": freeze.train_all,
    }[request.method](model)


def _run(request: Finetune, group) -> int:
    """The whole of it, on one of the group's ranks or alone."""
    from minillm.course.first_run import place_to_begin
    from minillm.data.loader import Loader
    from minillm.data.prepare import open_prepared, prepare
    from minillm.model.huggingface import load_pretrained
    from minillm.parallel.agreement import on_first
    from minillm.peft.freeze import count_trained
    from minillm.peft.saving import save_adapter
    from minillm.progress import say
    from minillm.text.bpe import BPETokenizer
    from minillm.torch_engine import build_engine
    from minillm.train.checkpoint import find_checkpoint
    from minillm.trainer import Trainer
    base = find_checkpoint(request.base)
    resume = on_first(lambda: place_to_begin(request, request.out), group)
    model, tokenizer = load_pretrained(base), BPETokenizer.load(base)
    prepare_model(model, request)
    on_first(lambda: _same_request(request, base), group)
    data = open_prepared(on_first(lambda: prepare(request.out / "data", request.data, tokenizer=tokenizer).folder, group))
    size, context = count_trained(model), request.context or model.config.context
    engine = build_engine(model, request.train, request.parallel)
    torch.manual_seed(request.train.seed * 1000 + engine.rank)  # dropout: the same at every try, and another on each rank
    loader = Loader(data.train, request.train.batch_size, context, seed=request.train.seed, rank=engine.rank, ranks=engine.ranks)
    whole = request.method in ("bitfit", "full")
    trainer = Trainer(engine, loader, data.val, request.out, tokenizer=tokenizer,
                      save_model=None if whole else partial(save_adapter, base=base.resolve()))
    say(f"{request.out}: {request.method} on {base} trains {size.trained:,} of {size.total:,} parameters ({size.share:.2%}), "
        f"{request.train.steps:,} steps of {request.train.batch_size * context:,} tokens on {engine.device}"
        + (f", {engine.world} ranks" if engine.world > 1 else "") + (f", going on from {resume.name}" if resume else ""))
    finished = trainer.train(resume=resume)
    engine.on_first(lambda: _say_goodbye(request.out, find_checkpoint(request.out), engine.steps_done, finished))
    return 0


def _same_request(request: Finetune, base: Path) -> None:
    """Note what is tuned and how; another request in the same folder is refused."""
    from minillm.course.first_run import note_request
    note_request(request.out / "finetune.json", {name: value for name, value in asdict(request).items() if name in (
        "method", "rank", "alpha", "targets", "dropout", "length", "size", "context")} | {"base": str(base.resolve())})


def _say_goodbye(run: Path, checkpoint: Path, step: int, finished: bool) -> None:
    """What came out, and what to type next."""
    from minillm.train.metrics import read_metrics
    if not finished:
        print(f"Stopped after step {step} and saved. Go on with the same command.")
        return
    losses = [record["val_loss"] for record in read_metrics(run / "metrics.jsonl") if "val_loss" in record]
    size = sum(file.stat().st_size for file in checkpoint.glob("*model.safetensors"))
    print(f"Done. Validation loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token. {checkpoint} holds {size:,} bytes of weights.\n"
          f"Let it write: minillm sample {run}")
