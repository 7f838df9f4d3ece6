"""The rules of the tree, each a small function from a file's text to a list of complaints (line, what is wrong)."""

import ast
import base64
import copy
import re

import nbformat

from minillm.course.notebooks import normalise

Complaints = list[tuple[int, str]]

# A module may import from its own package and from the layers before it.
LAYERS = [{"progress", "files", "config"}, {"text", "kernels"}, {"data", "nn"}, {"model"}, {"train"}, {"parallel"},
          {"infer", "peft", "plan"}, {"layout"}, {"engine"}, {"zero_engine"}, {"fsdp_engine"}, {"torch_engine"}, {"trainer"}, {"align"}, {"course"}, {"cli"}, {"__main__", "__init__"}]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SPEAKING = ("cli.py", "course/align.py", "course/chat.py", "course/commands.py", "course/finetune.py", "course/first_run.py")  # the files that may print
FILE_LINES, FUNCTION_LINES = 400, 60
ALL_LINES = 16_100  # of the package without course/: alignment, adapters, serving and the lessons that lack theirs still come
TAGS = {"nbval-ignore-output", "raises-exception"}
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]*\bsrc=[\"']([^\"']+)")


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Every imported module of minillm, those inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, "minillm.(relative): write the full path, so that the line says where to read"))
        elif isinstance(node, ast.ImportFrom):
            names = [f"minillm.{alias.name}" for alias in node.names] if node.module == "minillm" else [node.module]
            found += [(node.lineno, name) for name in names]
    return [(line, name) for line, name in found if name.startswith("minillm.")]


def wrong_layers(package: str, text: str) -> Complaints:
    """Imports from a later layer, or from another package of the same layer. `package` is the first part below minillm."""
    complaints = []
    for line, name in imports(ast.parse(text)):
        other = name.split(".")[1]
        if package == "__init__" or other == package:
            continue
        if other not in LEVEL:
            complaints.append((line, f"{name} is in no layer"))
        elif LEVEL[other] > LEVEL[package] or (LEVEL[other] == LEVEL[package] and LEVEL[package] != 0):
            complaints.append((line, f"{package} may not import {name}"))
    return complaints


def too_long(text: str) -> Complaints:
    """Files over 400 lines, functions over 60."""
    lines = text.count("\n")
    complaints = [(1, f"{lines} lines, at most {FILE_LINES}")] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                complaints.append((node.lineno, f"{node.name} has {length} lines, at most {FUNCTION_LINES}"))
    return complaints


def undocumented(text: str) -> Complaints:
    """A file, a public class or a public function without a docstring; `forward` is documented by its class."""
    tree = ast.parse(text)
    complaints = [] if ast.get_docstring(tree) else [(1, "no opening words")]
    for owner in [tree, *[n for n in tree.body if isinstance(n, ast.ClassDef)]]:
        for node in owner.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                if node.name != "forward" and not ast.get_docstring(node):
                    complaints.append((node.lineno, f"{node.name} has no docstring"))
    return complaints


def prints(text: str) -> Complaints:
    """Calls of print: progress and metrics go through one place."""
    return [(node.lineno, "print()") for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]


def unpickles(text: str) -> Complaints:
    """pickle and its relatives, torch.load, and numpy's allow_pickle: they run code from a file."""
    found = [(line, line_text) for line, line_text in enumerate(text.splitlines(), 1)
             if re.search(r"^\s*(import|from) (pickle|dill|shelve|marshal)\b|\btorch\.load\(|allow_pickle=True", line_text)]
    return [(line, f"unpickling: {line_text.strip()}") for line, line_text in found]


def late_annotations(text: str) -> Complaints:
    """jaxtyping's shapes are read at import, so annotations must not be turned into strings."""
    late = "from __future__ import " + "annotations"
    return [(1, "annotations become strings, which jaxtyping cannot read")] if late in text and "jaxtyping" in text else []


