"""What every notebook must keep to, as pure functions: `rule(path, notebook) -> complaints`, each "path: cell N: what".

Tested on a good and on bad examples (test_notebook_rules.py) before they are held against the tree (test_tree.py).
They guard what strict nbval cannot see: it passes a notebook that was never executed, because then there is nothing
to compare. Rules on Python files: source_rules.py.
"""

import ast
import base64
import json
import re
from collections.abc import Iterator, Mapping

import nbformat
from nbformat import NotebookNode

from minillm.course.notebooks import normalise

WORDS, OUTPUT_SIZE = 600, 400_000
TAGS = {"nbval-ignore-output", "nbval-raises-exception", "raises-exception"}
LINKED_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]*\bsrc=[\"']([^\"']+)")


def valid(path: str, notebook: NotebookNode) -> list[str]:
    """It is a notebook by nbformat's schema, version 4.5, which has cell ids."""
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        return [f"{path}: format {notebook.nbformat}.{notebook.nbformat_minor} instead of 4.5: run make notebooks"]
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return [f"{path}: not valid: {str(error).splitlines()[0]}"]
    return []


def executed(path: str, notebook: NotebookNode) -> list[str]:
    """All code cells ran, from the first to the last, in one go."""
    found = []
    for expected, (place, cell) in enumerate(_code(notebook), 1):
        if not cell.source.strip():
            found.append(f"{path}: cell {place}: empty code cell: remove it")
        elif cell.execution_count != expected:
            found.append(f"{path}: cell {place}: execution count {cell.execution_count}, expected {expected}: "
                         "run make notebooks")
    return found


def no_errors(path: str, notebook: NotebookNode) -> list[str]:
    """No error is stored, unless the cell is tagged as one that shows an error; no warning on standard error."""
    found = []
    for place, cell in _code(notebook):
        allowed = {"raises-exception", "nbval-raises-exception"} & set(cell.metadata.get("tags", []))
        for output in cell.outputs:
            if output.output_type == "error" and not allowed:
                found.append(f"{path}: cell {place}: stored an error: {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"{path}: cell {place}: wrote to standard error: {output.text.strip()[:100]!r}")
    return found


def stored_as_normalised(path: str, notebook: NotebookNode) -> list[str]:
    """Ids, metadata and kernel are those that `make notebooks` stores, so that a diff shows only what matters."""
    wanted = normalise(nbformat.from_dict(json.loads(json.dumps(notebook))))
    found = []
    for key in sorted(set(notebook.metadata) | set(wanted.metadata)):
        if notebook.metadata.get(key) != wanted.metadata.get(key):
            found.append(f"{path}: metadata.{key} is {notebook.metadata.get(key)!r}, which differs between machines: "
                         "run make notebooks")
    for place, (cell, target) in enumerate(zip(notebook.cells, wanted.cells, strict=True)):
        for key in ("id", "metadata", "outputs"):
            if cell.get(key) != target.get(key):
                found.append(f"{path}: cell {place}: its {key} is not as make notebooks stores it: run it")
    return found


def enough_prose(path: str, notebook: NotebookNode) -> list[str]:
    """At least WORDS words outside of code."""
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    return [f"{path}: {words} words of prose, at least {WORDS}"] if words < WORDS else []


def small_outputs(path: str, notebook: NotebookNode) -> list[str]:
    """No single output above OUTPUT_SIZE bytes: a notebook is opened in a browser and kept in git."""
    return [f"{path}: cell {place}: an output of {size:,} bytes, at most {OUTPUT_SIZE:,}" for place, cell in _code(notebook)
            for size in (len(json.dumps(output)) for output in cell.outputs) if size > OUTPUT_SIZE]


def pictures_exist(path: str, notebook: NotebookNode, files: Mapping[str, object] | set[str] = frozenset()) -> list[str]:
    """Every figure is stored as a whole PNG, and every picture that the prose names is in `files` or attached.

    files: paths that exist, as the notebook's links spell them.
    """
    found = []
    for place, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.get("text/plain", "").startswith("<Figure") and "image/png" not in data:
                found.append(f"{path}: cell {place}: a figure without its picture: run make notebooks")
            if "image/png" in data and not _is_png(data["image/png"]):
                found.append(f"{path}: cell {place}: its image/png is not a whole PNG")
        if cell.cell_type == "markdown":
            for target in (a or b for a, b in LINKED_IMAGE.findall(cell.source)):
                there = target in files or target.removeprefix("attachment:") in cell.get("attachments", {})
                if not there and not target.startswith("data:"):
                    found.append(f"{path}: cell {place}: picture {target} does not exist beside the notebook")
    return found


def known_tags(path: str, notebook: NotebookNode) -> list[str]:
    """Only tags that change how a cell is checked, and none that skips it."""
    found = []
    for place, cell in enumerate(notebook.cells):
        found += [f"{path}: cell {place}: tag {tag!r}; known are {', '.join(sorted(TAGS))}"
                  for tag in cell.metadata.get("tags", []) if tag not in TAGS]
        if cell.cell_type == "code" and re.search(r"#\s*NBVAL_", cell.source):
            found.append(f"{path}: cell {place}: an NBVAL comment: use a tag, which the reader does not see")
    return found


def no_copied_names(path: str, notebook: NotebookNode, public: Mapping[str, str]) -> list[str]:
    """No cell defines a function or class that the package has: the lesson shows the real one.

    public: names of the package and where they are.
    """
    return [f"{path}: cell {place}: defines {node.name}, which is in {public[node.name]}: import it, or use another name"
            for place, cell in _code(notebook) for node in _defined(cell.source) if node.name in public]


def text_of(notebook: NotebookNode) -> Iterator[tuple[int, str]]:
    """Place and text of each source and each output that is text, for rules on text."""
    for place, cell in enumerate(notebook.cells):
        yield place, cell.source
        for output in cell.get("outputs", []):
            yield place, output.get("text", "")
            yield from ((place, text) for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def _code(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """The code cells with their places."""
    return [(place, cell) for place, cell in enumerate(notebook.cells) if cell.cell_type == "code"]


def _defined(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes that a cell defines, at any depth but inside classes. Lines of IPython are passed over."""
    python = "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.splitlines())
    waiting: list[ast.AST] = [ast.parse("" if source.startswith("%%") else python)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        if not isinstance(node, ast.ClassDef):
            waiting.extend(ast.iter_child_nodes(node))


def _is_png(text: str) -> bool:
    """Whether base64 text is a PNG from its first bytes to its last chunk."""
    data = base64.b64decode(text)
    return data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
