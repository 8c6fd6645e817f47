"""The part of the OpenAI API that the engine speaks: requests in, JSON out, errors as vLLM words them.

What the engine does not imitate (several choices, log-probabilities, tools, stop strings, guided output) is
answered with 400, never ignored.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

CHARS_PER_TOKEN = 4  # the usual rule of thumb for English

_SYLLABLES = [consonant + vowel for consonant in "bcdfglmnprstv" for vowel in "aeio"]


def _vocabulary() -> tuple[bytes, ...]:
    draw = random.Random(7)  # noqa: S311 - pseudo-text
    return tuple(
        (" " + "".join(draw.choices(_SYLLABLES, k=draw.choice((1, 1, 2, 2, 3))))).encode() for _ in range(1021)
    )


VOCABULARY = _vocabulary()


class Refused(Exception):
    """A request that the engine answers with an error: `code` is HTTP's, `param` the field at fault."""

    def __init__(self, message: str, code: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def body(self) -> bytes:
        kind = {404: "NotFoundError", 503: "ServiceUnavailableError"}.get(self.code, "BadRequestError")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for a generation, checked."""

    kind: Literal["chat", "text"]
    prompt: bytes
    max_tokens: int | None
    stream: bool
    include_usage: bool
    ignore_eos: bool
    min_tokens: int
    seed: int

    @property
    def prompt_tokens(self) -> int:
        return max(1, -(-len(self.prompt) // CHARS_PER_TOKEN))

    def hashes(self, block_size: int) -> list[int]:
        """One hash per full block of the prompt, each covering all before it."""
        width, value, found = block_size * CHARS_PER_TOKEN, 0, []
        for start in range(0, len(self.prompt) - width + 1, width):
            value = hash((value, self.prompt[start : start + width]))
            found.append(value)
        return found

    def words(self) -> Words:
        return Words(zlib.crc32(self.prompt, self.seed & 0xFFFFFFFF))


class Words:
    """An endless pseudo-text; the same seed and prompt give the same text."""

    __slots__ = ("_at", "_stride", "seed")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._at, self._stride = seed % len(VOCABULARY), 1 + seed // len(VOCABULARY) % (len(VOCABULARY) - 2)

    def next(self) -> bytes:
        self._at = (self._at * 5 + self._stride) % len(VOCABULARY)
        return VOCABULARY[self._at]

    def natural_length(self, mean: int) -> int:
        """After how many tokens the model would stop by itself: mean/2 … 3·mean/2."""
        return max(1, mean // 2 + self.seed // 7 % (mean + 1))


def parse(kind: Literal["chat", "text"], raw: bytes, model: str) -> Ask:
    """Check a request body. Raises Refused (400, or 404 for another model)."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as bad:
        raise Refused(f"The request body is not valid JSON: {bad}") from None
    if not isinstance(body, dict):
        raise Refused("The request body must be a JSON object.")
    wanted = body.get("model", model)
    if wanted != model:
        raise Refused(f"The model `{wanted}` does not exist.", 404, "model")
    _refuse_unsupported(body)
    stream = _typed(body, "stream", bool, default=False)
    options = body.get("stream_options")
    if options is not None and not stream:
        raise Refused("Stream options can only be defined when `stream=True`.", param="stream_options")
    newer = kind == "chat" and body.get("max_completion_tokens") is not None
    limit = "max_completion_tokens" if newer else "max_tokens"
    max_tokens = _whole(body, limit, least=1)
    _number(body, "temperature", 0, 2)
    _number(body, "top_p", 0, 1)
    return Ask(
        kind=kind,
        prompt=_chat_prompt(body) if kind == "chat" else _text_prompt(body),
        max_tokens=max_tokens if max_tokens is not None or kind == "chat" else 16,
        stream=stream,
        include_usage=bool(isinstance(options, dict) and options.get("include_usage")),
        ignore_eos=_typed(body, "ignore_eos", bool, default=False),
        min_tokens=_whole(body, "min_tokens", least=0) or 0,
        seed=_whole(body, "seed", least=-(1 << 63)) or 0,
    )


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1):
        raise Refused("This engine gives one choice: n must be 1.", param="n")
    for name in ("stop", "logprobs", "top_logprobs", "tools", "response_format", "echo", "prompt_logprobs"):
        if body.get(name):
            raise Refused(f"`{name}` is not supported by this engine.", param=name)


def _typed(body: Mapping[str, Any], name: str, kind: type[bool], *, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise Refused(f"`{name}` must be true or false, not {value!r}.", param=name)
    return value


def _whole(body: Mapping[str, Any], name: str, least: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise Refused(f"`{name}` must be a whole number of at least {least}, not {value!r}.", param=name)
    return value


def _number(body: Mapping[str, Any], name: str, least: float, most: float) -> None:
    value = body.get(name)
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(f"`{name}` must be between {least} and {most}, not {value!r}.", param=name)


def _chat_prompt(body: Mapping[str, Any]) -> bytes:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("`messages` must be a non-empty list.", param="messages")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused("Each message must be an object with a role.", param="messages")
        turns.append(f"<|{message['role']}|>\n{_content(message.get('content'))}\n")
    return ("".join(turns) + "<|assistant|>\n").encode(errors="replace")


def _content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise Refused("The content of a message must be a text or a list of text parts.", param="messages")


def _text_prompt(body: Mapping[str, Any]) -> bytes:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt.encode(errors="replace")
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) and 0 <= token < 1 << 32 for token in prompt):
        return b"".join(token.to_bytes(CHARS_PER_TOKEN, "little") for token in prompt)
    raise Refused("`prompt` must be one non-empty text or one list of token ids.", param="prompt")


class Writer:
    """The JSON of one answer. Every token costs one join of ready-made bytes."""

    def __init__(self, ask: Ask, model: str, ident: str, created: int) -> None:
        self._ask, self._model, self._created = ask, model, created
        chat = ask.kind == "chat"
        self._id = f"chatcmpl-{ident}" if chat else f"cmpl-{ident}"
        self._object = "chat.completion.chunk" if chat else "text_completion"
        self._head = (
            f'data: {{"id":"{self._id}","object":"{self._object}","created":{created},'
            f'"model":{orjson.dumps(model).decode()},"choices":'
        ).encode()
        opening = b'[{"index":0,"delta":{"content":"' if chat else b'[{"index":0,"text":"'
        self._before = self._head + opening
        self._after = b'"},"logprobs":null,"finish_reason":' if chat else b'","logprobs":null,"finish_reason":'

    def role(self) -> bytes:
        if self._ask.kind == "text":
            return b""
        return self._head + (
            b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        )

    def token(self, word: bytes, finish: str | None) -> bytes:
        reason = b'"' + finish.encode() + b'"' if finish else b"null"
        return self._before + word + self._after + reason + b"}]}\n\n"

    def end(self, generated: int) -> bytes:
        usage = b""
        if self._ask.include_usage:
            usage = self._head + b'[],"usage":' + orjson.dumps(self.usage(generated)) + b"}\n\n"
        return usage + b"data: [DONE]\n\n"

    def usage(self, generated: int) -> dict[str, int]:
        prompt = self._ask.prompt_tokens
        return {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}

    def whole(self, text: str, finish: str, generated: int) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        if self._ask.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return orjson.dumps(
            {
                "id": self._id,
                "object": "chat.completion" if self._ask.kind == "chat" else "text_completion",
                "created": self._created,
                "model": self._model,
                "choices": [choice | {"logprobs": None, "finish_reason": finish}],
                "usage": self.usage(generated),
            }
        )
