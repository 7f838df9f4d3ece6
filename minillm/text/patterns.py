r"""Pre-split patterns: where text is cut into words before BPE, which never joins across a cut.

GPT-2's pattern and cl100k's (GPT-4) are here by name; any regular expression of the `regex` module that
matches every character can take their place. [\p{L}] is any letter and [\p{N}] any number of any script. Each
release of Unicode adds some, so on the newest characters `regex`, tiktoken and Hugging Face may differ.
"""

import re
from collections.abc import Callable

import regex

PATTERNS = {
    # An English ending; a space with letters, digits or other signs; spaces, the last left for the next word.
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Endings in capitals too; any one sign with letters; digits by threes; signs with line ends; last spaces.
    "cl100k": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?![\s\S])|\s*[\r\n]+|\s+(?!\S)|\s+"),
}
_DIGIT_RUNS = {"gpt2": r" ?[\p{N}]+", "cl100k": r"[\p{N}]{1,3}"}
_BY_DIGIT = {name: PATTERNS[name].replace(run, r"[\p{N}]") for name, run in _DIGIT_RUNS.items()}

# One of each kind of character: what a pattern must not lose.
_PROBE = "".join(map(chr, range(0x250))) + "中あ한\u0300\u0663²\u2003\u2028\u200d😀\ue000\udc80"


def split_pattern(name_or_regex: str, split_digits: bool = False) -> str:
    """The regular expression of a name, or itself. With split_digits, each digit is a word.

    Raises: ValueError for an expression that is none, that has capturing groups, that loses text, or whose
    digits cannot be split here.
    """
    if split_digits and name_or_regex not in _BY_DIGIT:
        raise ValueError(f"split_digits works on the patterns {', '.join(_BY_DIGIT)}. In your own, "
                         rf"{name_or_regex!r}, write [\p{{N}}] where it matches numbers.")
    pattern = (_BY_DIGIT if split_digits else PATTERNS).get(name_or_regex, name_or_regex)
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern = {pattern!r} is neither a name ({', '.join(PATTERNS)}) nor a regular "
                         f"expression: {error}.") from error
    if compiled.groups:
        raise ValueError(f"pattern = {pattern!r} has a group that captures: write (?:...) instead of (...).")
    if lost := set(_PROBE) - set("".join(compiled.findall(_PROBE))):
        raise ValueError(f"pattern = {pattern!r} does not match {sorted(lost)[:5]}, so encoding would lose "
                         rf"them. Add an alternative for whatever is left, such as |[\s\S].")
    return pattern


def word_finder(pattern: str) -> Callable[[str], list[str]]:
    """A function that returns all words of a text.

    Our own patterns have a twin for text in ASCII, where Python's `re` finds the same words in half the time.
    """
    find = regex.compile(pattern).findall
    if pattern not in PATTERNS.values() and pattern not in _BY_DIGIT.values():
        return find
    twin = pattern.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")
    find_in_ascii = re.compile(twin, re.ASCII).findall
    return lambda text: find_in_ascii(text) if text.isascii() else find(text)
