"""`make notebooks`: execute notebooks from a clean kernel and store them so that only what matters differs.

Cell ids follow from a cell's place, metadata that depends on the machine or the clock is dropped, and the file is
written only when every cell has run. Left out: comparing outputs with those stored before, which is nbval's work.
"""

import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from minillm.files import write_atomically
from minillm.progress import show_progress, track

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT_METADATA = {"tags", "jupyter", "nbgrader"}
WIDGET = "application/vnd.jupyter.widget-view+json"
# One thread, as in the tests; pictures in the page, whatever the terminal's setting; no remark by the debugger;
# what is solved here is nobody's progress
KERNEL_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                      "PYDEVD_DISABLE_FILE_VALIDATION": "1", "MINILLM_PROGRESS": ""}


def execute(path: Path, timeout: int = 120) -> None:
    """Run all cells of a notebook in its own folder and store the outputs in place.

    Units: timeout in seconds, for each cell.
    Raises: nbclient's CellExecutionError, with the cell and its traceback; the file is then left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", coalesce_streams=True,
                            resources={"metadata": {"path": str(Path(path).parent)}})
    client.execute(env={**os.environ, **KERNEL_ENVIRONMENT})
    write_atomically(path, nbformat.writes(normalise(notebook), version=4) + "\n")


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook with stable ids and without what differs from machine to machine, in place."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat_minor = 5
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place:03d}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT_METADATA})
        if cell.cell_type == "code":
            cell.outputs = [_at_rest(output) for output in cell.outputs if not _is_progress_bar(output)]
    return notebook


def _at_rest(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A widget lives in the kernel that made it; stored, it would be an error message. It leaves a line of text."""
    if WIDGET in output.get("data", {}):
        output.data = nbformat.from_dict({"text/plain": "(a widget: run this cell to use it)"})
    return output


def _is_progress_bar(output: nbformat.NotebookNode) -> bool:
    """Whether an output is the widget of a progress bar: its plain text is the bar, such as "steps: 0%|   | 0/20"."""
    data = output.get("data", {})
    return WIDGET in data and re.search(r"%\||\dit \[|\?it/s", data.get("text/plain", "")) is not None


def main() -> None:
    """Execute the notebooks named on the command line."""
    show_progress()
    for name in track(sys.argv[1:], "execute", unit="notebook"):
        execute(Path(name))


if __name__ == "__main__":
    main()
