"""`minillm align`: a model that writes on becomes one that answers, and then one that answers as people prefer.

The second half of `make run`: instruction tuning, comparisons of the model's own answers, a reward model, and PPO (or DPO, or GRPO).
Everything is in the folder of the run, a sub-folder for each stage; what each one gained goes to the run's metrics.jsonl, and
the report gets a table of before and after. Stopped at any moment, the same command goes on.
"""

import json
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minillm.align.online import OnlineConfig
from minillm.config import ParallelConfig, TrainConfig

QUIET = dict(weight_decay=0.0, min_lr=0.1)


@dataclass
class Align:
    """Teach a trained model to answer, and then to answer as people prefer: instruction tuning, a reward model, PPO."""

    run_folder: Annotated[Path, tyro.conf.Positional] = Path("runs/first")
    """A run that `minillm train` has finished, or with --out any model's folder."""
    out: Path | None = None
    """The folder of the stages; that of the run by default."""
    method: Literal["ppo", "dpo", "grpo", "sft"] = "ppo"
    """From comparisons by a reward model and a critic (ppo) or directly (dpo), or from answers that a program checks (grpo); sft
    stops after instruction tuning, from which every other method goes on."""
    kinds: tuple[str, ...] = ("add",)
    """What is asked: add (56+21=), sum (differences, too), sort, reverse, story."""
    conversations: str | None = None
    """Your own instead: a JSONL file, or hf:owner/name, in one of the usual layouts; one of eight is kept for measuring."""
    preferences: str | None = None
    """Your own comparisons instead of those of the model's answers; JSONL or hf:owner/name with prompt, chosen and rejected."""
    demonstrations: int = 15_000
    """Conversations to be tuned on."""
    wordy: float = 0.25
    """Share of the demonstrations that answer in a sentence."""
    told: float = 0.03
    """Share of the demonstrations that tell the beginning of a story, so that the model does not forget how."""
    turns: int = 3
    """Questions of a conversation at most, so that the model learns to answer the last one."""
    context: int = 128
    """Tokens in a row of packed conversations; longer ones are left out."""
    pairs: int = 2_048
    """Comparisons for the reward model, or for dpo."""
    held_out_pairs: int = 512
    """Comparisons that it is measured on."""
    sft: TrainConfig = field(default_factory=lambda: TrainConfig(
        steps=600, batch_size=16, lr=1e-2, optimizer="muon", eval_every=100, checkpoint_every=200, **QUIET))
    reward: TrainConfig = field(default_factory=lambda: TrainConfig(
        steps=60, batch_size=64, lr=5e-3, optimizer="muon", warmup_steps=10, eval_every=20, checkpoint_every=20, **QUIET))
    dpo: TrainConfig = field(default_factory=lambda: TrainConfig(
        steps=60, batch_size=64, lr=5e-5, warmup_steps=10, eval_every=20, checkpoint_every=20, **QUIET))
    policy: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=64, lr=5e-5, warmup_steps=5, checkpoint_every=4, **QUIET))
    """ppo, grpo: how the policy is trained, and ppo's critic; steps follow from the rounds, and it is measured at the end."""
    critic_lr: float = 1e-3
    """ppo: the critic's peak learning rate."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    """Seed of the questions, the writers and the comparisons."""
    fresh: bool = False
    """Start the stages over; what was there is kept under another name."""

    def run(self) -> int:
        """Do it all."""
        from minillm.course.first_run import on_ranks
        usual = TrainConfig()
        if unread := [name for name in ("steps", "eval_every", "eval_sequences") if getattr(self.policy, name) != getattr(usual, name)]:
            raise ValueError(f"--policy.{unread[0].replace('_', '-')} would change nothing: the rounds, epochs and answers of --online settle a "
                             f"policy's steps, and it is measured at the end. Leave it out.")
        return on_ranks(replace(self, policy=replace(self.policy, steps=self.online.steps(self.policy.batch_size))), "align", _run)


def stages(method: str) -> tuple[str, ...]:
    """The folders that a method fills, in order."""
    return {"ppo": ("sft", "reward", "ppo"), "sft": ("sft",)}.get(method, ("sft", method))


def talking_model(run: Path) -> Path:
    """The newest checkpoint of the last stage that a run has; the run's own where nothing was aligned."""
    from minillm.train.checkpoint import find_checkpoint, latest_checkpoint
    found = [newest for name in ("ppo", "dpo", "grpo", "sft") if (newest := latest_checkpoint(run / name))]
    return max(found, key=lambda folder: (folder.parent.name != "sft", folder.stat().st_mtime)) if found else find_checkpoint(run)


