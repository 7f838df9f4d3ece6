"""What the tests of this folder share: a small tokenizer and shards made with it."""

from pathlib import Path

import pytest

from minillm.data.corpora import Document, documents
from minillm.data.shards import TokenShards, open_shards, write_shards
from minillm.data.stories import stories
from minillm.text.bpe import BPETokenizer


@pytest.fixture(scope="session")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([story.text for story in stories(30, 5)], 400)


@pytest.fixture(scope="session")
def docs() -> list[Document]:
    return [Document(story.text, f"story {i}", story.nats) for i, story in enumerate(stories(40, 6))]


@pytest.fixture(scope="session")
def shards(tmp_path_factory, tokenizer, docs) -> TokenShards:
    folder: Path = tmp_path_factory.mktemp("shards")
    write_shards(folder, "train", docs, tokenizer, shard_tokens=4_000)  # several files, so that windows cross them
    return open_shards(folder, "train", tokenizer)


@pytest.fixture(scope="session")
def python_docs(tmp_path_factory) -> list[Document]:
    """Collected anew: what an earlier version left in the user's cache is not what is tested."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MINILLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return list(documents("python-docs"))
