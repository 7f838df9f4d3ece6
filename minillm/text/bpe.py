"""Byte-level BPE: text -> pieces (a regular expression) -> bytes -> merges, lowest rank first -> token ids.

Every byte is a token, so there is no unknown text, and decoding gives back exactly the bytes that were encoded. A
token's id is its rank: the lower, the earlier it was learned and the sooner it is merged, which is tiktoken's rule and
file format. Saved in the format of Hugging Face's tokenizers. Training is in bpe_train.
"""

import hashlib
import heapq
import json
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

import regex
import tiktoken

from minillm.files import write_atomically
from minillm.text.bpe_train import BYTE_ORDER, PRINTABLE, count_words, splitter, train_merges

# Reserved from the start, so that a model pretrained today can be taught to talk later.
CHAT_TOKENS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# How text is cut before merging: no token crosses such a cut. A word takes the space before it along.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s+$|\s*[\r\n]|\s+(?!\S)|\s",
}
NUMBERS = {"gpt2": r" ?\p{N}+", "cl100k": r"\p{N}{1,3}"}

# How the file format spells bytes: printable ones as themselves, the others as characters from 256 on.
SPELLING = {byte: chr(byte if byte in PRINTABLE else 256 + i - len(PRINTABLE)) for i, byte in enumerate(BYTE_ORDER)}
UNSPELLING = {character: byte for byte, character in SPELLING.items()}

CACHE_LIMIT = 200_000  # pieces; what is longer than CACHED_LENGTH characters seldom comes again
CACHED_LENGTH = 48


