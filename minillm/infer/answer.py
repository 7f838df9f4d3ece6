"""One more turn of a conversation: render it, stream the answer, and stop where the template ends a turn.

generate.py writes on from a text; here the text is a conversation, and what the user types cannot end a turn (text/chat.py). A
conversation that has outgrown the context loses its oldest turns, a question with its answer at a time; the system message stays.
Left out: a cache kept from turn to turn.
"""

from collections.abc import Iterator, Sequence

from minillm.infer.generate import stream_pieces
from minillm.model.transformer import Transformer
from minillm.text.chat import Message, Template, render


def stream_answer(model: Transformer, tokenizer, template: Template, messages: Sequence[Message], max_new_tokens: int,
                  **options) -> Iterator[str]:
    """Yield the answer to the last message, a user's, piece by piece; options (sampling, seed ...) as for `stream_text`.

    Raises: ValueError as `render`, or as `fitting`.
    """
    kept, _ = fitting(template, tokenizer, messages, model.config.context - max_new_tokens)
    ids = render(template, tokenizer, kept, prompt=True).ids
    ends = (tokenizer.special_tokens[template.end], tokenizer.end_of_text)
    yield from stream_pieces(model, tokenizer, ids, max_new_tokens, ends, **options)


def fitting(template: Template, tokenizer, messages: Sequence[Message], room: int) -> tuple[list[Message], int]:
    """The newest part of a conversation that fits `room` tokens, and how many turns were left out.

    Raises: ValueError when even the last question does not fit.
    """
    kept, dropped = list(messages), 0
    first = 1 if kept and kept[0]["role"] == "system" else 0
    while (size := len(render(template, tokenizer, kept, prompt=True).ids)) > room:
        if len(kept) <= first + 1:
            raise ValueError(f"the question takes {size} tokens with its template, and there is room for {max(room, 0)} beside the answer. Ask "
                             f"something shorter, or for a shorter answer.")
        del kept[first:first + 2]
        dropped += 1
    return kept, dropped
