"""Rows into token ids, with a label at every token that is learnt: the assistant's, its end-of-turn included.

A chat is cut where serving cuts it: the text that the chat template gives for the messages before an answer, with the
generation prompt, is what the model will be asked; what the template adds for the answer is what it must learn to say.
Each piece is tokenized alone, so no token joins a prompt to its answer. Where a template does not render a conversation
as an extension of its beginning, its own {% generation %} markers or those of TRL's template for that family are used.
Never truncates: a row above max_length is left out and counted.
Law: the labels are -100 on every token but the assistant's, and end with a token that ends the turn.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trainer.data import Chat, Completion, Content, Message, Row
from trainer.errors import DataInvalid, DataUnusable, TemplateUnfit

IGNORED: Final = -100  # the label of a token that is not learnt, in torch and transformers


@dataclass(frozen=True)
class Piece:
    text: str
    learnt: bool


@dataclass(frozen=True)
class Encoded:
    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first one that is learnt."""
        return self.ids[: next(i for i, label in enumerate(self.labels) if label != IGNORED)]

    @property
    def end(self) -> int:
        """The last token that is learnt: the one that ends the turn."""
        return next(label for label in reversed(self.labels) if label != IGNORED)


@dataclass(frozen=True)
class EncodedRows:
    rows: tuple[Encoded, ...]
    too_long: int  # rows left out because they are above max_length


def encode_rows(rows: Sequence[Row], tokenizer: Any, *, max_length: int, ends: Collection[int]) -> EncodedRows:
    """Encode all rows; `ends` are the tokens that may end a turn.

    Raises: DataInvalid for rows that the chat template rejects, DataUnusable if none are left, TemplateUnfit.
    """
    encoded: list[Encoded] = []
    problems: list[str] = []
    too_long, shortest = 0, 0
    for row in rows:
        try:
            item = encode(row.content, tokenizer, ends)
        except RowRejected as error:
            problems.append(f"{row.place}: {error}")
            continue
        if len(item.ids) > max_length:
            too_long += 1
            shortest = min(shortest or len(item.ids), len(item.ids))
        else:
            encoded.append(item)
    if problems:
        raise DataInvalid(problems)
    if not encoded:
        raise DataUnusable(
            f"all {len(rows)} rows are longer than max_length {max_length} tokens; the shortest has {shortest}"
        )
    return EncodedRows(tuple(encoded), too_long)


class RowRejected(Exception):
    """The chat template raised an error on this row; gathered by `encode_rows`."""


def encode(content: Content, tokenizer: Any, ends: Collection[int]) -> Encoded:
    if isinstance(content, Completion):
        return encode_completion(content, tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    for piece in chat_pieces(content, tokenizer):
        tokens = tokenizer.encode(piece.text, add_special_tokens=False)
        ids += tokens
        labels += learn_to_stop(tokens, tokenizer, ends) if piece.learnt else [IGNORED] * len(tokens)
    return Encoded(tuple(ids), tuple(labels))


def encode_completion(content: Completion, tokenizer: Any) -> Encoded:
    """A prompt as `/v1/completions` would tokenize it, then the completion and the end of the text."""
    if tokenizer.eos_token_id is None:
        raise TemplateUnfit("the base's tokenizer has no end-of-text token, so a completion could not learn to end")
    prompt = tokenizer.encode(content.prompt, add_special_tokens=True)
    learnt = [*tokenizer.encode(content.completion, add_special_tokens=False), tokenizer.eos_token_id]
    if not prompt:
        raise RowRejected("the prompt has no tokens, and this tokenizer begins no text with one")
    return Encoded((*prompt, *learnt), (*[IGNORED] * len(prompt), *learnt))


def learn_to_stop(tokens: Sequence[int], tokenizer: Any, ends: Collection[int]) -> list[int]:
    """Label an answer up to its last end-of-turn token: a newline that the template writes after it is not learnt."""
    length = next((i for i in range(len(tokens), 0, -1) if tokens[i - 1] in ends), None)
    if length is None:
        raise TemplateUnfit(
            "the base's chat template writes no end-of-turn token after an answer "
            f"(one ends in {tokenizer.decode(list(tokens)[-8:])!r}), so an adapter could not learn to stop"
        )
    return [*tokens[:length], *[IGNORED] * (len(tokens) - length)]


def chat_pieces(chat: Chat, tokenizer: Any) -> tuple[Piece, ...]:
    """Render a chat and cut it into what is asked and what is learnt."""
    if tokenizer.chat_template is None:
        raise TemplateUnfit(
            "the base has no chat template, so 'messages' cannot be rendered; give prompt and completion"
        )
    cuts = extension_cuts(chat, tokenizer)
    if cuts is None:
        cuts = marker_cuts(chat, tokenizer)
    whole, spans = cuts
    pieces: list[Piece] = []
    at = 0
    for start, end in spans:
        pieces += [Piece(whole[at:start], learnt=False), Piece(whole[start:end], learnt=True)]
        at = end
    pieces.append(Piece(whole[at:], learnt=False))
    return tuple(piece for piece in pieces if piece.text)


Cuts = tuple[str, list[tuple[int, int]]]


def extension_cuts(chat: Chat, tokenizer: Any) -> Cuts | None:
    """Find each answer as what the template adds to the rendered question; None where it does not render so."""
    messages = chat.messages
    whole = render(messages, tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        asked = render(messages[:i], tokenizer, add_generation_prompt=True)
        answered = whole if i + 1 == len(messages) else render(messages[: i + 1], tokenizer)
        if not (answered.startswith(asked) and whole.startswith(answered)):
            return None
        spans.append((len(asked), len(answered)))
    return whole, spans


def marker_cuts(chat: Chat, tokenizer: Any) -> Cuts:
    """Find the answers by the {% generation %} markers of the template, or of TRL's for the same family."""
    from transformers.utils.chat_template_utils import render_jinja_template
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = tokenizer.chat_template
    if not has_generation_markers(template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            raise TemplateUnfit(
                "the base's chat template does not render a conversation as an extension of its beginning and has no "
                "{% generation %} markers, so the assistant's tokens cannot be told apart; give prompt and completion"
            ) from None
    rendered, marked = render_jinja_template(
        [as_dicts(chat.messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return rendered[0], [(start, end) for start, end in marked[0]]


def render(messages: Iterable[Message], tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                as_dicts(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except TemplateError as error:
        raise RowRejected(f"the base's chat template refuses it: {error}") from None


def as_dicts(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
