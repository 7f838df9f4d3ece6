"""What every source file must keep to, as pure functions: `rule(path, text) -> complaints`, each "path:line: what, and what to do".

Paths are relative to the repository. Nothing here reads a file, so each rule is tested on a good and a bad example
(test_source_rules.py) before it is held against the tree (test_tree.py). Rules on notebooks: notebook_rules.py.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping

# Data flows to the right; a file imports from its own part and from those before it. What stands together in one
# tuple does not import one another. The trainer drives the engine, and the command line starts everything.
LAYERS = (("progress", "files"), ("config", "text", "kernels"), ("data", "nn"), ("model",), ("train",), ("parallel",),
          ("infer", "peft", "plan"), ("engine",), ("trainer",), ("align",), ("course",), ("cli",))
FORBIDDEN = {("parallel", "model"): "the caller hands the sharding table to parallel"}
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
ENTRANCES = ("minillm/__init__.py", "minillm/__main__.py")  # they stand above all layers, and nothing imports them
SPEAKERS = ("minillm/cli.py", "minillm/course/first_run.py")  # what a command says at its end

FILE_LINES, FUNCTION_LINES, PACKAGE_LINES = 400, 60, 12_000
SMALLEST_COPY = 250  # characters of a body's syntax tree; below it, two functions may well look alike by chance

UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
MACHINE = re.compile(r"(?<![\w.~$)}/-])/(?:home|root|Users|work|opt|mnt|tmp|private)/\w[\w.-]*|\b[A-Z]:\\+Users\b")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|registry\.npmjs|--(?:extra-)?index-url")


def imported_parts(text: str) -> Iterator[tuple[int, str]]:
    """Line and part ("nn", "engine", ...) of each import from minillm, those inside functions too.

    "minillm" stands for the package itself, "." for a relative import.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["minillm.."]
        elif isinstance(node, ast.ImportFrom) and node.module == "minillm":
            names = [f"minillm.{alias.name}" if alias.name in HEIGHT else "minillm" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        for root, _, rest in (name.partition(".") for name in names):
            if root == "minillm":
                yield node.lineno, "." if rest == "." else rest.partition(".")[0] or root


def layers(path: str, text: str) -> list[str]:
    """Imports only from one's own part and from lower layers."""
    if path in ENTRANCES:
        return []
    own = path.split("/")[1].removesuffix(".py")
    if own not in HEIGHT:
        return [f"{path}:1: {own} has no layer: give it one in LAYERS, as the design says who may import whom"]
    found = []
    for line, part in imported_parts(text):
        if part == ".":
            found.append(f"{path}:{line}: a relative import: write the full path, so that the line says where to read")
        elif part == "minillm":
            found.append(f"{path}:{line}: imports from minillm itself, which stands above all layers: name the module")
        elif part not in HEIGHT:
            found.append(f"{path}:{line}: imports minillm.{part}, which has no layer")
        elif (own, part) in FORBIDDEN:
            found.append(f"{path}:{line}: {own} imports {part}: {FORBIDDEN[own, part]}")
        elif part != own and HEIGHT[part] >= HEIGHT[own]:
            found.append(f"{path}:{line}: {own} imports {part}, which is not in a layer below it")
    return found


def file_length(path: str, text: str) -> list[str]:
    """At most FILE_LINES lines."""
    lines = len(text.splitlines())
    return [f"{path}:{lines}: {lines} lines, at most {FILE_LINES}: which second idea is in it?"] if lines > FILE_LINES else []


def function_length(path: str, text: str) -> list[str]:
    """At most FUNCTION_LINES lines from `def` to the end, docstring included."""
    lengths = [(node, node.end_lineno - node.lineno + 1) for node in _functions(text)]
    return [f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}: one function, one idea"
            for node, length in lengths if length > FUNCTION_LINES]


def package_length(sources: Mapping[str, str]) -> list[str]:
    """minillm without course/ stays within PACKAGE_LINES."""
    total = sum(len(text.splitlines()) for path, text in sources.items() if not path.startswith("minillm/course/"))
    return [f"minillm/: {total:,} lines without course/, at most {PACKAGE_LINES:,}"] if total > PACKAGE_LINES else []


