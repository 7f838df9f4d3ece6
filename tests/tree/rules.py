"""The rules of the tree, each a small function from a file's text to a list of complaints (line, what is wrong)."""

import ast
import base64
import copy
import fnmatch
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from minillm.course.notebooks import KEPT_METADATA, KERNEL, normalise

Complaints = list[tuple[int, str]]

# A module may import from its own package and from the layers before it; what shares a layer stays apart.
LAYERS = [{"progress", "files"}, {"config", "text", "kernels"}, {"data", "nn"}, {"model"}, {"train"}, {"parallel"},
          {"infer", "peft", "plan"}, {"engine"}, {"trainer"}, {"align"}, {"course"}, {"cli"}, {"__main__", "__init__"}]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FORBIDDEN = {("parallel", "model"): "the caller hands it the sharding table"}
SPEAKING = ("cli.py", "course/first_run.py")  # the files that may print
FILE_LINES, FUNCTION_LINES, ALL_LINES = 400, 60, 12_000
OUTPUT_BYTES, NOTEBOOK_BYTES, WORDS = 400_000, 3_000_000, 600
AT_REST = "(a widget: run this cell to use it)"  # what `make notebooks` stores in a widget's place
TAGS = {"nbval-ignore-output", "raises-exception"}
UNPICKLING = {"pickle", "_pickle", "cPickle", "dill", "shelve", "marshal", "joblib"}
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]*\bsrc=[\"']([^\"']+)")
# Of how the project is made, nothing is said: it speaks of itself alone.
MAKING = re.compile(r"\b(?:sub-?)?(?:sessions?|agents?)\b|\b(?:issue|ticket|bug|pr|pull request)s?\s+#?\d+|(?<![\w&(#])#\d{1,5}\b",
                    re.IGNORECASE)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Every imported module of minillm, those inside functions and those by name too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, "minillm.(relative): write the full path, so that the line says where to read"))
        elif isinstance(node, ast.ImportFrom):
            names = [f"minillm.{alias.name}" for alias in node.names] if node.module == "minillm" else [node.module]
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")) and node.args:
            found.append((node.lineno, str(getattr(node.args[0], "value", ""))))
    return [(line, name) for line, name in found if name.split(".")[0] == "minillm"]


def wrong_layers(package: str, text: str) -> Complaints:
    """Imports from a later layer, or from another package of the same layer. `package` is the first part below minillm."""
    if package == "__init__":
        return []
    if package not in LEVEL:
        return [(1, f"{package} has no layer: give it one in LAYERS, where the design puts it")]
    complaints = []
    for line, name in imports(ast.parse(text)):
        other = name.partition(".")[2].split(".")[0]
        if other == package:
            continue
        if other not in LEVEL:
            complaints.append((line, f"{name} is in no layer: name the module that has it"))
        elif LEVEL[other] >= LEVEL[package]:
            complaints.append((line, f"{package} may not import {name}: it is in no earlier layer"))
        elif (package, other) in FORBIDDEN:
            complaints.append((line, f"{package} may not import {name}: {FORBIDDEN[package, other]}"))
    return complaints


def too_long(text: str) -> Complaints:
    """Files over 400 lines, functions over 60."""
    lines = text.count("\n")
    complaints = [(1, f"{lines} lines, at most {FILE_LINES}")] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                complaints.append((node.lineno, f"{node.name} has {length} lines, at most {FUNCTION_LINES}"))
    return complaints


def too_much(sources: Mapping[str, str]) -> Complaints:
    """A package, given as path below minillm -> text, of more than 12,000 lines without course/."""
    lines = sum(text.count("\n") for path, text in sources.items() if not path.startswith("course/"))
    return [(1, f"{lines:,} lines without course/, at most {ALL_LINES:,}")] if lines > ALL_LINES else []


def undocumented(text: str) -> Complaints:
    """A file, a public class or a public function without a docstring; `forward` is documented by its class."""
    tree = ast.parse(text)
    complaints = [] if ast.get_docstring(tree) else [(1, "no opening words")]
    for owner in [tree, *[n for n in tree.body if isinstance(n, ast.ClassDef)]]:
        for node in owner.body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                if node.name != "forward" and not ast.get_docstring(node):
                    complaints.append((node.lineno, f"{node.name} has no docstring"))
    return complaints


