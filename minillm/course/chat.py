"""`minillm chat`: talk to a model in the terminal. chat_widget.py is the same in a notebook."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minillm.text.chat import TEMPLATES

HELP = "/new starts over, /undo takes the last turn back, /stats says how fast it was, /exit ends. Ctrl-C stops an answer."


@dataclass
class Chat:
    """Talk to a trained model; the answer appears as it is written."""

    run_or_folder: Annotated[Path, tyro.conf.Positional] = Path("runs/first")
    """A run (its last stage answers), a checkpoint, or any Hugging Face folder with a byte-level tokenizer.json."""
    question: tuple[str, ...] = ()
    """Ask these one after another, and end; without any, it waits for you."""
    template: str = "minillm"
    """How the conversation is laid out: minillm, chatml, llama2, alpaca or vicuna."""
    system: str | None = None
    """What the model is told before the conversation."""
    temperature: float = 0.7
    """0 always takes the most likely token; 1 is the model's own distribution."""
    top_p: float | None = None
    """Choose among the most likely tokens that reach p together."""
    max_new_tokens: int = 120
    """Where an answer is cut off."""
    seed: int | None = None
    """Repeat the same answers."""

    def run(self) -> int:
        """Talk."""
        from minillm.course.align import talking_model
        from minillm.peft.saving import load_adapted
        from minillm.text.bpe import BPETokenizer
        if self.template not in TEMPLATES:
            raise ValueError(f"--template {self.template}: there are {', '.join(TEMPLATES)}.")
        folder = talking_model(self.run_or_folder)
        talk = Conversation(load_adapted(folder).eval(), BPETokenizer.load(folder), self)
        if not (folder.parent / "request.json").exists() and (folder / "trainer.json").exists():
            print(f"{folder} has been pretrained only: it writes on, and does not answer. To tune it: minillm align {self.run_or_folder}\n")
        if self.question:
            for asked in self.question:
                print(f"you: {asked}")
                talk.ask(asked)
            return 0
        print(f"{folder}\n{HELP}\n")
        while (asked := _typed()) is not None:
            if not talk.command(asked):
                return 0
        return 0


class Conversation:
    """What was said, and a model that goes on."""

    def __init__(self, model, tokenizer, options: Chat):
        from minillm.infer.sampling import Sampling
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.template, self.sampling = TEMPLATES[options.template], Sampling(options.temperature, top_p=options.top_p)
        self.messages: list[dict[str, str]] = []
        self.asked, self.stats = 0, "Nothing was answered yet."
        self.start_over()

    def start_over(self) -> None:
        """Forget all but the system message."""
        self.messages = [{"role": "system", "content": self.options.system}] if self.options.system else []

    def command(self, typed: str) -> bool:
        """Do what a line asks for. Returns False when that is to end."""
        if typed in ("/exit", "/quit"):
            return False
        if typed == "/new":
            self.start_over()
        elif typed == "/undo":
            if len(self.messages) > 1:  # not the system message
                del self.messages[-2:]
        elif typed == "/stats":
            print(self.stats)
        elif typed.startswith("/"):
            print(f"{typed.split()[0]} is no command. {HELP}")
        elif typed.strip():
            self.ask(typed)
        return True

    def ask(self, question: str) -> None:
        """Print the answer as it comes. A question that cannot be answered leaves the conversation as it was."""
        from minillm.infer.answer import fitting, stream_answer
        said = [*self.messages, {"role": "user", "content": question}]
        limit = min(self.options.max_new_tokens, self.model.config.context // 2)
        try:
            said, dropped = fitting(self.template, self.tokenizer, said, self.model.config.context - limit)
        except ValueError as error:
            if not self.messages and self.options.question:
                raise
            print(error)
            return
        if dropped:
            print(f"(the first {dropped} turn{'s' if dropped > 1 else ''} no longer fit the context and are forgotten)")
        seed = None if self.options.seed is None else self.options.seed + self.asked
        pieces, started = [], time.perf_counter()
        print("model: ", end="", flush=True)
        try:
            for piece in stream_answer(self.model, self.tokenizer, self.template, said, limit, sampling=self.sampling, seed=seed):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            print(" ...", end="")
        print("\n")
        self.asked += 1
        answer, seconds = "".join(pieces), time.perf_counter() - started
        tokens = len(self.tokenizer.encode(answer))
        self.stats = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s; the conversation has {len(said) + 1} messages."
        self.messages = [*said, {"role": "assistant", "content": answer}]


def _typed() -> str | None:
    """A line from the keyboard; None when it has ended, or Ctrl-C was pressed."""
    try:
        return input("you: ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
