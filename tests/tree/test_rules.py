"""Every rule of the tree must be able to fail."""

import base64
import copy

import nbformat
import rules

from minillm.course.notebooks import WIDGET


def test_layers():
    assert rules.wrong_layers("nn", "from minillm.config import ModelConfig\nfrom minillm.nn.masks import causal") == []
    assert rules.wrong_layers("nn", "def f():\n    from minillm.engine import Engine")[0][0] == 2
    assert rules.wrong_layers("data", "import minillm.nn.block") and rules.wrong_layers("model", "from minillm import engine")
    assert rules.wrong_layers("cli", "import minillm.unheard_of") and rules.wrong_layers("nn", "from .masks import causal")
    assert rules.wrong_layers("nn", "from minillm import Transformer")  # the package itself stands above all layers


def test_lengths():
    assert rules.too_long('"""Doc."""\n' * 400) == []
    assert rules.too_long('"""Doc."""\n' * 401)
    assert rules.too_long("def f():\n" + "    x = 1\n" * 60)[0][1].startswith("f has 61")


def test_docstrings():
    good = '"""Doc."""\nclass A:\n    """Doc."""\n    def forward(self): ...\n    def _own(self): ...\n'
    assert rules.undocumented(good) == []
    assert [line for line, _ in rules.undocumented("class A:\n    def b(self): ...\n")] == [1, 1, 2]


def test_words_that_must_not_be_there():
    assert rules.prints("logger.print(1)") == [] and rules.prints("print(1)")
    assert rules.unpickles("torch.save(x)") == [] and rules.unpickles("import pickle") and rules.unpickles("x = torch.load(f)")
    assert rules.unpickles("np.load(f, allow_pickle=True)") and rules.unpickles("    from dill import loads")
    assert rules.unfinished_or_local("a fine line, ~/.cache, /tmp/x") == []
    assert rules.unfinished_or_local("# TO" + "DO: more") and rules.unfinished_or_local("open('/ro" + "ot/x')")
    assert rules.unfinished_or_local("/ho" + "me/someone/x") and rules.unfinished_or_local("https://py" + "pi.org/simple")
    assert rules.unfinished_or_local('"image/png": "a+' + 'XX' + 'X/b"') == [] and rules.unfinished_or_local("a+" + "XX" + "X/b")
    late = "from __future__ import " + "annotations\n"
    assert rules.late_annotations(late) == [] and rules.late_annotations(late + "import jaxtyping")


def test_repetition():
    one = "def f(a):\n    b = 1\n    c = 2\n    d = 3\n    e = 4\n    return a\n"
    assert rules.function_bodies(one).keys() == rules.function_bodies(one.replace("def f", "def g")).keys()
    assert rules.function_bodies("def f(a):\n    return a\n") == {}
    assert rules.redefined("def attend(): ...", {"attend"}) and not rules.redefined("def mine(): ...", {"attend"})
    assert rules.redefined("%matplotlib inline\nif True:\n    class attend: ...", {"attend"})


def test_notebooks():
    good = {"metadata": {"kernelspec": {}, "language_info": {"name": "python"}}, "cells": [
        {"cell_type": "markdown", "id": "cell-000", "metadata": {}, "source": ["word " * 600]},
        {"cell_type": "code", "id": "cell-001", "metadata": {}, "execution_count": 1, "outputs": [], "source": []}]}
    assert rules.notebook_faults(good) == []
    for place, key, value in ((1, "execution_count", None), (1, "id", "x"), (0, "source", ["few"]), (1, "metadata", {"a": 1}),
                              (1, "outputs", [{"output_type": "error", "ename": "E"}]),
                              (1, "outputs", [{"output_type": "stream", "name": "stderr", "text": "a warning"}]),
                              (1, "outputs", [{"output_type": "stream", "text": "x" * 500_000}])):
        bad = copy.deepcopy(good)
        bad["cells"][place][key] = value
        assert rules.notebook_faults(bad), (key, value)
    assert rules.notebook_faults(good | {"metadata": {"kernelspec": {}, "language_info": {"name": "python", "version": "3"}}})


def test_an_error_that_is_meant_to_be_seen():
    cell = {"cell_type": "code", "id": "cell-000", "metadata": {"tags": ["raises-exception"]}, "execution_count": 1,
            "outputs": [{"output_type": "error", "ename": "ValueError"}], "source": []}
    notebook = {"metadata": {"language_info": {"name": "python"}}, "cells": [cell]}
    assert not any("ValueError" in fault for fault in rules.notebook_faults(notebook))


def test_pictures():
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n....IEND\xaeB`\x82").decode()

    def showing(**data):
        return {"cells": [{"id": "cell-000", "outputs": [{"data": {k.replace("_", "/"): v for k, v in data.items()}}]}]}

    assert rules.missing_pictures(showing(text_plain="<Figure size 1x1>", image_png=png)) == []
    assert rules.missing_pictures(showing(text_plain="<Figure size 1x1>"))
    assert rules.missing_pictures(showing(image_png=png[:12]))


def test_links():
    text = "[a](b.md) [c](https://d.example) [e](#f)\n![g](h.png) <img alt='i' src='j.png'>"
    assert rules.local_links(text) == [(1, "b.md"), (2, "h.png"), (2, "j.png")]


def test_stale_parts():
    cells = [nbformat.v4.new_markdown_cell("Words.", id="cell-000"),
             nbformat.v4.new_code_cell("1", id="cell-001", execution_count=1)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert rules.stale_parts(notebook) == []
    notebook.cells[1].metadata["execution"] = {"iopub.status.busy": "now"}
    notebook.cells[1].outputs = [nbformat.v4.new_output("execute_result", {WIDGET: {"model_id": "0"}}, execution_count=1)]
    notebook.cells[0]["id"] = "b1946ac9"
    assert [fault.split(" is ")[0] for fault in rules.stale_parts(notebook)] == [
        "b1946ac9: id", "cell-001: metadata", "cell-001: outputs"]
