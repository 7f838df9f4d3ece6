"""The command line: `minillm doctor | data | tokenize | train | finetune | align | chat | sample | evaluate | plan | exercises | check | grade`.

Each command is a dataclass, and tyro makes its options from the fields; the options of the model and of training are
the fields of ModelConfig and TrainConfig. An error that the library explains is printed as one line, without a traceback.
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch.distributed as dist
import tyro

from minillm.config import ModelConfig, ParallelConfig, TrainConfig
from minillm.course.align import Align
from minillm.course.chat import Chat
from minillm.course.commands import Check, Exercises, Grade
from minillm.course.finetune import Finetune
from minillm.data.corpora import documents
from minillm.data.prepare import DataConfig, Prepared, prepare
from minillm.data.quality import clean_documents, cleaning_for
from minillm.data.stories import entropy, expected_bytes
from minillm.data.story_tasks import SEED, TASKS
from minillm.files import write_atomically
from minillm.model.families import PRESETS, preset
from minillm.parallel.agreement import FirstRankError
from minillm.progress import show_progress
from minillm.text.bpe import BPETokenizer
from minillm.train.checkpoint import find_checkpoint
from minillm.trainer import TrainingError

PROMPT = "Once upon a time"


@dataclass
class Doctor:
    """Say what this machine can do, and whether everything that the course needs is there."""

    def run(self) -> int:
        """Print the report; 1 when something is missing."""
        from minillm.course.doctor import examine
        lines, healthy = examine()
        print("\n".join(lines))
        return 0 if healthy else 1


@dataclass
class Data:
    """Look at a source of text: how much it is, what is in it, what a perfect model would score on it."""

    source: str = "stories"
    """stories, python-docs, python-source or languages; a file, folder or glob; or hf:owner/name."""
    size: int = 1_000_000
    """Bytes to read at most."""
    show: int = 1
    """Documents to print."""
    seed: int = 0
    """Seed of generated text."""
    clean: bool = False
    """Clean the text, and say what each stage removed; documents are shown and written as they are afterwards."""
    min_words: int | None = None
    """With --clean: the least words of a document; by default what is usual for the source."""
    out: Path | None = None
    """Write the documents to this .txt file, a blank line between them."""

    def run(self) -> int:
        """Print what was found."""
        found = list(documents(self.source, limit=self.size, seed=self.seed))
        if self.clean:
            found, report = clean_documents(found, cleaning_for(self.source, self.min_words))
            print(report.table() + "\n")
        for document in found[:self.show]:
            print(f"--- {document.name}\n{document.text}\n")
        total = sum(len(d.text.encode("utf-8", "replace")) for d in found)
        print(f"{self.source}: {len(found):,} documents, {total:,} bytes.")
        if self.source == "stories":
            print(f"True entropy: {entropy():.2f} nats a story of {expected_bytes():.1f} bytes, "
                  f"{entropy() / expected_bytes() / math.log(2):.4f} bits a byte. No model can do better on average.")
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text("\n\n".join(d.text for d in found) + "\n", encoding="utf-8")
            print(f"Written to {self.out}.")
        return 0


@dataclass
class Tokenize:
    """Train a tokenizer and write token shards; or, with --text, show how a text is cut into tokens."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: int = 1024
    """Tokens in all: 256 bytes, the merges, and the chat tokens."""
    out: Path = Path("data")
    """The folder to write, or with --text the one whose tokenizer to use (a run works too)."""
    text: str | None = None
    """Show the tokens of this text instead of writing anything."""

    def run(self) -> int:
        """Print what was made, or the tokens."""
        if self.text is not None:
            tokenizer = _tokenizer_of(self.out)
            ids = tokenizer.encode(self.text)
            print(f"{len(ids)} tokens for {len(self.text.encode('utf-8', 'replace'))} bytes")
            for number in ids:
                print(f"{number:>6}  {tokenizer.token_bytes(number)!r}")
            return 0
        made = prepare(self.out, self.data, self.vocab_size)
        print(describe(made))
        return 0


