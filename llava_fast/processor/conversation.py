"""Conversations to tokens: the published templates, what is learned in each, and the open prompt for generation.

A conversation becomes a list of pieces (text, special tokens, images). Every run of text between special tokens and
images is tokenized once, and labels follow from where each token starts, so prompt and labels can never disagree.

Sources: the templates and ``mask="official"`` follow the authors' ``llava/conversation.py`` and
``llava/train/train.py``; ``mask="answers"`` and ``image_position="random"`` are equations 3 and 2 of "Visual
Instruction Tuning".
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from llava_fast.config import IGNORE, IMAGE_SENTINEL
from llava_fast.errors import ConfigError, LlavaError, SampleError
from llava_fast.processor.tokenizer import Tokenizer

IMAGE_MARK = "<image>"  # marks the place of an image in the LLaVA JSON
MASKS = ("answers", "official")
POSITIONS = ("as_written", "first", "random")


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written out. Every string is exact to the character.

    A round is ``first`` or ``later``, the question, ``open``, then, learned: ``lead``, the answer, ``stop`` and EOS.
    """

    system: str = ""
    system_frame: str = "{system}"  # what surrounds a system text; an empty system text leaves it out
    first: str = ""  # before the first question; "{system}" is the framed system text
    later: str = ""  # before every other question
    open: str = ""  # after a question: the prompt for generation ends here
    lead: str = " "  # between prompt and answer; an empty answer has none
    stop: str = ""
    eos: bool = False  # whether EOS follows the stop
    bos_each_round: bool = False
    end: str = ""  # after the last round, not learned
    image_frame: tuple[str, str] = ("", "")  # text around every image
    drops_question: bool = False  # the prompt is the image alone


