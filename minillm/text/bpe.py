"""The byte-level BPE tokenizer: text to ids and back, for every string and every sequence of bytes.

Text is split by a pattern into words, a word is its UTF-8 bytes, and neighbouring tokens are joined while
some join is in the vocabulary, the one with the lowest rank first. bpe_train learns the ranks and
tokenizer_json knows the file format; this file applies the ranks. The same ranks, pattern and special tokens
give the ids of tiktoken. Source: arXiv:1508.07909 §3.2, on bytes as in GPT-2. Left out: adding tokens to a
trained vocabulary, and cleaning (see clean), because decoding gives back exactly what was encoded.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Literal

import regex
import tiktoken

from minillm.files import write_atomically
from minillm.text import tokenizer_json
from minillm.text.bpe_train import BYTE_ORDER, count_words, learn_merges
from minillm.text.clean import repair_surrogates
from minillm.text.patterns import PATTERNS as PATTERNS  # its names are offered here too
from minillm.text.patterns import split_pattern, word_finder

CHAT_TOKENS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

_CACHED_WORDS = 1 << 17  # words whose ids are remembered; some 250 bytes each, so about 32 MB at most
_LONGEST_CACHED = 64  # characters; longer words hardly come twice
_LONGEST_FOR_TIKTOKEN = 500_000  # characters; its regular expressions give up on a million spaces in a row


def join_bytes(word: bytes, rank_of: Callable[[bytes], int | None]) -> list[bytes]:
    """The tokens of one word: join the two of lowest rank, the leftmost of equals, while any can be joined.

    A queue holds the possible joins, so N bytes take about N log N steps, even a word of a million letters.
    """
    size = len(word)
    ends = list(range(1, size + 1))  # where the token that begins here ends; 0 once no token begins here
    previous = list(range(-1, size - 1))  # where the token before it begins
    queue = [(rank, at) for at in range(size - 1) if (rank := rank_of(word[at:at + 2])) is not None]
    heapq.heapify(queue)
    while queue:
        rank, start = heapq.heappop(queue)
        middle = ends[start]
        if not 0 < middle < size or rank_of(word[start:ends[middle]]) != rank:
            continue  # one of the two has been joined to another since
        end = ends[start] = ends[middle]
        ends[middle] = 0
        if end < size:
            previous[end] = start
            if (rank := rank_of(word[start:ends[end]])) is not None:
                heapq.heappush(queue, (rank, start))
        before = previous[start]
        if before >= 0 and (rank := rank_of(word[before:end])) is not None:
            heapq.heappush(queue, (rank, before))
    tokens, start = [], 0
    while start < size:
        tokens.append(word[start:ends[start]])
        start = ends[start]
    return tokens


class BPETokenizer:
    """Ranks (token bytes -> id), a pattern that splits text (see patterns), and special tokens (text -> id).

    Raises: ValueError for ranks without all 256 bytes, an id given twice, or a pattern that loses text.
    """

    def __init__(self, ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]):
        self.ranks = dict(ranks)
        self.special_tokens = dict(special_tokens)
        self.pattern = split_pattern(pattern)
        _check_vocabulary(self.ranks, self.special_tokens)
        self._bytes_of_id = {i: token for token, i in self.ranks.items()}
        self._bytes_of_id |= {i: token.encode() for token, i in self.special_tokens.items()}
        self.vocab_size = max(self._bytes_of_id) + 1
        """The highest id plus one: the rows that an embedding needs."""
        self._find_words = word_finder(self.pattern)
        self._ids_of_word = _WordCache(self.ranks)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, pattern: str = "gpt2",
              split_digits: bool = False, special_tokens: Sequence[str] = CHAT_TOKENS,
              workers: int = 1) -> "BPETokenizer":
        """Learn `vocab_size` ids in all: the 256 bytes, then merges by rank, then the special tokens.

        A text too small to have that many merges gives fewer; the tokenizer's own `vocab_size` says how many.
        split_digits makes each digit a word of its own, without the space before it, so that numbers line up.
        Special tokens written out in the texts are learned from like any other text.
        Raises: ValueError when vocab_size has no room for bytes and special tokens, or when there is no text.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one string, and would be read letter by letter: give a list, [text].")
        specials = list(special_tokens)
        if len(set(specials)) < len(specials):
            raise ValueError(f"special_tokens = {specials}: a token is given twice.")
        merges = vocab_size - 256 - len(specials)
        if merges < 0:
            raise ValueError(f"vocab_size = {vocab_size} is below {256 + len(specials)}: 256 bytes and "
                             f"{len(specials)} special tokens need an id each. Ask for at least that many, "
                             f"or give fewer special_tokens.")
        pattern = split_pattern(pattern, split_digits)
        words = count_words(texts, pattern, workers)
        if not words:
            raise ValueError("There is no text to learn from: texts is empty, or each text in it is. (An "
                             "iterator that was read before is empty too: make a new one.)")
        tokens = [bytes([byte]) for byte in BYTE_ORDER]
        for left, right in learn_merges(words, merges):
            tokens.append(tokens[left] + tokens[right])
        return cls({token: i for i, token in enumerate(tokens)}, pattern,
                   {token: len(tokens) + n for n, token in enumerate(specials)})

    @classmethod
    def from_gpt2_files(cls, encoder_json: str | Path, vocab_bpe: str | Path) -> "BPETokenizer":
        """GPT-2's own two files. Raises: ValueError when the merges of one are not the ranks of the other."""
        vocab = json.loads(Path(encoder_json).read_text(encoding="utf-8"))
        lines = Path(vocab_bpe).read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        specials = {token: i for token, i in vocab.items() if token == "<|endoftext|>"}
        return cls(tokenizer_json.ranks_of(vocab, merges, specials), "gpt2", specials)

    # Text to ids

    def encode(self, text: str | bytes, *,
               allowed_special: Collection[str] | Literal["all"] = ()) -> list[int]:
        """The ids of a text. Bytes need not be UTF-8; in a str, half a surrogate pair becomes U+FFFD.

        Special tokens written in the text count as such only if allowed: what a user types cannot end a turn.
        Raises: ValueError for an allowed token that this tokenizer does not have.
        """
        text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else repair_surrogates(text)
        allowed = self._allowed(allowed_special)
        if not allowed:
            return self._encode_ordinary(text)
        longest_first = sorted(allowed, key=len, reverse=True)
        parts = regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text)
        ids = self._encode_ordinary(parts[0])
        for special, ordinary in zip(parts[1::2], parts[2::2], strict=True):
            ids.append(self.special_tokens[special])
            ids.extend(self._encode_ordinary(ordinary))
        return ids

    def encode_batch(self, texts: Iterable[str], *, allowed_special: Collection[str] | Literal["all"] = (),
                     threads: int = 1) -> list[list[int]]:
        """`encode` for each of many texts, by tiktoken: the same ids in about half the time."""
        encoding, allowed = self.to_tiktoken(), set(self._allowed(allowed_special))

        def encode(text: str) -> list[int]:
            if len(text) > _LONGEST_FOR_TIKTOKEN:
                return self.encode(text, allowed_special=allowed)
            if not allowed:
                return encoding.encode_ordinary(text)
            return encoding.encode(text, allowed_special=allowed, disallowed_special=())

        if threads == 1:
            return list(map(encode, texts))
        with ThreadPoolExecutor(threads) as pool:  # tiktoken lets other threads run while it works
            return list(pool.map(encode, texts))

    def _allowed(self, allowed_special: Collection[str] | Literal["all"]) -> Collection[str]:
        """The special tokens to look for."""
        if allowed_special == "all":
            return self.special_tokens.keys()
        allowed = [allowed_special] if isinstance(allowed_special, str) else allowed_special
        unknown = [token for token in allowed if token not in self.special_tokens]
        if unknown:
            raise ValueError(f"allowed_special has {', '.join(map(repr, unknown))}, but this tokenizer's "
                             f"special tokens are {', '.join(self.special_tokens) or 'none'}.")
        return allowed

    def _encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text without special tokens, word by word."""
        return list(chain.from_iterable(map(self._ids_of_word.__getitem__, self._find_words(text))))

    # Ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, exactly. Raises: ValueError for an id that no token has."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)  # a tensor's entries are no dict keys
        try:
            return b"".join(map(self._bytes_of_id.__getitem__, ids))
        except KeyError:
            return b"".join(map(self.token_bytes, ids))  # names the wrong one

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for. Raises: ValueError for an id that no token has."""
        if token_id not in self._bytes_of_id:
            raise ValueError(f"No token has the id {token_id}: this vocabulary has "
                             f"{len(self._bytes_of_id):,} tokens with ids from 0 to {self.vocab_size - 1}. "
                             f"Were the ids made by another tokenizer?")
        return self._bytes_of_id[token_id]

    # What it is

    @property
    def end_of_text(self) -> int:
        """The id of <|endoftext|>. Raises: ValueError if there is none."""
        if "<|endoftext|>" not in self.special_tokens:
            raise ValueError(f"This tokenizer has no <|endoftext|>; its special tokens are "
                             f"{', '.join(self.special_tokens) or 'none'}. Train one with it among them.")
        return self.special_tokens["<|endoftext|>"]

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The two tokens that each longer token was joined from, by rank.

        They follow from the ranks: whatever is joined before a token's own rank leaves exactly its two parts.
        """
        by_rank = sorted(self.ranks.items(), key=itemgetter(1))
        return [_parts(token, rank, self.ranks) for token, rank in by_rank if len(token) > 1]

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that change with any rank, the pattern or a special token; token shards keep them."""
        tokens = [[token.hex(), i] for token, i in sorted(self.ranks.items())]
        specials = sorted(self.special_tokens.items())
        return hashlib.sha256(json.dumps([tokens, self.pattern, specials]).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"BPETokenizer({len(self.ranks):,} tokens and {len(self.special_tokens)} special ones)"

    def __reduce__(self):
        return BPETokenizer, (self.ranks, self.pattern, self.special_tokens)

    # To and from others

    def to_tiktoken(self) -> tiktoken.Encoding:
        """A tiktoken encoding with the same ids, made once."""
        return self._tiktoken

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(f"minillm-{self.fingerprint[:12]}", pat_str=self.pattern,
                                 mergeable_ranks=self.ranks, special_tokens=self.special_tokens)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json into a folder, or to `path` itself if that ends in .json; all or nothing."""
        content = tokenizer_json.to_json(self.ranks, self.merges, self.pattern, self.special_tokens)
        write_atomically(_file(path), json.dumps(content, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read what `save` wrote, or another byte-level BPE in Hugging Face's format.

        Raises: FileNotFoundError; ValueError for a file that is cut, or that means other ids than ours.
        """
        path = _file(path)
        content = tokenizer_json.read(path)
        try:
            return cls(*tokenizer_json.from_json(content))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


class _WordCache(dict):
    """Word -> ids, filled as words are met, emptied when full. Words repeat, so this is most of the speed."""

    def __init__(self, ranks: dict[bytes, int]):
        super().__init__()
        self.ranks = ranks

    def __missing__(self, word: str) -> tuple[int, ...]:
        data, ranks = word.encode("utf-8", "surrogateescape"), self.ranks  # escapes: bytes that were no UTF-8
        ids = (ranks[data],) if data in ranks else tuple(map(ranks.__getitem__, join_bytes(data, ranks.get)))
        if len(word) <= _LONGEST_CACHED:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that the joins before `rank` leave of `token`."""
    parts = join_bytes(token, lambda pair: earlier if (earlier := ranks.get(pair, rank)) < rank else None)
    if len(parts) != 2:
        raise ValueError(f"The token {token!r} (id {rank}) is made of {len(parts)} tokens of lower rank, "
                         f"{parts[:9]}: no merge of two makes it, so these ranks cannot be written so.")
    return parts[0], parts[1]


def _check_vocabulary(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
    """Refuse a vocabulary that some text cannot be written in, or whose ids are ambiguous."""
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{len(missing)} of the 256 single bytes have no id, first byte {missing[0]}: a "
                         f"byte-level tokenizer needs them all, to write any text.")
    owner: dict[int, bytes | str] = {}
    for token, i in chain(ranks.items(), special_tokens.items()):
        if i < 0 or i in owner:
            raise ValueError(f"The token {token!r} has the id {i}, " + ("which is negative." if i < 0 else
                             f"which {owner[i]!r} has too: ids must differ."))
        if not token:
            raise ValueError(f"The token of id {i} is empty: it would match everywhere.")
        owner[i] = token


def _file(path: str | Path) -> Path:
    """The file that a folder or a file name means."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "tokenizer.json"
