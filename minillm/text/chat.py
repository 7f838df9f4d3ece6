"""Chat templates: a conversation becomes one row of ids, and a mask says which of them the model is to learn to write.

A template is data: what stands before and after the words of each role. Only what a template itself writes may become a
special token; the words of a message never do (bpe.py counts none unless allowed), so nobody can end a turn from inside it.
Marks that are plain text ("### Response:", "ASSISTANT:", "[INST]") have no such protection: anybody can type them.
That is why newer templates use special tokens. Sources: beside each template. Left out: tools, images, and Jinja, in which
Hugging Face writes templates (the tests compare with it).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import regex

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": the words}."""


class Rendered(NamedTuple):
    """Ids, and for each whether it is learned: an answer's words and the token that ends them."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Template:
    """What stands around the words of each role.

    system, user: before, after.   assistant: before (the prompt for an answer), and then learned: before the words, after
    them (the end); and once more not learned: after the end.   special: which parts of these strings are special tokens.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str, str, str]
    special: tuple[str, ...]
    start: str = ""
    """Before everything."""
    merged_user: str | None = None
    """Before the user's words where a system message was put into the same turn."""
    default_system: str | None = None
    """The system message of a conversation that has none."""

    def renamed(self, names: Mapping[str, str]) -> "Template":
        """The same with other special tokens: {"</s>": "<|endoftext|>"}. Raises: ValueError for one that is not there."""
        if unknown := names.keys() - set(self.special):
            raise ValueError(f"{sorted(unknown)[0]!r} is no special token of this template; it has {', '.join(self.special)}.")

        def changed(value):
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            for old, new in names.items() if value else ():
                value = value.replace(old, new)
            return value
        return replace(self, **{field.name: changed(getattr(self, field.name)) for field in fields(self)})

    @property
    def end(self) -> str:
        """The special token that ends an answer: where sampling stops."""
        return next(token for token in self.special if self.assistant[2].endswith(token))


TEMPLATES: dict[str, Template] = {
    # The tokens that the course's tokenizer reserves, in the form of Phi-3's template (arXiv:2404.14219 §2).
    "minillm": Template(("<|system|>\n", "<|end|>\n"), ("<|user|>\n", "<|end|>\n"), ("<|assistant|>\n", "", "<|end|>", "\n"),
                        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    # OpenAI's ChatML as Qwen uses it, without its default system message.
    "chatml": Template(("<|im_start|>system\n", "<|im_end|>\n"), ("<|im_start|>user\n", "<|im_end|>\n"),
                       ("<|im_start|>assistant\n", "", "<|im_end|>", "\n"), ("<|im_start|>", "<|im_end|>")),
    # arXiv:2307.09288 and its generation.py: the system message is part of the first user's turn.
    "llama2": Template(("<s>[INST] <<SYS>>\n", "\n<</SYS>>\n\n"), ("<s>[INST] ", " [/INST]"), ("", " ", " </s>", ""),
                       ("<s>", "</s>"), merged_user=""),
    # Stanford Alpaca's train.py; it has one turn, and further ones repeat the form.
    "alpaca": Template(("", "\n\n"), ("### Instruction:\n", "\n\n"), ("### Response:", "", "</s>", ""), ("<s>", "</s>"),
                       start="<s>", default_system="Below is an instruction that describes a task. Write a response that "
                                                 "appropriately completes the request."),
    # FastChat's conversation.py, vicuna_v1.1.
    "vicuna": Template(("", " "), ("USER: ", " "), ("ASSISTANT:", " ", "</s>", ""), ("<s>", "</s>"), start="<s>",
                       default_system="A chat between a curious user and an artificial intelligence assistant. The "
                                      "assistant gives helpful, detailed, and polite answers to the user's questions."),
}


def render(template: Template, tokenizer, messages: Sequence[Message], *, prompt: bool = False) -> Rendered:
    """The ids of a conversation, and which of them are learned. prompt: end with what asks the model for an answer.

    A prompt's ids are the beginning of the ids of the conversation that its answer makes. Between special tokens, text
    with the same mask is encoded in one piece, as Hugging Face does; only where an answer begins is a cut of its own.
    The words stay as they are: LLaMA-2's code, for one, strips white space from their ends first.
    Raises: ValueError for roles out of order, or a tokenizer without the template's special tokens.
    """
    _check(messages, prompt)
    if missing := [token for token in template.special if token not in tokenizer.special_tokens]:
        raise ValueError(f"the tokenizer has no {missing[0]!r}, which the template writes; it has "
                         f"{', '.join(tokenizer.special_tokens) or 'no special tokens'}. Use "
                         f"template.renamed({{{missing[0]!r}: ...}}).")
    ids, mask, text, learned = [], [], "", False

    def put(new: list[int]) -> None:
        ids.extend(new)
        mask.extend([learned] * len(new))

    for piece, is_special, is_learned in _pieces(template, messages, prompt):
        if text and (is_special or is_learned != learned):
            put(tokenizer.encode(text))
            text = ""
        learned = is_learned
        if is_special:
            put([tokenizer.special_tokens[piece]])
        else:
            text += piece
    put(tokenizer.encode(text))
    return Rendered(ids, mask)


def _pieces(template: Template, messages: Sequence[Message], prompt: bool) -> Iterator[tuple[str, bool, bool]]:
    """(text, whether it is a special token, whether it is learned), in order."""
    def own(text: str, learned: bool = False):
        parts = regex.split(f"({'|'.join(map(regex.escape, template.special))})", text)
        return [(part, part in template.special, learned) for part in parts if part]

    if template.default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.default_system}, *messages]
    yield from own(template.start)
    previous = None
    for message in messages:
        role, words = message["role"], message["content"]
        if role == "assistant":
            before, lead, end, after = template.assistant
            yield from own(before)
            yield from [*own(lead, True), (words, False, True), *own(end, True), *own(after)]
        else:
            before, after = getattr(template, role)
            merged = role == "user" and previous == "system" and template.merged_user is not None
            yield from [*own(template.merged_user if merged else before), (words, False, False), *own(after)]
        previous = role
    if prompt:
        yield from own(template.assistant[0])


def _check(messages: Sequence[Message], prompt: bool) -> None:
    """A system message or none, then user and assistant in turns."""
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for place, role in enumerate(turns, len(roles) - len(turns)):
        expected = ("user", "assistant")[(place - len(roles) + len(turns)) % 2]
        if role != expected:
            raise ValueError(f"message {place} has the role {role!r}, expected {expected!r}: after a system message, or none, "
                             f"user and assistant take turns, the user first.")
    if not turns:
        raise ValueError(f"there is no message of a user; the roles are {roles}.")
    if prompt and turns[-1] != "user":
        raise ValueError("a prompt ends with the user's message, and this conversation ends with an answer.")
    for place, message in enumerate(messages):
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {place} has the content {message.get('content')!r}: expected a text.")