_V0 = Template(
    system="A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    system_frame="{system}\n\n",
    first="{system}### Human: ",
    later=" Human: ",
    open="\n### Assistant:",
    stop="\n###",
    end=" ",
)
_V1 = Template(
    system=_V0.system.replace("human", "user"),
    system_frame="{system} ",
    first="{system}USER: ",
    later="USER: ",
    open=" ASSISTANT:",
    eos=True,
)
_LLAVA_LLAMA_2 = Template(
    system="You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.",
    system_frame="<<SYS>>\n{system}\n<</SYS>>\n\n",
    first="[INST] {system}",
    later="[INST] ",
    open=" [/INST]",
    stop=" ",
    eos=True,
    bos_each_round=True,
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MMTAG = {
    "system": "A chat between a curious user and an artificial intelligence assistant. The assistant is able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks using natural "
    "language.The visual content will be provided with the following format: <Image>visual content</Image>.",
    "image_frame": ("<Image>", "</Image>"),
}


def _variant(template: Template, **changes: Any) -> Template:
    return Template(**{**vars(template), **changes})


TEMPLATES: dict[str, Template] = {
    "plain": Template(lead="", stop="\n", drops_question=True),
    "v0": _V0,
    "v1": _V1,
    "llava_v1": _variant(_V1, system=_V0.system),  # the authors train v1 and serve with this system text
    "llama_2": _variant(_LLAVA_LLAMA_2, system=_LLAMA_2_SYSTEM),
    "llava_llama_2": _LLAVA_LLAMA_2,
    "v0_mmtag": _variant(_V0, **_MMTAG),
    "v1_mmtag": _variant(_V1, **_MMTAG),
}


class Text(NamedTuple):
    """Text that is tokenized as it stands."""

    text: str
    trained: bool = False


class Special(NamedTuple):
    """A special token, by id."""

    token_id: int
    trained: bool = False


class ImagePiece(NamedTuple):
    """The place of one image."""


Piece = Text | Special | ImagePiece


class Round(NamedTuple):
    """A question, as the texts around its images (one more than images), and its answer (None: still to come)."""

    question: list[str]
    answer: str | None


@dataclass
class EncodedText:
    """Tokens of one conversation, before images are expanded.

    Attributes:
        input_ids: n token ids; ``IMAGE_SENTINEL`` (-200) once for each image.
        labels: n labels, NOT shifted: the token id where it is learned, ``IGNORE`` (-100) elsewhere.
    """

    input_ids: list[int]
    labels: list[int]


def find_template(name: str) -> Template:
    """The template called ``name``.

    Raises:
        ConfigError: no template has that name.
    """
    _one_of("template", name, tuple(TEMPLATES))
    return TEMPLATES[name]


def encode_conversation(
    turns: Sequence[dict[str, str]],
    tokenizer: Tokenizer,
    template: str,
    *,
    mask: str = "answers",
    image_position: str = "as_written",
    rng: Random | None = None,
    num_images: int | None = None,
    sample_id: str = "?",
) -> EncodedText:
    """Tokenize a training conversation and mark what is learned.

    Args:
        turns: ``[{"from": "human"|"gpt", "value": str}, ...]``, alternating, human first, gpt last.
        tokenizer: the tokenizer of the language model.
        template: a name in :data:`TEMPLATES`.
        mask: ``"answers"`` learns the answers and the stop that ends each, nothing else (the paper's equation 3), and
            never takes text for special tokens; ``"official"`` gives what the authors' training code gives, token for
            token, and with it samples that are ignored as a whole where its lengths do not add up.
        image_position: ``"as_written"`` keeps the ``<image>`` marks where they are; ``"first"`` moves them before the
            text of their turn; ``"random"`` draws before or after for the first turn (the paper's equation 2).
        rng: draws the random position.
        num_images: images of the sample. Without it every mark in a human turn is an image; with 0 marks are text; a
            sample with images but no mark gets them in its first turn.
        sample_id: names the sample in errors.

    Raises:
        ConfigError: an unknown template, mask or position, or ``"random"`` without ``rng``.
        SampleError: turns out of order or without text; marks and images that disagree in number.
    """
    form = find_template(template)
    _one_of("mask", mask, MASKS)
    _one_of("image_position", image_position, POSITIONS)
    if image_position == "random" and rng is None:
        raise ConfigError("image_position='random' needs rng, a random.Random seeded for this sample")
    questions, answers = _split_turns(turns, sample_id)
    marked = questions + answers if mask == "official" else questions  # the authors' code finds marks everywhere
    questions, has_images = _place_images(questions, marked, num_images, image_position, rng, sample_id)
    if form.drops_question:
        if len(questions) != 1 or not has_images:
            raise SampleError(
                sample_id,
                f"template {template!r} drops the question and so takes one round with an image, not "
                f"{len(questions)} with{'' if has_images else 'out'}; use another template or leave the sample out",
            )
        questions = [IMAGE_MARK * questions[0].count(IMAGE_MARK)]
    if mask == "official":
        return _encode_official(form, questions, answers, has_images, tokenizer)
    split = (question.split(IMAGE_MARK) if has_images else [question] for question in questions)
    rounds = [Round(question, answer) for question, answer in zip(split, answers, strict=True)]
    return encode_pieces(render(form, rounds, tokenizer), tokenizer)


def encode_prompt(
    messages: Sequence[dict[str, Any]], tokenizer: Tokenizer, template: str
) -> tuple[EncodedText, list[Any]]:
    """Tokenize messages up to the point where the assistant speaks; nothing is learned.

    The ids are a prefix of what :func:`encode_conversation` gives for the same conversation with an answer.

    Args:
        messages: OpenAI form: an optional ``system`` message, which replaces the template's system text, then ``user``
            and ``assistant`` in turn, ``user`` last. Content is text or a list of ``{"type": "text", "text": ...}`` and
            ``{"type": "image", "image": ...}`` parts, whose order is kept, a newline between two. Images are only in
            user messages, and only as parts: ``<image>`` in a text is text.

    Returns:
        The tokens, and the image sources in the order in which they occur.

    Raises:
        ConfigError: an unknown template.
        LlavaError: messages that are out of order or malformed.
    """
    form = find_template(template)
    messages = list(messages)
    system = None
    if messages and messages[0].get("role") == "system":
        system = _text_only(messages.pop(0))
    images: list[Any] = []
    rounds: list[Round] = []
    for n, message in enumerate(messages):
        expected = "assistant" if n % 2 else "user"
        if message.get("role") != expected:
            raise LlavaError(
                f"message {n} after the system message has role {message.get('role')!r} where {expected!r} must stand; "
                f"user and assistant take turns, user first"
            )
        if expected == "user":
            question, found = _split_content(message)
            rounds.append(Round(question, None))
            images += found
        else:
            rounds[-1] = rounds[-1]._replace(answer=_text_only(message))
    if not rounds or rounds[-1].answer is not None:
        raise LlavaError("there is nothing to answer: the last message must have role 'user'")
    if form.drops_question:
        if len(rounds) != 1 or not images:
            raise LlavaError(f"template {template!r} captions images: it takes one user message with an image")
        rounds = [Round([""] * (len(images) + 1), None)]
    encoded = encode_pieces(render(form, rounds, tokenizer, system), tokenizer)
    return encoded, images


def render(form: Template, rounds: Sequence[Round], tokenizer: Tokenizer, system: str | None = None) -> list[Piece]:
    """Write rounds out as pieces; ``system`` replaces the template's system text, and the empty one leaves it out."""
    bos = [] if tokenizer.bos_id is None else [Special(tokenizer.bos_id)]
    before, after = form.image_frame
    system = form.system if system is None else system
    framed = form.system_frame.replace("{system}", system) if system else ""
    pieces: list[Piece] = [*bos]
    for n, (question, answer) in enumerate(rounds):
        if n and form.bos_each_round:
            pieces += bos
        pieces.append(Text(form.later if n else form.first.replace("{system}", framed)))
        pieces.append(Text(question[0]))
        for text in question[1:]:
            pieces += (Text(before), ImagePiece(), Text(after + text))
        pieces.append(Text(form.open))
        if answer is None:
            return pieces
        pieces.append(Text((form.lead + answer if answer else "") + form.stop, trained=True))
        if form.eos:
            pieces.append(Special(tokenizer.eos_id, trained=True))
    pieces.append(Text(form.end))
    return pieces


def encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer) -> EncodedText:
    """Tokenize each run of text between special tokens and images once; label the tokens that start in trained text."""
    ids: list[int] = []
    labels: list[int] = []
    text = ""
    spans: list[tuple[int, int]] = []  # trained character ranges of `text`
    prefix = True  # the first text and the text after an image get the dummy prefix

    def flush() -> None:
        nonlocal text, spans
        new_ids, starts = tokenizer.encode(text, prefix=prefix)
        new_labels = [IGNORE] * len(new_ids)
        for begin, end in spans:
            found = slice(bisect_left(starts, begin), bisect_left(starts, end))
            new_labels[found] = new_ids[found]
        ids.extend(new_ids)
        labels.extend(new_labels)
        text, spans = "", []

    for piece in pieces:
        if isinstance(piece, Text):
            if piece.trained:
                spans.append((len(text), len(text) + len(piece.text)))
            text += piece.text
            continue
        flush()
        if isinstance(piece, Special):
            prefix = tokenizer.legacy or not ids
            ids.append(piece.token_id)
            labels.append(piece.token_id if piece.trained else IGNORE)
        else:
            prefix = True
            ids.append(IMAGE_SENTINEL)
            labels.append(IGNORE)
    flush()
    return EncodedText(ids, labels)


