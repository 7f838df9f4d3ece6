"""Where text comes from: every source gives documents through one door, `documents(source)`.

stories         short stories from a seeded grammar, with their true probability (stories.py)
python-docs     English prose that every Python carries: pydoc's topics and the standard library's docstrings
python-source   the standard library's source files
languages       one page of our own sentences in several languages
a path          a file, a folder (searched through) or a glob; .jsonl gives a document for each line's "text"
hf:NAME         a Hugging Face dataset, when the package `datasets` is installed and the network is there

Nothing here is downloaded but hf:. Python's texts differ between its releases; the stories never do.
"""

import ast
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from importlib.resources import files
from pathlib import Path

from minillm.data.stories import stories
from minillm.files import write_atomically
from minillm.progress import track

SUFFIXES = (".txt", ".md", ".rst", ".py", ".ipynb", ".html", ".csv", ".tex", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One text, where it is from, and -ln of its probability if its source knows that."""

    text: str
    name: str
    nats: float | None = None


def documents(source: str, *, limit: int | None = None, seed: int = 0) -> Iterator[Document]:
    """The documents of a source, at most `limit` bytes of text (the document that crosses the limit is the last).

    Raises: FileNotFoundError for a path that leads nowhere; ValueError for a file that is not UTF-8 text, is empty, or a
    folder without readable files; ImportError and ConnectionError for hf: without the package or the network.
    """
    named = {"stories": lambda: _stories(seed), "python-docs": python_docs, "python-source": python_source,
             "languages": _languages}
    found = named[source]() if source in named else _hugging_face(source[3:]) if source.startswith("hf:") else _paths(source)
    taken = 0
    for document in found:
        yield document
        taken += len(document.text.encode("utf-8", "replace"))
        if limit is not None and taken >= limit:
            return


def split(texts: Iterable[Document], val_fraction: float, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """(train, validation), document by document: a hash of the text decides, so equal texts are on one side and
    the order does not matter.
    """
    train, val = [], []
    salt = seed.to_bytes(8, "little", signed=True)
    for document in texts:
        digest = hashlib.blake2b(document.text.encode("utf-8", "replace"), digest_size=8, salt=salt)
        (val if int.from_bytes(digest.digest(), "little") < val_fraction * 2 ** 64 else train).append(document)
    return train, val


def languages() -> dict[str, list[str]]:
    """The same sentences in every language: line i of one says what line i of another says."""
    return json.loads(files("minillm.data").joinpath("languages.json").read_text(encoding="utf-8"))


def python_docs() -> Iterator[Document]:
    """pydoc's topics, then each standard module's docstrings as one document. Collected once, then read from a cache."""
    release = sys.version.split()[0]
    cached = cache_folder() / f"python-docs-{release}.jsonl"
    if not cached.exists():
        lines = [json.dumps({"name": d.name, "text": d.text}) for d in _collect_python_docs()]
        write_atomically(cached, "\n".join(lines) + "\n")
    for line in cached.read_text(encoding="utf-8").splitlines():
        yield Document(**json.loads(line))


def python_source() -> Iterator[Document]:
    """The standard library's .py files, without its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library).parts
        if not {"site-packages", "test", "tests", "idle_test", "lib2to3"} & set(inside):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few of Python's own test inputs are written in other encodings on purpose
            if text.strip():
                yield Document(text, "/".join(inside))


def cache_folder() -> Path:
    """Where collected text is kept: MINILLM_CACHE, or ~/.cache/minillm."""
    return Path(os.environ.get("MINILLM_CACHE", Path.home() / ".cache" / "minillm"))


def _stories(seed: int) -> Iterator[Document]:
    for number, story in enumerate(stories(sys.maxsize, seed)):
        yield Document(story.text, f"story {number}", story.nats)


def _languages() -> Iterator[Document]:
    for name, sentences in languages().items():
        yield Document("\n".join(sentences), name)


def _collect_python_docs() -> Iterator[Document]:
    from pydoc_data import topics
    for name, text in sorted(topics.topics.items()):
        yield Document(text.strip(), f"topic {name}")
    for source in track(python_source(), "read docstrings", unit="file"):
        try:
            tree = ast.parse(source.text)
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(doc for doc in found if doc and len(doc) > 40)
        if text:
            yield Document(text, source.name)


def _paths(source: str) -> Iterator[Document]:
    """A file, a folder or a glob."""
    path = Path(source).expanduser()
    if path.is_dir():
        chosen = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not chosen:
            raise ValueError(f"{source} has no text file: looked for {', '.join(SUFFIXES)}. Name a file or a glob "
                             f"(\"{source}/*.log\") to read others.")
    else:
        chosen = [path] if path.is_file() else sorted(Path(p) for p in glob(str(path), recursive=True) if Path(p).is_file())
        if not chosen:
            raise FileNotFoundError(f"{source!r} is no file, folder or glob, and no named source (stories, python-docs, "
                                    f"python-source, languages, hf:owner/name).")
    for file in chosen:
        yield from _file(file)


def _file(path: Path) -> Iterator[Document]:
    """One file: one document, or one for each line of a .jsonl."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start:,}. Leave "
                         f"it out, or convert it (iconv -f latin1 -t utf-8).") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: there is no text in it.")
    if path.suffix != ".jsonl":
        yield Document(text, str(path))
        return
    for number, line in enumerate(text.split("\n"), 1):  # str.splitlines would also cut at U+2028, inside a JSON string
        if line.strip():
            yield Document(_text_of(line, f"{path}, line {number}"), f"{path}:{number}")


def _text_of(line: str, where: str) -> str:
    """The "text" of one line of a .jsonl."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"{where}: expected a JSON object with a \"text\", got {line[:60]!r}.")
    return row["text"]


def _hugging_face(name: str) -> Iterator[Document]:
    """A document for each row's "text"."""
    for number, row in enumerate(hugging_face_rows(name)):
        if "text" not in row:
            raise ValueError(f"hf:{name}: row {number} has no \"text\" but {sorted(row)}.")
        yield Document(row["text"], f"hf:{name}:{number}")


def hugging_face_rows(name: str) -> Iterable[dict]:
    """owner/name[:config][:split], or json:FILE and the other builders of `datasets` over a local file.

    Raises: ImportError and ConnectionError without the package or the network.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"hf:{name} needs the package datasets: pip install datasets.") from None
    path, *rest = name.split(":")
    local = rest and Path(rest[0]).exists()
    try:
        if local:
            return load_dataset(path, data_files=rest[0], split="train")
        return load_dataset(path, *rest[:1], split=rest[1] if len(rest) > 1 else "train", streaming=True)
    except Exception as error:
        raise ConnectionError(f"hf:{name} could not be loaded: {error}. Check the name and the network, or use a local "
                              f"file.") from error
