import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from minillm.course.notebooks import KERNEL, WIDGET, execute, normalise

new_code, new_text, new_output = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell, nbformat.v4.new_output


def store(path, *sources):
    notebook = nbformat.v4.new_notebook(cells=[new_text("Words."), *map(new_code, sources)])
    nbformat.write(notebook, path)
    return path


def test_a_notebook_runs_in_its_folder_and_is_stored_the_same_every_time(tmp_path):
    path = store(tmp_path / "a.ipynb", "import os\nfrom pathlib import Path\nPath.cwd().name", "os.environ['OMP_NUM_THREADS']",
                 "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])")
    execute(path)
    first = path.read_bytes()
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.get("execution_count") for cell in cells] == [None, 1, 2, 3]
    assert cells[1].outputs[0].data["text/plain"] == repr(tmp_path.name)
    assert cells[2].outputs[0].data["text/plain"] == "'1'"
    assert "image/png" in cells[3].outputs[0].data  # though the suite itself may run without a display
    execute(path)
    assert path.read_bytes() == first


def test_a_failing_cell_leaves_the_file_alone_and_is_named(tmp_path):
    path = store(tmp_path / "a.ipynb", "1", "2 / 0")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="2 / 0(.|\n)*ZeroDivisionError"):
        execute(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ipynb"]


def test_normalising_keeps_what_matters_only():
    cell = new_code("x", metadata={"tags": ["nbval-ignore-output"], "execution": {"shell.execute_reply": "now"}})
    notebook = nbformat.v4.new_notebook(cells=[new_text("t"), cell], metadata={
        "language_info": {"name": "python", "version": "3.11.4"}, "widgets": {"state": {}}})
    normalise(notebook)
    assert notebook.metadata == {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    assert [cell.id for cell in notebook.cells] == ["cell-000", "cell-001"]
    assert notebook.cells[1].metadata == {"tags": ["nbval-ignore-output"]}
    again = nbformat.writes(normalise(nbformat.reads(nbformat.writes(notebook), 4)))
    assert again == nbformat.writes(notebook)


def test_a_widget_leaves_a_line_of_text_and_a_progress_bar_nothing():
    view = {WIDGET: {"model_id": "c5f6d0639af44391a8f656eb961d8905"}}
    cell = new_code("x", outputs=[
        new_output("display_data", view | {"text/plain": "steps:   0%|          | 0/20 [00:00<?, ?it/s]"}),
        new_output("stream", name="stdout", text="kept"),
        new_output("execute_result", view | {"text/plain": "VBox(children=(Text(value='a'),))"}, execution_count=1)])
    left = normalise(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs
    assert [output.output_type for output in left] == ["stream", "execute_result"]
    assert left[1].data == {"text/plain": "(a widget: run this cell to use it)"}