def _split_turns(turns: Sequence[dict[str, str]], sample_id: str) -> tuple[list[str], list[str]]:
    """Questions and answers, after checking that they take turns."""
    for n, turn in enumerate(turns):
        expected = "gpt" if n % 2 else "human"
        if not isinstance(turn, dict) or turn.get("from") != expected:
            found = turn.get("from") if isinstance(turn, dict) else turn
            raise SampleError(
                sample_id, f"turn {n} is from {found!r} where {expected!r} must stand; human and gpt take turns"
            )
        if not isinstance(turn.get("value"), str):
            raise SampleError(sample_id, f"turn {n} has value {turn.get('value')!r}, which is not text; give a string")
    if not turns or len(turns) % 2:
        raise SampleError(sample_id, f"{len(turns)} turns do not end with an answer; the last turn must be from 'gpt'")
    return [turn["value"] for turn in turns[::2]], [turn["value"] for turn in turns[1::2]]


def _place_images(
    questions: list[str],
    marked: list[str],
    num_images: int | None,
    position: str,
    rng: Random | None,
    sample_id: str,
) -> tuple[list[str], bool]:
    """Questions with their marks where ``position`` wants them, and whether marks are images at all."""
    marks = 0 if num_images == 0 else sum(text.count(IMAGE_MARK) for text in marked)
    if num_images is None:
        num_images = marks
    if not num_images:
        return questions, False
    if not marks:
        questions = [IMAGE_MARK * num_images + "\n" + questions[0], *questions[1:]]
        position = "first" if position == "as_written" else position
    elif marks != num_images:
        raise SampleError(
            sample_id, f"{marks} {IMAGE_MARK} marks but {num_images} images; give every image one mark, or none at all"
        )
    if position == "first":
        questions = [_move_images(question, before=True) for question in questions]
    elif position == "random":
        assert rng is not None
        questions = [_move_images(questions[0], before=rng.random() < 0.5), *questions[1:]]
    return questions, True