def opening_docstring(path: str, text: str) -> list[str]:
    """Each file says first what it is."""
    said = ast.get_docstring(ast.parse(text))
    return [] if said and said.strip() else [f"{path}:1: no opening docstring: what does it do, and what does it leave out?"]


def public_docstrings(path: str, text: str) -> list[str]:
    """Public functions and classes have a docstring. Overridden dunder methods and `forward` need none."""
    return [f"{path}:{node.lineno}: {name} has no docstring" for node, name in public_definitions(ast.parse(text))
            if not ast.get_docstring(node) and node.name != "forward"]


def public_definitions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Each public class and function of a module, and the public methods of its public classes, with dotted names."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node, prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{prefix}{node.name}.")


def evaluated_annotations(path: str, text: str) -> list[str]:
    """jaxtyping reads annotations when a function is defined, so they must not become strings."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    if not any(node.module == "jaxtyping" for node in nodes):
        return []
    return [f"{path}:{node.lineno}: `from __future__ import annotations` turns off jaxtyping's shapes: leave it out"
            for node in nodes if node.module == "__future__" and any(a.name == "annotations" for a in node.names)]


def silence(path: str, text: str) -> list[str]:
    """Library code does not print."""
    if path in SPEAKERS:
        return []
    return [f"{path}:{node.lineno}: {ast.unparse(node.func)}() in library code: return it, or use minillm.progress"
            for node in _calls(text) if ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")]


def nothing_unpickled(path: str, text: str) -> list[str]:
    """No pickle in any disguise: torch.load only with weights_only=True, numpy only without allow_pickle."""
    found = []
    for node in ast.walk(ast.parse(text)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [f"{path}:{node.lineno}: imports {name}, which runs what it reads: use safetensors or JSON"
                      for name in modules if name in ("pickle", "cPickle", "dill", "shelve", "marshal", "joblib")]
    for node in _calls(text):
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if ast.unparse(node.func) == "torch.load" and options.get("weights_only") is not True:
            found.append(f"{path}:{node.lineno}: torch.load without weights_only=True unpickles anything")
        if options.get("allow_pickle"):
            found.append(f"{path}:{node.lineno}: allow_pickle=True unpickles anything")
    return found


def finished(path: str, text: str) -> list[str]:
    """No notes about work left to do."""
    return [f"{path}:{line}: {match[0]}: do it, or leave it out" for line, match in _matches(UNFINISHED, text)]


def portable(path: str, text: str) -> list[str]:
    """Nothing that is true on one machine only: no absolute paths of users, no addresses of package indexes."""
    return ([f"{path}:{line}: {match[0]} is a path of one machine" for line, match in _matches(MACHINE, text)]
            + [f"{path}:{line}: {match[0]} names a package index; pip knows its own" for line, match in _matches(REGISTRY, text)])


def copied_functions(sources: Mapping[str, str]) -> list[str]:
    """No function body stands in two files: the second should import the first."""
    seen: dict[str, str] = {}
    found = []
    for path, text in sources.items():
        for node in _functions(text):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            tree = "".join(ast.dump(statement) for statement in body)
            place = f"{path}:{node.lineno}"
            first = seen.setdefault(tree, place)
            if len(tree) >= SMALLEST_COPY and first.split(":")[0] != path:
                found.append(f"{place}: {node.name} has the same body as the function at {first}: import that one")
    return found


def public_names(sources: Mapping[str, str]) -> dict[str, str]:
    """Each public function and class at the top of a module, and where it is."""
    return {node.name: f"{path}:{node.lineno}" for path, text in sources.items()
            for node, name in public_definitions(ast.parse(text)) if "." not in name}


def _functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file, inner ones too."""
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _calls(text: str) -> Iterator[ast.Call]:
    """All calls of a file."""
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))


def _matches(pattern: re.Pattern, text: str) -> Iterable[tuple[int, re.Match]]:
    """Line numbers and matches."""
    return ((number, match) for number, line in enumerate(text.splitlines(), 1) for match in pattern.finditer(line))