@dataclass
class Train:
    """Train a model: tokenizer, token shards, pretraining, samples and a report, all in one folder.

    A folder with an unfinished run is resumed; a finished one is left alone, unless --fresh is given.
    """

    out: Path = Path("runs/first")
    """The folder of the run."""
    preset: Annotated[str, tyro.conf.arg(help_behavior_hint=f"(default: first; one of {', '.join(PRESETS)})")] = "first"
    """The model to start from; --model.* then changes single fields."""
    data: DataConfig = field(default_factory=DataConfig)
    prepared: Path | None = None
    """A data folder made by `minillm tokenize`, instead of making one in the run."""
    model: ModelConfig = field(default_factory=lambda: preset("first"))
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    resume: Path | None = None
    """Go on from this checkpoint, not from the newest."""
    fresh: bool = False
    """Start over; what was in --out is kept beside it under another name."""
    prompt: str = PROMPT
    """What the samples begin with."""
    tensorboard: bool = False
    """Write TensorBoard's files too."""

    def run(self) -> int:
        """Do it all."""
        from minillm.course.first_run import first_run
        return first_run(self)


@dataclass
class Sample:
    """Let a trained model write."""

    run_or_folder: Annotated[Path, tyro.conf.Positional] = Path("runs/first")
    """A run, one of its checkpoints, or any Hugging Face folder with a byte-level tokenizer.json."""
    prompt: str = PROMPT
    """What to write on from."""
    max_new_tokens: int = 300
    """Tokens to write at most."""
    temperature: float = 0.8
    """0 always takes the most likely token; 1 is the model's own distribution."""
    top_k: int | None = None
    """Choose among the k most likely tokens."""
    top_p: float | None = None
    """Choose among the most likely tokens that reach p together."""
    min_p: float | None = None
    """Choose among tokens at least this fraction as likely as the best."""
    repetition_penalty: float = 1.0
    """Above 1: what was said is said less again."""
    stop: tuple[str, ...] = ()
    """Stop before one of these strings."""
    seed: int | None = None
    """Repeat the same text."""
    uncached: bool = False
    """Read the whole text again for every token: the same tokens, slowly."""
    compile: bool = False
    """Compile the model first, for half a minute: faster after, which pays for long texts of small models."""
    packed: bool = False
    """Store large weights in the order in which CPUs read them: at once, and faster for models of some million parameters."""

    def run(self) -> int:
        """Print the text as it is written."""
        from minillm.infer.generate import stream_text
        from minillm.infer.packed import packed
        from minillm.infer.sampling import Sampling
        from minillm.peft.saving import load_adapted
        folder = find_checkpoint(self.run_or_folder)
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        model, tokenizer = load_adapted(folder).eval(), _tokenizer_of(folder)
        model = packed(model) if self.packed else model
        print(self.prompt, end="", flush=True)
        for piece in stream_text(model, tokenizer, self.prompt, self.max_new_tokens, sampling=sampling, stop=self.stop,
                                 seed=self.seed, cached=not self.uncached, compiled=self.compile):
            print(piece, end="", flush=True)
        print()
        return 0


@dataclass
class Plan:
    """Say what pretraining will cost before it begins: operations, days, and memory for weights and optimizer."""

    model: str
    """A preset such as llama-65b, or a number of parameters such as 70B."""
    tokens: str | None = None
    """Tokens to train on, such as 1.4T or 1.4e12; 20 a parameter by default."""
    gpu: str = "a100-80g"
    """What to train on; an unknown name lists all."""
    gpus: int = 1
    """How many of them."""
    utilisation: float = 0.4
    """The share of their peak that is reached (MFU). 0.3 to 0.5 is usual."""
    precision: Literal["fp32", "tf32", "fp16", "bf16", "fp8"] | None = None
    """Format of the products; bf16 by default, or what the GPU has."""
    states: Literal["fp32", "half", "float", "both"] | None = None
    """What is kept of a parameter: all in float32 (fp32), or 16-bit weights with gradients in 16 bits (half), 32 or both."""
    context: int | None = None
    """Tokens that attention looks over; the model's own by default."""

    def run(self) -> int:
        """Print the plan."""
        from minillm.plan.devices import find_device
        from minillm.plan.training import find_model, parse_count, plan_training, render
        tokens = None if self.tokens is None else parse_count(self.tokens)
        print(render(plan_training(find_model(self.model), find_device(self.gpu), gpus=self.gpus, tokens=tokens,
                                   utilisation=self.utilisation, precision=self.precision, convention=self.states,
                                   context=self.context), self.model))
        return 0