def _move_images(question: str, before: bool) -> str:
    """All marks of a question before or after its text, each on a line of its own."""
    marks = [IMAGE_MARK] * question.count(IMAGE_MARK)
    if not marks:
        return question
    text = question.replace(IMAGE_MARK, "").strip()
    return "\n".join([*marks, text] if before else [text, *marks]).strip()


def count_characters(messages: Sequence[dict[str, Any]]) -> int:
    """Characters of all texts in messages. What is malformed counts for nothing: :func:`encode_prompt` refuses it."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    texts = [text for text in (*contents, *(part.get("text") for part in parts)) if isinstance(text, str)]
    return sum(map(len, texts))


def _split_content(message: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """The texts around the images of a message, and the images."""
    texts, images = [""], list[Any]()
    for n, part in enumerate(_parts(message)):
        if n:
            texts[-1] += "\n"
        if part["type"] == "text":
            texts[-1] += part["text"]
        else:
            images.append(part["image"])
            texts.append("")
    return texts, images


def _text_only(message: dict[str, Any]) -> str:
    texts, images = _split_content(message)
    if images:
        raise LlavaError(f"a message with role {message['role']!r} holds an image; put images into user messages")
    return texts[0]


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content parts of a message, checked, without empty texts."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise LlavaError(
            f"content of a {message.get('role')!r} message is {type(content).__name__}; give text or a list of parts"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image") or kind not in part or (kind == "text" and not isinstance(part["text"], str)):
            raise LlavaError(
                f"content part {part!r:.80} is not understood; use {{'type': 'text', 'text': ...}} or "
                f"{{'type': 'image', 'image': ...}}"
            )
    return [part for part in content if part != {"type": "text", "text": ""}]


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{what}={value!r} is not known; choose one of {', '.join(allowed)}")


# mask="official": what the authors' training code computes. It measures parts of a conversation by tokenizing each
# again, and drops a sample when the lengths do not add up; the slow tokenizer it uses parses special tokens in text.


def _encode_official(
    form: Template, questions: list[str], answers: list[str], has_images: bool, tokenizer: Tokenizer
) -> EncodedText:
    if has_images:
        questions = [q.replace(IMAGE_MARK, IMAGE_MARK.join(form.image_frame)) for q in questions]
    slow = _SlowTokenizer(tokenizer, has_images)
    if form.drops_question:
        ids = slow.ids(questions[0] + answers[0] + form.stop)
        return EncodedText(ids, _ignore(list(ids), 0, len(slow.ids(questions[0]))))
    if form.bos_each_round:
        return _official_rounds(slow, _official_llama_2(form, questions, answers), "[/INST] ", merges_eos=False)
    if form.eos:
        return _official_rounds(slow, _official_v1(form, questions, answers), " ASSISTANT: ", merges_eos=True)
    return _official_v0(slow, form, questions, answers)


def _official_v0(slow: _SlowTokenizer, form: Template, questions: list[str], answers: list[str]) -> EncodedText:
    """All but the header and the human turns is learned, ``###`` and the assistant's name too."""
    header = form.system_frame.replace("{system}", form.system)
    turns = []
    for question, answer in zip(questions, answers, strict=True):
        turns += [f"### Human: {question}\n", f"### Assistant: {answer}\n"]
    ids = slow.ids(header + "".join(turns) + "### ")
    place = len(slow.ids(header))
    labels = _ignore(list(ids), 0, place)
    for n, turn in enumerate(turns):
        length = len(slow.ids(turn))
        if n % 2 == 0:
            _ignore(labels, place + 2, place + length)  # the two tokens of ### are learned
        place += length
    return EncodedText(ids, labels)