class BPETokenizer:
    """ranks: every token's bytes and its id; pattern: the regular expression of the pre-split; special_tokens: names
    and ids that text does not produce unless it is allowed to.

    Raises: ValueError when a byte has no token, or two tokens share an id.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]):
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"byte {missing[0]} and {len(missing) - 1} others have no token: a byte-level vocabulary "
                             f"holds all 256 bytes.")
        self.ranks, self.pattern, self.special_tokens = dict(ranks), pattern, dict(special_tokens)
        self._bytes = {number: token for token, number in ranks.items()}
        self._bytes |= {number: name.encode() for name, number in special_tokens.items()}
        if len(self._bytes) != len(ranks) + len(special_tokens):
            raise ValueError(f"{len(ranks) + len(special_tokens)} tokens share {len(self._bytes)} ids: every token "
                             f"needs its own.")
        self._split = splitter(pattern)
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, pattern: str = "gpt2", split_digits: bool = False,
              special_tokens: Collection[str] = CHAT_TOKENS, workers: int = 1) -> "BPETokenizer":
        """Learn a vocabulary of `vocab_size` tokens: 256 bytes, merges, and the special tokens at the end.

        A text with too few pairs gives a smaller vocabulary; `vocab_size` of the result says so.
        pattern: a name in PATTERNS, or a regular expression.   split_digits: every digit is a piece of its own, so
        that numbers are spelled and can be computed with.   workers: processes that count words.
        Raises: ValueError for an empty text, or a vocabulary without room for the bytes.
        """
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise ValueError(f"a vocabulary of {vocab_size} is too small: the 256 bytes and {len(special_tokens)} special "
                             f"tokens alone need {smallest}. Ask for more, for example 1024.")
        cut = _pattern(pattern, split_digits)
        words = count_words(texts, cut, workers)
        if not words:
            raise ValueError("there is no text to learn a vocabulary from: the corpus is empty.")
        merges = train_merges(words, vocab_size - len(special_tokens))
        ranks = {bytes([byte]): number for number, byte in enumerate(BYTE_ORDER)}
        for left, right in merges:
            ranks.setdefault(left + right, len(ranks))
        return cls(ranks, cut, {name: len(ranks) + i for i, name in enumerate(special_tokens)})

    @property
    def vocab_size(self) -> int:
        """Ids that a model needs rows for: the highest id plus one."""
        return max(self._bytes) + 1

    @property
    def end_of_text(self) -> int:
        """The id of <|endoftext|>. Raises: ValueError when the tokenizer has none."""
        if "<|endoftext|>" not in self.special_tokens:
            raise ValueError(f"this tokenizer has no <|endoftext|> among its special tokens {sorted(self.special_tokens)}.")
        return self.special_tokens["<|endoftext|>"]

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs that make each token, in the order in which they were learned."""
        learned = []
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            if len(token) > 1:
                parts = self._merge(token, below=rank)
                if len(parts) == 2:
                    learned.append((parts[0], parts[1]))
        return learned

    @cached_property
    def fingerprint(self) -> str:
        """Identifies pattern, tokens and ids: token files carry it, so that they are not read by another tokenizer."""
        content = [self.pattern, sorted(self.special_tokens.items()), sorted((n, t.hex()) for t, n in self.ranks.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token. Raises: ValueError for an id outside the vocabulary."""
        try:
            return self._bytes[token]
        except KeyError:
            raise ValueError(f"token id {token} is not in this vocabulary of {self.vocab_size}.") from None

    def encode(self, text: str | bytes, *, allowed_special: Collection[str] = ()) -> list[int]:
        """Token ids of a text, or of any bytes. Special tokens count only if allowed: a set of names, or "all".

        Lone surrogates, which are no text, become U+FFFD, as in tiktoken. Raises: ValueError for unknown names.
        """
        text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else _without_surrogates(text)
        if not allowed_special:
            return self._encode_ordinary(text)
        allowed = set(self.special_tokens) if allowed_special == "all" else set(allowed_special)
        if unknown := allowed - set(self.special_tokens):
            raise ValueError(f"{sorted(unknown)} are no special tokens; there are {sorted(self.special_tokens)}.")
        ids = []
        for part in regex.split("(" + "|".join(regex.escape(name) for name in sorted(allowed, reverse=True)) + ")", text):
            ids += [self.special_tokens[part]] if part in allowed else self._encode_ordinary(part)
        return ids

    def encode_batch(self, texts: list[str], workers: int = 1) -> list[list[int]]:
        """The same ids for many texts, through tiktoken."""
        return self._tiktoken.encode_ordinary_batch(texts, num_threads=workers)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the tokens stand for. Raises: ValueError for an id outside the vocabulary."""
        try:
            return b"".join([self._bytes[i] for i in ids])
        except KeyError as unknown:
            raise ValueError(f"token id {unknown} is not in this vocabulary of {self.vocab_size}.") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are no UTF-8 (half a character) show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_tiktoken(self, name: str = "minillm") -> tiktoken.Encoding:
        """The same tokenizer in tiktoken: identical ids at the speed of Rust."""
        return tiktoken.Encoding(name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_tokens)

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        return self.to_tiktoken()

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json into a folder (or to a path ending in .json), in Hugging Face's format."""
        write_atomically(_file(path), json.dumps(self._as_json(), ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read a tokenizer.json of byte-level BPE. Raises: FileNotFoundError; ValueError when it is something else."""
        file = _file(path)
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist: there is no tokenizer in {file.parent}.")
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            special = {t["content"]: t["id"] for t in about["added_tokens"]}
            ranks = {bytes(UNSPELLING[c] for c in token): number for token, number in about["model"]["vocab"].items()
                     if token not in special}
            return cls(ranks, _pattern_of(about), special)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no byte-level BPE tokenizer that can be used here ({error!r}). "
                             f"Copy it again if it is cut short, or choose another.") from None

    def _encode_ordinary(self, text: str) -> list[int]:
        """Pieces, each looked up or merged."""
        ids, cache = [], self._cache
        for piece in self._split(text):
            known = cache.get(piece)
            if known is None:
                known = self._encode_piece(piece)
            ids += known
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        data = piece.encode("utf-8", "surrogateescape")
        ids = [self.ranks[data]] if data in self.ranks else [self.ranks[part] for part in self._merge(data)]
        if len(piece) <= CACHED_LENGTH:
            if len(self._cache) >= CACHE_LIMIT:
                self._cache.clear()
            self._cache[piece] = ids
        return ids

    def _merge(self, data: bytes, below: float = float("inf")) -> list[bytes]:
        """Merge bytes, always the pair of lowest rank, leftmost first, while that rank is under `below`.

        A heap of candidates and links between neighbours make it N log N: a megabyte without a space takes seconds.
        """
        ranks, end = self.ranks, len(data)
        parts = [data[i:i + 1] for i in range(end)]
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))
        heap = []
        for i in range(end - 1):
            rank = ranks.get(data[i:i + 2])
            if rank is not None and rank < below:
                heap.append((rank, i, 2))
        heapq.heapify(heap)
        while heap:
            rank, left, length = heapq.heappop(heap)
            right = after[left]
            # The note is out of date if one of the two has been merged since: the lengths tell.
            if not parts[left] or right >= end or len(parts[left]) + len(parts[right]) != length:
                continue
            parts[left] += parts[right]
            parts[right] = b""
            after[left] = after[right]
            if after[left] < end:
                before[after[left]] = left
            for first, second in ((before[left], left), (left, after[left])):
                if first >= 0 and second < end:
                    joined = parts[first] + parts[second]
                    found = ranks.get(joined)
                    if found is not None and found < below:
                        heapq.heappush(heap, (found, first, len(joined)))
        return [part for part in parts if part]

    def _as_json(self) -> dict:
        """The content of tokenizer.json. Every way to make a token is a merge there, so that rank alone decides."""
        spell = {token: "".join(SPELLING[b] for b in token) for token in self.ranks}
        merges = []
        for token in sorted(self.ranks, key=self.ranks.__getitem__):
            ways = [(token[:i], token[i:]) for i in range(1, len(token))]
            ways = [(a, b) for a, b in ways if a in self.ranks and b in self.ranks]
            merges += sorted(ways, key=lambda way: (self.ranks[way[0]], self.ranks[way[1]]))
        special = [{"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                    "normalized": False, "special": True} for name, number in self.special_tokens.items()]
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
                "post_processor": None, "decoder": byte_level | {"use_regex": True},
                "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                          "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                          "vocab": {spell[token]: number for token, number in self.ranks.items()},
                          "merges": [[spell[a], spell[b]] for a, b in merges]}}


def _pattern(name: str, split_digits: bool) -> str:
    """A named pattern, or a regular expression as it is."""
    if name not in PATTERNS:
        if split_digits:
            raise ValueError(f"split_digits works with the patterns {sorted(PATTERNS)}; write it into your own.")
        return name
    return PATTERNS[name].replace(NUMBERS[name], r"\p{N}") if split_digits else PATTERNS[name]


def _pattern_of(about: dict) -> str:
    """The pre-split of a tokenizer.json, whose text must otherwise go in unchanged."""
    if about["model"]["type"] != "BPE" or about["normalizer"] is not None:
        raise ValueError(f"model {about['model']['type']!r}, normalizer {about['normalizer']!r}")
    steps = about["pre_tokenizer"].get("pretokenizers", [about["pre_tokenizer"]])
    if [s["type"] for s in steps] == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return PATTERNS["gpt2"]
    if [s["type"] for s in steps] == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        return steps[0]["pattern"]["Regex"]
    raise ValueError(f"pre-tokenizer {[s['type'] for s in steps]}")


def _without_surrogates(text: str) -> str:
    """Text that UTF-8 can say: pairs of surrogates become the character they mean, lone ones U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _file(path: str | Path) -> Path:
    """tokenizer.json of a folder, or the path itself."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "tokenizer.json"
