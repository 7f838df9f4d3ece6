"""tokenizer.json: the file in which Hugging Face's `tokenizers` keeps a tokenizer.

The format describes a pipeline of many possible parts. We write the one for byte-level BPE (a pattern that
splits, then bytes written as visible characters, then merges), so that `tokenizers` and `transformers` give
the same ids; and we read back what gives the same ids here, refusing the rest by name: another model, a
normalizer, tokens that swallow the spaces around them. What a file adds around a text (its post_processor) is
not read: `encode` adds nothing.

Left out: padding and truncation, which are the loader's work.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from minillm.text.bpe_train import BYTE_ORDER
from minillm.text.patterns import PATTERNS

# A JSON key must be text, so GPT-2 writes each byte as a character: itself if it is a visible one in Latin-1,
# else the next free character from U+0100 on. A space becomes Ġ, a line end Ċ.
_CHARACTERS = [chr(byte) for byte in BYTE_ORDER[:188]] + [chr(256 + n) for n in range(68)]
_CHARACTER_OF_BYTE = dict(zip(BYTE_ORDER, _CHARACTERS, strict=True))
_BYTE_OF_CHARACTER = {character: byte for byte, character in _CHARACTER_OF_BYTE.items()}

Parts = tuple[dict[bytes, int], str, dict[str, int]]
"""What BPETokenizer is made from: ranks, pattern, special tokens."""


def to_json(ranks: Mapping[bytes, int], merges: Iterable[tuple[bytes, bytes]], pattern: str,
            special_tokens: Mapping[str, int]) -> dict:
    """What tokenizer.json holds. Raises: ValueError if a special token is spelled like an ordinary one."""
    vocab = {visible(token): i for token, i in sorted(ranks.items(), key=lambda item: item[1])}
    for token in special_tokens:
        if token in vocab:
            raise ValueError(f"The special token {token!r} is also how this file spells the ordinary token "
                             f"{vocab[token]}, so it cannot hold both. Rename it, say to <|{token}|>.")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for token, i in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False,
                  "vocab": vocab | dict(special_tokens),
                  "merges": [f"{visible(left)} {visible(right)}" for left, right in merges]},
    }


def read(path: Path) -> dict:
    """The content of a file. Raises: FileNotFoundError; ValueError when it is no whole JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}. BPETokenizer.train(...).save(folder) writes one.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also a file that is not UTF-8
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is not whole JSON: {error}. It was "
                         f"probably cut while it was written or copied: make or copy it again.") from error


def from_json(content: dict) -> Parts:
    """The parts of the tokenizer that this content describes.

    Raises: ValueError when it is no byte-level BPE, or one that would give other ids than BPETokenizer.
    """
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        kind = model.get("type", "of no type") if isinstance(model, dict) else "missing"
        raise ValueError(f"not a byte-level BPE tokenizer (its model is {kind}). This class reads nothing "
                         f"else; use the `tokenizers` package.")
    _refuse("model.type", model.get("type", "BPE"), ("BPE",))
    _refuse("normalizer", content.get("normalizer"), (None,))
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        _refuse(f"model.{option}", model.get(option) or None, (None,))
    _refuse("model.byte_fallback", model.get("byte_fallback", False), (False,))
    specials = {}
    for token in content.get("added_tokens") or ():
        for option in ("single_word", "lstrip", "rstrip"):
            _refuse(f"{option} of the added token {token['content']!r}", token.get(option, False), (False,))
        specials[token["content"]] = token["id"]
    pattern = _pattern(content.get("pre_tokenizer"))
    return ranks_of(model["vocab"], model["merges"], specials), pattern, specials


def ranks_of(vocab: Mapping[str, int], merges: Sequence[str | Sequence[str]],
             specials: Mapping[str, int]) -> dict[bytes, int]:
    """Token bytes -> id, for a vocabulary in which merging in the order of `merges` is joining by lowest id.

    Raises: ValueError when ids do not rise with the merges, or a token has no merge.
    """
    ranks = {hidden(token): i for token, i in vocab.items() if token not in specials}
    unmerged, last = {token for token in ranks if len(token) > 1}, -1
    for merge in merges:
        token = b"".join(map(hidden, merge.split(" ") if isinstance(merge, str) else merge))
        rank = ranks.get(token, -1)
        if rank < last:
            raise ValueError(f"the merge {merge!r} makes the token of id {rank} after one of id {last}. Ids "
                             f"must rise with the order of merges: this tokenizer joins by lowest id.")
        unmerged.discard(token)
        last = rank
    if unmerged:
        raise ValueError(f"{len(unmerged)} tokens have no merge that makes them, such as {min(unmerged)!r}. "
                         f"If they are special tokens, they belong into added_tokens.")
    return ranks


def visible(token: bytes) -> str:
    """The token's bytes, each as a character that can be seen."""
    return "".join(map(_CHARACTER_OF_BYTE.__getitem__, token))


def hidden(token: str) -> bytes:
    """The bytes behind such characters. Raises: ValueError for other characters."""
    try:
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))
    except KeyError as error:
        raise ValueError(f"not a byte-level BPE tokenizer: the token {token!r} has {error.args[0]!r}, which "
                         f"stands for no byte.") from None


def _pattern(pre_tokenizer: dict | None) -> str:
    """The pattern of a pre-tokenizer that is ByteLevel, either alone (it brings GPT-2's) or after a Split."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] if part else None for part in parts]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(f"its pre_tokenizer is {kinds}: this class reads ByteLevel alone, or Split and then "
                         f"ByteLevel.")
    _refuse("add_prefix_space", parts[-1].get("add_prefix_space", True), (False,))
    _refuse("use_regex", parts[-1].get("use_regex", True), (len(parts) == 1,))
    if len(parts) == 1:
        return PATTERNS["gpt2"]
    split = parts[0]
    _refuse("invert", split.get("invert", False), (False,))
    _refuse("behavior", split.get("behavior"), ("Isolated",))
    if "Regex" not in split["pattern"]:
        raise ValueError(f"it splits by {split['pattern']}: only a Regex is read here.")
    return split["pattern"]["Regex"]


def _refuse(name: str, value: object, allowed: tuple) -> None:
    """Stop at a setting under which the ids would be others."""
    if value not in allowed:
        raise ValueError(f"{name} is {reprlib.repr(value)}, and this class reads only {allowed[0]!r}: the "
                         f"ids would be others.")
