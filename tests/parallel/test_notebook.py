"""From a notebook: functions of cells, their errors, and cells that run on live ranks."""

import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
CELLS = ['''
import os, torch, torch.distributed as dist
from minillm import launch
from minillm.parallel.live import Ranks
torch.ones(400, 400) @ torch.ones(400, 400)  # the kernel has used its threads: a fork of it might hang
factor = 10
''', '''
def helper(x):
    return x * factor

def work(me, extra):
    total = torch.tensor([float(me.rank)])
    dist.all_reduce(total)
    print("I am", me.rank)
    return helper(total.item()) + extra

launch(work, 4, 0.5)
''', '''
def slip(me):
    numbers = [1, 2]
    return numbers[me.rank]

launch(slip, 3)
''', '''
%load_ext minillm.course.ranks_magic
ranks = Ranks(2)
ranks.pids == ranks.run(lambda me: os.getpid())
''', '''
%%ranks
x = 100 * me.rank
x + 1
''', '''
%%ranks
x += 1
print("x is", x)
''', '''
%%ranks elsewhere
1
''', '''
ranks.close()
os.environ["MASTER_ADDR"] = "somewhere.invalid"
launch(work, 2, 0.0)
''']


def texts(cell, name="stdout"):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == name)


def values(cell):
    return [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]


def errors(cell):
    return ["".join(re.sub(r"\x1b\[[\d;]*m", "", line) for line in [output.evalue, *output.traceback])
            for output in cell.outputs if output.output_type == "error"]


def test_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
    NotebookClient(notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    first, results, slip, live, shown, printed, missing, last = notebook.cells
    assert errors(first) == [] and values(results) == ["[60.5, 60.5, 60.5, 60.5]"]
    assert texts(results) == "".join(f"rank {rank} | I am {rank}\n" for rank in range(4)) and texts(results, "stderr") == ""
    (error,) = errors(slip)
    assert "rank 2 of 3 raised IndexError in slip (line 3 of a cell); ranks 0 and 1 had returned" in error
    assert "return numbers[me.rank]" in error  # the cell's line, which only the kernel can know
    assert values(live) == ["True"]
    assert texts(shown) == "rank 0 | 1\nrank 1 | 101\n" and texts(printed) == "rank 0 | x is 1\nrank 1 | x is 101\n"
    assert "'elsewhere' is no session of ranks here: make one first, elsewhere = Ranks(4)." in errors(missing)[0]
    assert values(last) == ["[10.0, 10.0]"]
