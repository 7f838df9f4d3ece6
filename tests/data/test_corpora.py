import json
import random
import sys
import unicodedata
from itertools import islice

import pytest

from minillm.data import corpora
from minillm.data.corpora import Document, documents, languages, split
from minillm.data.stories import stories


def test_stories_come_with_their_probability():
    found = list(islice(documents("stories", seed=4), 3))
    assert [(doc.text, doc.nats) for doc in found] == [(story.text, story.nats) for story in stories(3, 4)]


def test_the_limit_counts_bytes_and_ends_after_the_document_that_crosses_it():
    found = list(documents("stories", limit=5_000))
    sizes = [len(doc.text.encode()) for doc in found]
    assert sum(sizes[:-1]) < 5_000 <= sum(sizes)


# Languages

def test_every_language_says_the_same_sentences():
    assert len(languages()) >= 11
    assert {len(sentences) for sentences in languages().values()} == {len(languages()["English"])}
    assert [doc.name for doc in documents("languages")] == list(languages())
    assert next(documents("languages")).text.split("\n") == languages()["English"]


@pytest.mark.parametrize("language, script", [
    ("English", "LATIN"), ("German", "LATIN"), ("French", "LATIN"), ("Spanish", "LATIN"), ("Russian", "CYRILLIC"),
    ("Greek", "GREEK"), ("Arabic", "ARABIC"), ("Hindi", "DEVANAGARI"), ("Chinese", "CJK"),
    ("Chinese (traditional)", "CJK"), ("Japanese", ("CJK", "HIRAGANA", "KATAKANA")), ("Korean", "HANGUL")])
def test_each_language_is_in_its_script(language, script):
    letters = [letter for line in languages()[language] for letter in line if unicodedata.category(letter)[0] == "L"]
    assert letters and all(unicodedata.name(letter).startswith(script) for letter in letters)


def test_the_page_has_emoji():
    assert all("🎂🎉" in "".join(sentences) for sentences in languages().values())


# Python's own texts

def test_python_source_leaves_out_tests_and_installed_packages():
    found = list(islice(corpora.python_source(), 150))
    assert all(doc.text.strip() and doc.name.endswith(".py") for doc in found)
    assert any(doc.name == "argparse.py" for doc in found)
    assert not any(part in doc.name.split("/") for doc in found for part in ("test", "tests", "site-packages"))


def test_python_docs_are_collected_once_and_then_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    module = Document('"""' + "A long docstring of this module. " * 3 + '"""\n\n'
                      'def short():\n    """Short."""\n\n\n'
                      'class Thing:\n    """A thing that is explained at some length here, on purpose."""\n', "thing.py")
    monkeypatch.setattr(corpora, "python_source", lambda: iter([module, Document("def broken(:", "broken.py")]))
    first = list(documents("python-docs"))
    *topics, last = first
    assert len(topics) > 50 and all(doc.name.startswith("topic ") and doc.text for doc in topics)
    assert last.name == "thing.py"
    assert "A long docstring" in last.text and "at some length" in last.text and "Short." not in last.text
    monkeypatch.setattr(corpora, "python_source", lambda: pytest.fail("collected a second time"))
    assert list(documents("python-docs")) == first
    cached, = (tmp_path / "cache").iterdir()
    assert sys.version.split()[0] in cached.name


