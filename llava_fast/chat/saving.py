"""A conversation as JSON: the LLaVA form, which ``llava_fast.train`` reads, or messages in OpenAI form."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llava_fast.chat.conversation import Conversation
from llava_fast.errors import ConfigError
from llava_fast.processor.conversation import IMAGE_MARK

FORMS = ("llava", "messages")


def save(conversation: Conversation, path: Path, form: str) -> None:
    """Write ``conversation`` to ``path``, whole or not at all.

    Raises:
        ConfigError: there is nothing to save, the form cannot hold it, or the file cannot be written.
    """
    if not conversation.turns:
        raise ConfigError("there is nothing to save yet: ask something first")
    content = llava_form(conversation, path.stem) if form == "llava" else messages_form(conversation)
    # A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape.
    raw = json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace") + b"\n"
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def llava_form(conversation: Conversation, name: str) -> list[dict[str, Any]]:
    """A list of one sample; ``<image>`` marks the places of its pictures.

    Raises:
        ConfigError: a text of a conversation with pictures holds that mark itself.
    """
    pictures = [picture.name for turn in conversation.turns for picture in turn.pictures]
    if pictures and any(IMAGE_MARK in turn.question for turn in conversation.turns):
        raise ConfigError(f"a question holds {IMAGE_MARK}, the LLaVA form's mark of a picture; /save messages FILE")
    said = []
    for turn in conversation.turns:
        marks = f"{IMAGE_MARK}\n" * len(turn.pictures)
        said += [{"from": "human", "value": marks + turn.question}, {"from": "gpt", "value": turn.answer}]
    images = {"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {}
    return [{"id": name, **images, "conversations": said}]


def messages_form(conversation: Conversation) -> dict[str, Any]:
    """``{"messages": [...]}``, where an image part has the name of the picture."""
    names = iter([picture.name for turn in conversation.turns for picture in turn.pictures])
    messages = conversation.messages()
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [{**p, "image": next(names)} if "image" in p else p for p in message["content"]]
    return {"messages": messages}