def _run(request: Align, group) -> int:
    """All stages, on one of the group's ranks or alone."""
    from minillm.course import align_stages as stage
    from minillm.course.align_gains import gain, talker
    from minillm.parallel.agreement import on_first
    from minillm.text.bpe import BPETokenizer
    from minillm.text.chat import TEMPLATES
    from minillm.train.checkpoint import find_checkpoint, latest_checkpoint
    base = find_checkpoint(request.run_folder)
    out = request.out or request.run_folder
    if request.out is None and base.parent != request.run_folder:
        raise ValueError(f"{request.run_folder} is a model and no run: say with --out where the stages are to be kept.")
    _check_finished(base)
    if request.fresh:
        on_first(lambda: _make_room(out), group)
    shop = stage.Workshop(request, out, BPETokenizer.load(base), TEMPLATES["minillm"])
    newest = {name: lambda name=name: latest_checkpoint(out / name) for name in stages(request.method)}
    with _stopping() as stop:
        work = {"sft": lambda: stage.tune(shop, base, talker(shop))}
        if request.method in ("ppo", "dpo"):
            work["pairs"] = lambda: on_first(lambda: stage.compare_answers(shop, newest["sft"]()), group)
        if request.method == "ppo":
            work["reward"] = lambda: stage.train_reward_model(shop, newest["sft"]())
        if request.method == "dpo":
            work["dpo"] = lambda: stage.train_dpo(shop, newest["sft"]())
        if request.method in ("ppo", "grpo"):
            work[request.method] = lambda: stage.improve_policy(shop, newest["sft"](), newest["reward"]() if "reward" in newest else None, stop)
        for name, do in work.items():
            on_first(lambda: _begin(request, name, base, out), group)
            if name in _noted(out)["stages"]:
                continue
            started = time.perf_counter()
            if not do() or stop():
                on_first(lambda: print(f"Stopped in the stage {name} and saved. Go on with the same command."), group)
                return 0
            seconds = time.perf_counter() - started
            on_first(lambda: _note(out, base, name, {"seconds": round(seconds, 1)} | gain(shop, name, base, newest)), group)
    on_first(lambda: _conclude(request, out, base), group)
    return 0


def _check_finished(base: Path) -> None:
    """Refuse a base in the middle of its training, which would be another one tomorrow."""
    notes = json.loads((base / "trainer.json").read_text()) if (base / "trainer.json").exists() else None
    if notes and notes["step"] < notes["train"]["steps"]:
        raise ValueError(f"{base} is in the middle of its training, at step {notes['step']} of {notes['train']['steps']}. Let the command that "
                         f"began it finish first.")


READS = {"sft": ("kinds", "conversations", "demonstrations", "wordy", "told", "turns", "context", "sft", "seed"),
         "pairs": ("preferences", "pairs", "held_out_pairs"), "reward": ("reward",),
         "ppo": ("policy", "critic_lr", "online"), "grpo": ("policy", "online"), "dpo": ("dpo", "online")}
"""The options that a stage depends on; what those before it depend on is settled by then."""


def _begin(request: Align, name: str, base: Path, out: Path) -> None:
    """Note what a stage is made from, and refuse to go on with something else. Raises: ValueError that names the fields."""
    from minillm.course.first_run import note_request
    from minillm.trainer import FREE_TO_CHANGE
    asked = {key: value for key, value in asdict(request).items() if key in READS[name]}
    for config in asked.values():
        for key in FREE_TO_CHANGE if isinstance(config, dict) else ():
            config.pop(key, None)
    beside = {"sft": {"base": base.name}, "pairs": {"max_new_tokens": request.online.max_new_tokens}}
    note_request(out / name / "request.json", asked | beside.get(name, {}))


def _make_room(out: Path) -> None:
    """Give what was there other names."""
    from minillm.course.first_run import set_aside
    from minillm.train.metrics import read_metrics
    for name in ("alignment.json", *READS):
        set_aside(out / name)
    _rewrite_metrics(out, [record for record in read_metrics(out / "metrics.jsonl") if "stage" not in record])


def _noted(out: Path) -> dict:
    """What alignment.json says: the gain of every stage that has ended."""
    noted = out / "alignment.json"
    return json.loads(noted.read_text()) if noted.exists() else {"stages": {}}


def _note(out: Path, base: Path, name: str, gained: dict) -> None:
    """Write down what a stage gained: in alignment.json, and in the run's metrics.jsonl, at the base's step."""
    from minillm.files import write_atomically
    from minillm.progress import say
    from minillm.train.metrics import read_metrics
    notes = _noted(out)
    notes["stages"][name] = gained
    write_atomically(out / "alignment.json", json.dumps(notes, indent=1))
    flat = {key: value for key, value in gained.items() if not isinstance(value, dict)}
    flat |= {f"{key}_{when}": value for when in ("before", "after") for key, value in gained.get(when, {}).items()}
    records = [record for record in read_metrics(out / "metrics.jsonl") if record.get("stage") != name]
    trained = base / "trainer.json"
    records.append({"step": json.loads(trained.read_text())["step"] if trained.exists() else 0, "stage": name, **flat})
    _rewrite_metrics(out, records)
    changed = [f"{key} {value} -> {gained['after'][key]}" for key, value in gained.get("before", {}).items()]
    alone = [f"{key} {value}" for key, value in gained.items() if not isinstance(value, dict) and key != "seconds"]
    say(f"\n  {name}, {gained['seconds']:.0f} s: {', '.join(changed + alone)}\n")


def _rewrite_metrics(out: Path, records: list[dict]) -> None:
    """The run's metrics.jsonl with these records."""
    from minillm.files import write_atomically
    write_atomically(out / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def _conclude(request: Align, out: Path, base: Path) -> None:
    """The table of before and after, the report, and what to type next."""
    from minillm.course.align_report import as_text, table
    from minillm.course.first_run import rewrite_report
    notes = _noted(out)
    has_report = rewrite_report(out)
    print("\n" + as_text(table(notes)))
    print(f"""
{f'  {out / "report.html"}   with this table, and answers before and after' if has_report else ''}
  {out / request.method}   the model that answers; beside it those of the other stages

What next?
  .venv/bin/minillm chat {out}
  .venv/bin/minillm align {out} --method dpo
  make lab          the course: lessons 17 and 18 are about this
""".rstrip())


@contextmanager
def _stopping():
    """A function that says whether SIGINT or SIGTERM has come; a second one does what it always does."""
    seen: list[int] = []

    def on_signal(number: int, frame) -> None:
        seen.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    previous = {which: signal.signal(which, on_signal) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