def _official_v1(form: Template, questions: list[str], answers: list[str]) -> str:
    text = form.system_frame.replace("{system}", form.system)
    for question, answer in zip(questions, answers, strict=True):  # an empty message is an open turn
        text += f"USER: {question} " if question else "USER:"
        text += f"ASSISTANT: {answer}</s>" if answer else "ASSISTANT:"
    return text


def _official_llama_2(form: Template, questions: list[str], answers: list[str]) -> str:
    questions = [form.system_frame.replace("{system}", form.system) + questions[0], *questions[1:]]
    text = ""
    for question, answer in zip(questions, answers, strict=True):  # an empty message is left out
        text += f"<s>[INST] {question} [/INST]" if question else ""
        text += f" {answer} </s>" if answer else ""
    return text.removeprefix("<s>")


def _official_rounds(slow: _SlowTokenizer, text: str, separator: str, merges_eos: bool) -> EncodedText:
    """Rounds end with ``</s>``; in each, what follows ``separator`` is learned.

    A round that is tokenized alone has a BOS, which stands for its ``</s>``. Where the tokenizer puts no dummy prefix
    after ``</s>`` (``merges_eos`` and not legacy), a later round is one token longer alone than in its place.
    """
    ids = slow.ids(text)
    labels = _ignore(list(ids), 0, 1)
    place = 1
    for n, part in enumerate(text.split("</s>")):
        halves = part.split(separator)
        if not part or len(halves) != 2:
            break
        surplus = int(merges_eos and n > 0 and not slow.tokenizer.legacy)
        asked = len(slow.ids(halves[0] + separator)) - 2 - surplus
        _ignore(labels, place, place + asked)
        place += len(slow.ids(part)) - surplus
    counted = sum(i != slow.tokenizer.pad_id for i in ids)
    return EncodedText(ids, _ignore(labels, place if place == counted else 0, len(ids)))


def _ignore(labels: list[int], begin: int, end: int) -> list[int]:
    """Set ``labels[begin:end]`` to IGNORE, in place."""
    end = min(end, len(labels))
    labels[begin:end] = [IGNORE] * max(0, end - begin)
    return labels


class _SlowTokenizer:
    """The slow transformers tokenizer: BOS first, special tokens parsed out of text, and each image a cut."""

    def __init__(self, tokenizer: Tokenizer, has_images: bool):
        self.tokenizer = tokenizer
        self._has_images = has_images
        tokens = [token for token in tokenizer.special_tokens if token != IMAGE_MARK]
        self._specials = re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")

    def ids(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_id
        ids = [] if bos is None else [bos]
        for n, chunk in enumerate(text.split(IMAGE_MARK) if self._has_images else [text]):
            if n:
                ids.append(IMAGE_SENTINEL)
            for k, part in enumerate(self._specials.split(chunk)):  # text, token, text, ...
                if k % 2:
                    ids.append(self.tokenizer.special_tokens[part])
                else:
                    ids += self.tokenizer.encode(part, prefix=self.tokenizer.legacy or k == 0)[0]
        return ids