def prints(text: str) -> Complaints:
    """Calls of print: progress and metrics go through one place."""
    return [(node.lineno, "print()") for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]


def unpickles(text: str) -> Complaints:
    """pickle and its relatives, torch.load, and numpy's allow_pickle: they run code from a file."""
    complaints = []
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLING]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = full if node.module.split(".")[0] in UNPICKLING else [name for name in full if name == "torch.load"]
        elif isinstance(node, ast.Call):
            names = ["torch.load"] if ast.unparse(node.func) == "torch.load" else []
            names += ["allow_pickle" for k in node.keywords if k.arg == "allow_pickle" and getattr(k.value, "value", 1)]
        complaints += [(node.lineno, f"{name} runs what it reads: use safetensors or JSON") for name in names]
    return complaints


def late_annotations(text: str) -> Complaints:
    """jaxtyping's shapes are read at import, so annotations must not be turned into strings."""
    late, shapes = [], False
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            shapes |= "jaxtyping" in [getattr(node, "module", None), *(alias.name for alias in node.names)]
            if getattr(node, "module", None) == "__future__" and "annotations" in [alias.name for alias in node.names]:
                late.append((node.lineno, "annotations become strings, which jaxtyping cannot read"))
    return late if shapes else []


def unfinished_or_local(text: str) -> Complaints:
    """Marks of unfinished work, paths of a machine, hosts of package registries. Stored pictures are passed over."""
    marks = "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"])
    paths = r"(?<![\w.~$)}/-])/(?:(?:wo[r]k|ro[o]t|fa[r]m)\b|(?:ho[m]e|Us[e]rs)/\w)"
    hosts = r"py[p]i\.org|python[h]osted\.org|registry\.np[m]js|https?://[^\s/]+/(?:\S+/)?sim[p]le\b"
    return [(line, f"{match.group()!r}") for line, line_text in enumerate(text.splitlines(), 1)
            if not line_text.lstrip().startswith('"image/')
            and (match := re.search(rf"\b(?:{marks})\b|{paths}|{hosts}", line_text))]


def about_its_making(words: Iterable[tuple[int, str]]) -> Complaints:
    """Words on how the project is made, and numbers of its discussions, in lines of prose."""
    return [(line, f"{match.group()!r} is not about the course") for line, said in words for match in MAKING.finditer(said)]


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers."""
    return iter(enumerate(text.splitlines(), 1))


def comments(text: str) -> Iterator[tuple[int, str]]:
    """The comments and docstrings of Python, line by line."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from enumerate(node.value.value.splitlines(), node.lineno)


def cell_words(notebook: dict) -> Iterator[tuple[str, int, str]]:
    """What a notebook says, in prose and in comments: cell id, line of the cell, words."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        lines = prose(source) if cell["cell_type"] == "markdown" else comments(plain_python(source))
        yield from ((cell["id"], line, said) for line, said in lines)


def function_bodies(text: str) -> dict[str, tuple[int, str]]:
    """Each function whose body has at least five lines, docstring and layout aside: body -> its line and name."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            written = "\n".join(ast.unparse(statement) for statement in body)
            if written.count("\n") >= 4:
                found[written] = node.lineno, node.name
    return found


def repeated(sources: Mapping[str, str]) -> list[str]:
    """Function bodies of at least five lines that stand in two files, given as path -> text."""
    seen: dict[str, str] = {}
    found = []
    for path, text in sources.items():
        for body, (line, name) in function_bodies(text).items():
            if body in seen:
                found.append(f"{path}:{line}: {name} has the body of {seen[body]}: import that one")
            seen.setdefault(body, f"{path}:{line}: {name}")
    return found


def plain_python(source: str) -> str:
    """A cell as Python: IPython's own lines become calls. What stands below %%time or %%capture is Python too."""
    return TransformerManager().transform_cell(re.sub(r"\A\s*%%(time|capture).*", "", source))


