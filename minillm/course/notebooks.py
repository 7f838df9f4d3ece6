"""`make notebooks`: execute notebooks from a clean kernel and store them so that only what matters differs.

Cell ids follow from a cell's place, metadata that depends on the machine or the clock is dropped, and the file is
written only when every cell has run.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from minillm.files import write_atomically
from minillm.progress import show_progress, track

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT_METADATA = {"tags", "jupyter", "nbgrader"}


def execute(path: Path, timeout: int = 120) -> None:
    """Run all cells of a notebook in its own folder and store the outputs in place.

    Raises: nbclient's CellExecutionError, with the cell and its traceback; the file is then left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Frozen modules make the debugger complain on standard error in some kernels
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", coalesce_streams=True,
                   resources={"metadata": {"path": str(Path(path).parent)}}).execute()
    write_atomically(path, nbformat.writes(normalise(notebook), version=4) + "\n")


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook with stable ids and without what differs from machine to machine, in place."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat_minor = 5
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place:03d}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT_METADATA})
    return notebook


def main() -> None:
    """Execute the notebooks named on the command line."""
    show_progress()
    for name in track(sys.argv[1:], "execute", unit="notebook"):
        execute(Path(name))


if __name__ == "__main__":
    main()