def test_an_interrupted_collection_leaves_no_cache(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt
        yield

    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    monkeypatch.setattr(corpora, "python_source", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(documents("python-docs"))
    assert list(tmp_path.iterdir()) == []


# Files

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name, text in (("b.txt", "bee"), ("a.md", "ay"), ("deep/c.py", "see = 1"), ("deep/er/d.rst", "déjà"),
                       ("x.png", "x")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "e.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": 2}\n', encoding="utf-8")
    return tmp_path


def texts(source) -> list[str]:
    return [doc.text for doc in documents(str(source))]


def test_a_file_a_folder_and_a_glob(folder):
    assert texts(folder / "b.txt") == ["bee"]
    assert texts(folder) == ["ay", "bee", "see = 1", "déjà", "one", "two"]
    assert texts(folder / "**" / "*.rst") == ["déjà"]
    assert texts(folder / "*.png") == ["x"]  # a glob reads what it names
    assert [doc.name for doc in documents(str(folder / "b.txt"))] == [str(folder / "b.txt")]
    assert [doc.name for doc in documents(str(folder / "e.jsonl"))] == [f"{folder}/e.jsonl:1", f"{folder}/e.jsonl:2"]


def test_jsonl_lines_end_at_line_feeds_only_and_empty_lines_do_not_matter(tmp_path):
    # U+2028, U+0085 and the form feed end lines for str.splitlines, not for JSON lines
    written = ["a\u2028b", "c\u0085d", "e\x0cf", "g"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in written]
    content = "\r\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]) + "\n\n"
    (tmp_path / "a.jsonl").write_bytes(content.encode())
    assert texts(tmp_path / "a.jsonl") == written


@pytest.mark.parametrize("line", ['{"words": "no text"}', "not json", "[1, 2]", '"text"', '{"text": 5}'])
def test_a_wrong_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match="a.jsonl, line 2: expected a JSON object with a \"text\""):
        texts(tmp_path)


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "old.txt").write_bytes("voilà".encode("latin-1"))
    with pytest.raises(ValueError, match="old.txt is not UTF-8 text: byte 0xe0 at offset 4.*iconv"):
        texts(tmp_path)


@pytest.mark.parametrize("content", ["", " \n\t "])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "no.txt").write_text(content)
    with pytest.raises(ValueError, match="no.txt is empty"):
        texts(tmp_path / "no.txt")


def test_a_folder_without_text_says_what_was_looked_for(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="looked for .txt, .md, .rst, .py"):
        texts(tmp_path)


def test_a_path_to_nowhere_says_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file, folder or glob.*python-docs"):
        texts(tmp_path / "nowhere*")


# Hugging Face

@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="hf: is for those who have the package datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    return datasets


def test_a_dataset_through_the_real_library(datasets, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(4)))
    found = list(documents(f"hf:json:{tmp_path}/a.jsonl"))
    assert [doc.text for doc in found] == ["row 0", "row 1", "row 2", "row 3"]
    assert found[3].name.endswith(":3")


def test_a_dataset_folder_and_its_split(datasets, tmp_path):
    for part in ("train", "test"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{part}.jsonl").write_text(json.dumps({"text": f"{part} text"}) + "\n")
    assert texts(f"hf:{tmp_path}/set") == ["train text"]
    assert texts(f"hf:{tmp_path}/set:default:test") == ["test text"]


def test_a_dataset_without_text_says_its_columns(datasets, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": "y"}\n')
    with pytest.raises(ValueError, match=r"no \"text\" but \['answer', 'prompt'\]"):
        texts(f"hf:json:{tmp_path}/a.jsonl")


def test_without_the_network_or_the_package_the_error_says_so(datasets, monkeypatch):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConnectionError, match="hf:owner/name could not be loaded: no route to host.*network"):
        texts("hf:owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        texts("hf:owner/name")


# Splitting

def test_split_keeps_every_document_and_equal_texts_together():
    docs = [Document(f"text {i % 500}", f"{i}") for i in range(1_000)]
    train, val = split(docs, 0.2)
    assert sorted(doc.name for doc in train + val) == sorted(doc.name for doc in docs)
    assert not {doc.text for doc in train} & {doc.text for doc in val}
    # 4 standard errors of a share of 500 different texts
    assert len(val) / len(docs) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 500) ** 0.5)


def test_split_does_not_depend_on_the_order():
    docs = [Document(f"text {i}", f"{i}") for i in range(300)]
    mixed = random.Random(0).sample(docs, len(docs))
    assert {doc.name for doc in split(docs, 0.3)[1]} == {doc.name for doc in split(mixed, 0.3)[1]}


def test_a_seed_gives_its_split_and_a_larger_validation_holds_the_smaller():
    docs = [Document(f"text {i}", f"{i}") for i in range(300)]
    names = [{doc.name for doc in split(docs, share, seed)[1]}
             for share, seed in ((0.1, 0), (0.3, 0), (0.3, 1), (0.3, -1))]
    assert names[0] < names[1]
    assert len({frozenset(part) for part in names}) == 4


def test_split_at_its_ends():
    docs = [Document(f"text {i}", f"{i}") for i in range(20)]
    assert split(docs, 0.0) == (docs, [])
    assert split(docs, 1.0) == ([], docs)