def redefined(source: str, public: set[str]) -> Complaints:
    """Functions and classes of a notebook cell that take a name of the package. Methods are their class's own affair."""
    complaints = []
    waiting: list[ast.AST] = [ast.parse(plain_python(source))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ClassDef | Function) and node.name in public:
            complaints.append((node.lineno, f"{node.name} is a name of the package"))
        if not isinstance(node, ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    return complaints


def notebook_faults(notebook: dict) -> list[str]:
    """What must not be in a stored notebook: cells not run, errors, volatile metadata, huge outputs, too few words."""
    faults = []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(code) + 1)):
        faults.append(f"execution counts are {counts}, not 1 to {len(code)}: run make notebooks")
    if [cell["id"] for cell in notebook["cells"]] != [f"cell-{i:03d}" for i in range(len(notebook["cells"]))]:
        faults.append("cell ids are not those that make notebooks gives")
    if notebook["metadata"] != {"kernelspec": KERNEL, "language_info": {"name": "python"}}:
        faults.append(f"metadata that differs between machines: {notebook['metadata']}")
    for cell in notebook["cells"]:
        tags = set(cell["metadata"].get("tags", []))
        if tags - TAGS or set(cell["metadata"]) - KEPT_METADATA:
            faults.append(f"{cell['id']}: metadata {cell['metadata']}")
        for output in cell.get("outputs", []):
            if output["output_type"] == "error" and "raises-exception" not in tags:
                faults.append(f"{cell['id']} ends in {output['ename']}")
            if output.get("name") == "stderr":
                faults.append(f"{cell['id']} writes to standard error: {''.join(output['text'])[:100]!r}")
            if (size := len(json.dumps(output).encode())) > OUTPUT_BYTES:
                faults.append(f"{cell['id']} has an output of {size:,} bytes, at most {OUTPUT_BYTES:,}")
    words = sum(len("".join(cell["source"]).split()) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    if words < WORDS:
        faults.append(f"only {words} words of prose, at least {WORDS}")
    return faults


def too_heavy(size: int) -> list[str]:
    """A notebook file of more than 3 MB."""
    return [f"{size:,} bytes, at most {NOTEBOOK_BYTES:,}"] if size > NOTEBOOK_BYTES else []


def invalid(notebook: dict) -> list[str]:
    """What nbformat's schema says against a notebook; before version 4.5 cells had no ids."""
    version = notebook.get("nbformat"), notebook.get("nbformat_minor")
    if version != (4, 5):
        return [f"format {version}, not (4, 5): run make notebooks"]
    try:
        nbformat.validate(nbformat.from_dict(notebook), relax_add_props=False)
    except nbformat.ValidationError as error:
        return [str(error).splitlines()[0]]
    return []


def widgets_alone(notebook: dict) -> list[str]:
    """Widgets without something still just before them: a picture, a page or text that was drawn, not a source."""
    faults, still = [], False
    for cell in notebook["cells"]:
        if not cell.get("outputs"):
            continue
        before, still = still, False
        for output in cell["outputs"]:
            shown = json.dumps(output.get("data", output.get("text", "")))
            if AT_REST not in shown:
                still = still or "minillm-source" not in shown
            elif not before and not still:
                faults.append(f"{cell['id']} has a widget and nothing still before it: draw it once, then let it move")
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


def ignored(path: str, patterns: Iterable[str]) -> bool:
    """Whether git would pass a file over, for the simple lines of our .gitignore: name/, /place/, *.ending."""
    parts = path.split("/")
    return any(parts[0] == pattern.strip("/") if pattern.startswith("/")
               else any(fnmatch.fnmatch(part, pattern.rstrip("/")) for part in parts) for pattern in [".git/", *patterns])


def local_links(text: str) -> Complaints:
    """Links and pictures of a Markdown text that name a file beside it, with their lines."""
    return [(line, target) for line, line_text in enumerate(text.splitlines(), 1)
            for target in (a or b for a, b in LINK.findall(line_text))
            if not re.match(r"[a-z]+:|#", target)]
