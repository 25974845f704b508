"""What one row of a data file says: which schema it is in, and which of its pieces are trained on."""

from __future__ import annotations

import json


class BadRow(ValueError):
    """Why a row cannot be trained on; counted, never fatal alone."""


#: role (for the template), text, trained on
Piece = tuple[str, str, bool]

ANSWERS = frozenset({"assistant", "gpt", "model", "chatgpt", "bot"})
COLUMNS = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text",
)  # fmt: skip
#: what only a rendered template contains
RENDERED = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]")


def pieces_of(row: object) -> tuple[str, list[Piece], bool]:
    """The schema of a row, its pieces of text in order, and whether a chat template wraps them.

    Trained on: the assistant's turns of a chat, a completion, all of a plain text.

    >>> pieces_of({"prompt": "2+2=", "completion": "4"})
    ('prompt_completion', [('user', '2+2=', False), ('assistant', '4', True)], False)
    """
    if not isinstance(row, dict):
        raise BadRow(f"expected a JSON object, got {type(row).__name__}")
    chat, get = True, row.get
    if (messages := get("messages")) is not None:
        schema, pieces = "messages", _turns(messages, "role", "content")
    elif (turns := get("conversations")) is not None:
        schema, pieces = "conversations", _turns(turns, "from", "value")
    elif get("prompt") is not None and get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        schema, chat = "prompt_completion", isinstance(prompt, list)
        if isinstance(completion, list) is not chat:
            raise BadRow("prompt and completion must both be strings or both be message lists")
        if chat:
            asked = [(role, text, False) for role, text, _ in _turns(prompt, "role", "content")]
            pieces = asked + [(role, text, True) for role, text, _ in _turns(completion, "role", "content")]
        else:
            pieces = [("user", _text(prompt, "prompt"), False)]
            pieces.append(("assistant", _text(completion, "completion"), True))
    elif get("instruction") is not None and get("output") is not None:
        question = _text(row["instruction"], "instruction")
        if get("input"):
            question += "\n\n" + _text(row["input"], "input")
        answer = _text(row["output"], "output")
        schema, pieces = "instruction", [("user", question, False), ("assistant", answer, True)]
    elif get("text") is not None:
        schema, chat, pieces = "text", False, [("text", _text(row["text"], "text"), True)]
    else:
        found = ", ".join(repr(str(key)[:30]) for key in list(row)[:5]) or "no keys"
        raise BadRow(f"unknown schema: {found}")
    for _, text, trained in pieces:
        if trained and text:
            return schema, pieces, chat
    if any(trained for _, _, trained in pieces):
        raise BadRow("nothing to train on: the text to learn is empty")
    raise BadRow("no assistant turn")


def _turns(turns: object, role_key: str, text_key: str) -> list[Piece]:
    if not isinstance(turns, list):
        raise BadRow(f"expected a list of messages, got {type(turns).__name__}")
    pieces = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRow(f"expected a message object, got {type(turn).__name__}")
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or not role.isascii():
            raise BadRow(f"a message without a {role_key!r} in plain letters")
        if text.__class__ is not str:
            text = _content(text, text_key)
        if turn.get("tool_calls"):  # no two templates write them alike; their JSON is close
            text += json.dumps(turn["tool_calls"], ensure_ascii=False, default=str)
        trained = role in ANSWERS
        pieces.append(("assistant" if trained else role, text, trained))
    return pieces


def _content(content: object, key: str) -> str:
    """The text of a message's content: null beside tool calls, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                raise BadRow(f"{key} holds a part that is not text: only text is counted")
            parts.append(_text(part.get("text"), key))
        return "".join(parts)
    return _text(content, key)


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{key}: expected text, got {type(value).__name__}")
    return value
