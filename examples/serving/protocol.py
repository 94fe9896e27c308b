"""OpenAI's JSON: what a request may ask for, and how answers and errors look.

Fields that would change the answer and that this service does not know are refused,
also those of messages, since to ignore them would be to answer another question.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.serving.jobs import End

ROLES = "system", "user", "assistant"
MARKS = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
"""The tokens that structure a conversation; no message may contain them."""
IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key"}
"""Fields that cannot change an answer."""
FIXED = {
    "n": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "response_format": {"type": "text"},
    "stop": None,
    "tool_choice": "none",
}
"""Fields that may be given if they ask for what this service does anyway."""


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: The HTTP status.
        message: What was expected, and what was given.
        code: OpenAI's word for it.
        param: The field that is wrong.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        told = {"message": str(self), "type": kind}
        return {"error": told | {"param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Wanted:
    """A request whose fields are all valid.

    Attributes:
        model: The name of an adapter, or of the base.
        turns: (role, text) of each message.
        max_tokens: The largest number of new tokens, if the request says it.
        temperature: 0 takes the likeliest token.
        seed: The seed of the random numbers, if the request has one.
        stream: Whether to send each token when it is there.
        include_usage: Whether a stream ends with the number of tokens.
    """

    model: str
    turns: Sequence[tuple[str, str]]
    max_tokens: int | None
    temperature: float
    seed: int | None
    stream: bool
    include_usage: bool

    def text(self) -> str:
        """The conversation in SmolLM2's chat format, up to the answer."""
        turns = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in self.turns]
        return "".join([*turns, "<|im_start|>assistant\n"])


def parse(body: bytes) -> Wanted:
    """What a request asks for.

    Raises:
        Refusal: It is not JSON, or a field is wrong or not supported.
    """
    try:
        given = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _wrong(f"the body must be UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise _wrong(f"the body must be JSON: {error}") from None
    if not isinstance(given, dict):
        raise _wrong(f"the body must be an object, got {_told(given)}")
    fields = _given(given)
    for name, value in FIXED.items():
        if name in fields and fields.pop(name) != value:
            raise _wrong(f"{name} must be {json.dumps(value)} or left out", name)
    stream = _take(fields, "stream", bool, False)
    options = _given(_take(fields, "stream_options", dict, {}))
    include_usage = _take(options, "include_usage", bool, False)
    _refuse_others(options, " in stream_options")
    limits = [
        _whole(fields, f"max{middle}_tokens", 1) for middle in ("", "_completion")
    ]
    temperature = _take(fields, "temperature", (int, float), 1.0)
    if not 0 <= temperature <= 2:
        told = f"temperature must be from 0 to 2, got {temperature}"
        raise _wrong(told, "temperature")
    wanted = Wanted(
        model=_text(_take(fields, "model", str, None), "model"),
        turns=_turns(_take(fields, "messages", list, None)),
        max_tokens=next((n for n in limits if n is not None), None),
        temperature=float(temperature),
        seed=_whole(fields, "seed", 0),
        stream=stream,
        include_usage=include_usage,
    )
    _refuse_others(fields.keys() - IGNORED)
    return wanted


def _wrong(message: str, param: str | None = None) -> Refusal:
    return Refusal(400, message, "invalid_request", param)


def _told(value: Any) -> str:
    """A value of JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 64 else f"{text[:61]}..."


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an object that are not null, which is the same as to leave them out."""
    return {name: value for name, value in fields.items() if value is not None}


def _refuse_others(names: Iterable[str], where: str = "") -> None:
    """Refuse the fields of an object that are not known."""
    if unknown := sorted(names):
        told = f"this service does not support {', '.join(map(_told, unknown))}{where}"
        raise _wrong(told, _told(unknown[0]).strip('"'))


def _take(fields: dict[str, Any], name: str, kind: Any, default: Any) -> Any:
    """A field of a type, which is taken out; None as `default` asks for the field."""
    value = fields.pop(name, default)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:  # True is an int to Python, and not to JSON
        names = " or ".join(one.__name__ for one in kinds)
        raise _wrong(f"{name} must be of type {names}, got {_told(value)}", name)
    return value


def _whole(fields: dict[str, Any], name: str, least: int) -> int | None:
    if name not in fields:
        return None
    number = _take(fields, name, int, None)
    if not least <= number < 2**31:
        raise _wrong(f"{name} must be from {least} to 2^31 - 1, got {number}", name)
    return number


def _turns(messages: Sequence[Any]) -> list[tuple[str, str]]:
    if not messages:
        raise _wrong("messages must not be empty", "messages")
    found = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _wrong(f"{where} must be an object, got {_told(message)}", where)
        message = _given(message)
        role, content = message.pop("role", None), message.pop("content", None)
        _refuse_others(message, f" in {where}")
        if role not in ROLES:
            told = f"{where}.role must be one of {', '.join(ROLES)}, got {_told(role)}"
            raise _wrong(told, where)
        parts = content if isinstance(content, list) else [content]
        texts = [
            part["text"]
            if isinstance(part, dict) and part.get("type") == "text" and "text" in part
            else part
            for part in parts
        ]
        text = "".join(_text(text, f"{where}.content") for text in texts)
        # A mark may be in two parts.
        found.append((role, _text(text, f"{where}.content")))
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(f"{name} must be a text, got {_told(value)}", name)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write halves of characters
        raise _wrong(f"{name} must not contain surrogates", name) from None
    for mark in MARKS:
        if mark in value:
            raise _wrong(f"{name} must not contain {mark}", name)
    return value


@dataclass
class Answer:
    """What a model says to one request, in OpenAI's words.

    Attributes:
        model: The name in the request.
        prompt: The number of tokens of the prompt.
        said: The number of new tokens.
    """

    model: str
    prompt: int
    said: int = 0
    _id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    _created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, end: End) -> dict[str, Any]:
        """The answer at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None}
        choices = [choice | {"finish_reason": end.value}]
        return self._of("chat.completion", choices) | {"usage": self._usage()}

    def piece(self, delta: Mapping[str, str], end: End | None = None) -> dict[str, Any]:
        """A part of a stream: what is new, or the end."""
        reason = None if end is None else end.value
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._of("chat.completion.chunk", [choice])

    def usage(self) -> dict[str, Any]:
        """The part of a stream that says how many tokens there were."""
        return self._of("chat.completion.chunk", []) | {"usage": self._usage()}

    def _of(self, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
        told = {"id": self._id, "object": kind, "created": self._created}
        return told | {"model": self.model, "choices": choices}

    def _usage(self) -> dict[str, int]:
        counts = {"prompt_tokens": self.prompt, "completion_tokens": self.said}
        return counts | {"total_tokens": self.prompt + self.said}


def models(base: str, adapters: Sequence[str]) -> dict[str, Any]:
    """The list of what can be asked for."""
    told = {"object": "model", "created": 0}
    entries = [told | {"id": base, "owned_by": "base"}]
    entries += [
        told | {"id": a, "owned_by": "adapter", "parent": base} for a in adapters
    ]
    return {"object": "list", "data": entries}
