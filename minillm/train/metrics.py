"""Where a run's numbers go: one JSON object a line, in metrics.jsonl, and TensorBoard when asked.

Every line has a step. A run that resumes first drops the lines after its checkpoint, so that the file reads as if
nothing had happened.
"""

import json
from pathlib import Path

from minillm.files import write_atomically


class Metrics:
    """An open metrics file; `write(step, loss=...)` appends a line and puts it on the disk's way at once."""

    def __init__(self, path: Path, *, resume_at: int | None = None, tensorboard: bool = False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_metrics(path) if r["step"] <= resume_at] if resume_at is not None else []
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", buffering=1)
        self._board = _tensorboard(self.path.parent / "tensorboard") if tensorboard else None

    def write(self, step: int, **values) -> None:
        """Append one record; numbers go to TensorBoard too."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board:
            self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics file; a last line that a crash cut short is left out."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def _tensorboard(folder: Path):
    """TensorBoard's writer, or an error that says how to get it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard.") from None
    return SummaryWriter(str(folder))