@dataclass
class Evaluate:
    """Measure a trained model: held-out loss by domain, accuracy by task, with and without examples in the prompt."""

    run_or_folder: Annotated[Path, tyro.conf.Positional] = Path("runs/first")
    """A run, one of its checkpoints, or any Hugging Face folder with a byte-level tokenizer.json."""
    task: tuple[str, ...] = tuple(TASKS)
    """Tasks by name, or files of items: one JSON object a line, with context, choices and answer, or context and target."""
    shots: tuple[int, ...] = (0, 4)
    """How many solved items stand in front of a question."""
    domains: tuple[str, ...] = ("stories", "python-docs", "python-source", "languages")
    """Sources of text, as for `minillm data`; none with --domains alone."""
    items: int = 200
    """Questions of each task at most."""
    size: int = 50_000
    """Bytes of each domain, about."""
    seed: int = SEED
    """Of the tasks and of the choice of examples."""
    out: Path | None = None
    """Write all of it to this JSON file, too."""

    def run(self) -> int:
        """Print two tables."""
        from minillm.course import evaluation
        from minillm.peft.saving import load_adapted
        folder = find_checkpoint(self.run_or_folder)
        model, tokenizer = load_adapted(folder).eval(), _tokenizer_of(folder)
        seen = evaluation.trained_on(folder)
        if seen is None:
            print(f"Nothing beside {folder} says what it was trained on: a domain other than stories may not be new to it.\n")
        losses = evaluation.domain_losses(model, tokenizer, self.domains, self.size, seen)
        if losses:
            print("\n".join(evaluation.loss_table(losses)) + "\n", flush=True)
        scores = evaluation.task_scores(model, tokenizer, self.task, self.shots, self.items, self.seed)
        if scores:
            print("\n".join(evaluation.task_table(scores)))
        if self.out:
            found = {"model": str(folder), "seed": self.seed, "loss": losses, "tasks": scores}
            write_atomically(self.out, json.dumps(found, indent=1))
        return 0


COMMANDS = {"doctor": Doctor, "data": Data, "tokenize": Tokenize, "train": Train, "finetune": Finetune, "align": Align, "chat": Chat, "sample": Sample, "evaluate": Evaluate, "plan": Plan,
            "exercises": Exercises, "check": Check, "grade": Grade}


def main(args: list[str] | None = None) -> None:
    """Parse, run, and exit: 0 for success, 2 for a request that cannot be carried out, 3 for training gone wrong,
    130 after Ctrl-C.
    """
    args = sys.argv[1:] if args is None else args
    first = os.environ.get("RANK", "0") == "0"  # of the ranks that torchrun has started
    show_progress(first)
    try:
        sys.exit(parse(args).run())
    except FirstRankError:  # told by the first rank
        sys.exit(2)
    except TrainingError as error:  # all ranks have the same
        if first:
            print(f"minillm: {error}", file=sys.stderr)
        sys.exit(3)
    except (ValueError, OSError, ImportError) as error:
        if first:
            print(f"minillm: {error}", file=sys.stderr)
        elif dist.is_initialized():  # before that, all ranks have read the same words
            print(f"minillm, rank {dist.get_rank()}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("minillm: interrupted.", file=sys.stderr)
        sys.exit(130)


def parse(args: list[str]):
    """The command that the arguments ask for. Unknown options end the program with the nearest known ones."""
    if args[:1] == ["train"]:
        start = Train(model=preset(_value_of("--preset", args, "first")))
        words = [re.sub(r"^--engine(?=$|=)", "--parallel.engine", word) for word in args[1:]]
        return tyro.cli(Train, prog="minillm train", args=words, default=start)
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="minillm", args=args or ["--help"],
                                                description="From raw text to a model that talks.")


def _tokenizer_of(folder: Path) -> BPETokenizer:
    """The tokenizer of a data folder, a checkpoint or a run."""
    return BPETokenizer.load(folder if (folder / "tokenizer.json").exists() else find_checkpoint(folder))


def _value_of(option: str, args: list[str], default: str) -> str:
    """An option's value before the arguments are parsed: the preset decides the defaults of all others."""
    for place, word in enumerate(args):
        if word == option and place + 1 < len(args):
            return args[place + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return default


def describe(data: Prepared) -> str:
    """A data folder in two lines."""
    train, val = data.train, data.val
    return (f"{data.folder}: {data.tokenizer.vocab_size:,} tokens in the vocabulary; {train.tokens:,} to train on, "
            f"{val.tokens:,} to validate.\n{train.bytes / train.tokens:.2f} bytes a token.")