def unfinished_or_local(text: str) -> Complaints:
    """Marks of unfinished work, paths of a machine, hosts of package registries; not in a picture, whose letters mean nothing."""
    marks = "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"])
    pattern = rf"\b({marks})\b|(?<![\w.])/(wo[r]k|ro[o]t|ho[m]e|Us[e]rs|fa[r]m)/\w|py[p]i\.org|files\.python[h]osted|registry\.np[m]js"
    return [(line, f"{match.group()!r}") for line, line_text in enumerate(text.splitlines(), 1)
            if '"image/png": "' not in line_text and (match := re.search(pattern, line_text))]


def function_bodies(text: str) -> dict[str, str]:
    """Each function of at least five statements' lines by its body, names of variables included."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            written = "\n".join(ast.unparse(statement) for statement in body)
            if written.count("\n") >= 4:
                found[written] = node.name
    return found


def redefined(source: str, public: set[str]) -> Complaints:
    """Functions and classes of a notebook cell that take a name of the package."""
    python = "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.splitlines())
    return [(node.lineno, f"{node.name} is a name of the package") for node in ast.walk(ast.parse(python))
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public]


def notebook_faults(notebook: dict, least_words: int = 600) -> list[str]:
    """What must not be in a stored notebook: cells not run, errors, volatile metadata, huge outputs, too few words."""
    faults = []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(code) + 1)):
        faults.append(f"execution counts are {counts}, not 1 to {len(code)}: run make notebooks")
    if [cell["id"] for cell in notebook["cells"]] != [f"cell-{i:03d}" for i in range(len(notebook["cells"]))]:
        faults.append("cell ids are not those that make notebooks gives")
    if set(notebook["metadata"]) - {"kernelspec", "language_info"} or notebook["metadata"]["language_info"] != {"name": "python"}:
        faults.append(f"metadata that differs between machines: {notebook['metadata']}")
    for cell in notebook["cells"]:
        tags = set(cell["metadata"].get("tags", []))
        if tags - TAGS or set(cell["metadata"]) - {"tags", "nbgrader"}:
            faults.append(f"{cell['id']}: metadata {cell['metadata']}")
        for output in cell.get("outputs", []):
            if output["output_type"] == "error" and "raises-exception" not in tags:
                faults.append(f"{cell['id']} ends in {output['ename']}")
            if output.get("name") == "stderr":
                faults.append(f"{cell['id']} writes to standard error: {''.join(output['text'])[:100]!r}")
            if len(str(output)) > 400_000:
                faults.append(f"{cell['id']} has an output of {len(str(output)):,} characters")
    words = sum(len("".join(cell["source"]).split()) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    if words < least_words:
        faults.append(f"only {words} words of prose")
    return faults


def stale_parts(notebook: nbformat.NotebookNode) -> list[str]:
    """Cells that are not as `make notebooks` stores them, such as a widget whose kernel is gone."""
    wanted = normalise(copy.deepcopy(notebook))
    return [f"{cell['id']}: {key} is not as make notebooks stores it" for cell, target in zip(notebook.cells, wanted.cells)
            for key in ("id", "metadata", "outputs") if cell.get(key) != target.get(key)]


def missing_pictures(notebook: dict) -> list[str]:
    """Figures stored without their picture or with half of one."""
    faults = []
    for cell in notebook["cells"]:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "<Figure" in str(data.get("text/plain")) and "image/png" not in data:
                faults.append(f"{cell['id']} has a figure without its picture: is MPLBACKEND set?")
            if "image/png" in data and not whole_png(base64.b64decode("".join(data["image/png"]))):
                faults.append(f"{cell['id']} has half a picture")
    return faults


def whole_png(data: bytes) -> bool:
    """From the signature to the last chunk."""
    return data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")


def local_links(text: str) -> Complaints:
    """Links and pictures of a Markdown text that name a file beside it, with their lines."""
    return [(line, target) for line, line_text in enumerate(text.splitlines(), 1)
            for target in (a or b for a, b in LINK.findall(line_text))
            if not re.match(r"[a-z]+:|#", target)]
