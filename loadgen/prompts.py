"""Request bodies: synthetic prompts of a given length, fixed by the plan, cheap to make.

A word is about a token. Unless requests share a prefix group or a session, every prompt begins
differently, so that no prefix cache answers for the engine.
"""

from __future__ import annotations

import json

from loadgen.plan import Plan
from loadgen.target import Target

_TEXT = (
    "the service keeps its promise when one zone is lost and the others carry on as if nothing had happened while "
    "people wait for an answer that must arrive in time because every second of silence costs trust which is slow "
    "to earn and quick to lose so we test what we hope and measure what we claim before the night decides for us "
)
_WORDS = _TEXT.split()


class Filler:
    """`words(n)` is n words; slices of one string, grown on demand."""

    def __init__(self) -> None:
        self._ends = [0]
        self._text = ""

    def words(self, count: int) -> str:
        while len(self._ends) <= count:
            at = len(self._text)
            for word in _WORDS:
                at += len(word) + 1
                self._ends.append(at)
            self._text += _TEXT
        return self._text[: self._ends[count]]


class Writer:
    """Bodies without a plan: one prompt of a given length, begun by words of its own."""

    def __init__(self, target: Target) -> None:
        self._model = target.model
        self._filler = Filler()

    def body(self, api: str, begin: str, prompt: int, output: int) -> bytes:
        text = f"{begin} {self._filler.words(max(0, prompt - 1))}"
        said: dict[str, object] = {"prompt": text}
        if api == "chat":
            said = {"messages": [{"role": "user", "content": text}]}
        options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        return json.dumps({"model": self._model, **said, "max_tokens": output, **options}).encode()


class Bodies:
    """Makes the body of request `seq` of a plan."""

    def __init__(self, plan: Plan, target: Target) -> None:
        self._plan = plan
        self._filler = Filler()
        self._starts: list[bytes] = []
        self._ends: list[bytes] = []
        for cls in plan.classes:
            tail: dict[str, object] = {"temperature": 0, "stream": cls.stream}
            if cls.stream and plan.traffic.usage:
                tail["stream_options"] = {"include_usage": True}
            tail |= json.loads(cls.extra) if cls.extra else {}
            content = '"prompt":' if cls.api == "completions" else '"messages":'
            self._starts.append(f'{{"model":{json.dumps(target.model)},{content}'.encode())
            self._ends.append(b"," + json.dumps(tail, separators=(",", ":"))[1:].encode())
        self._answers: dict[int, str] = {}
        self._done: set[int] = set()  # sessions whose last turn is sent: nobody asks for their answers again
        self._turns: dict[int, list[int]] = {}
        for seq, session in enumerate(plan.session):
            if session >= 0:
                self._turns.setdefault(session, []).append(seq)

    def of(self, seq: int) -> bytes:
        plan = self._plan
        cls = plan.cls[seq]
        if plan.classes[cls].api == "completions":
            said = f'"{self._prompt(seq)}"'
        elif plan.turn[seq] == 0:
            said = f'[{{"role":"user","content":"{self._prompt(seq)}"}}]'
        else:
            said = self._talk(seq)
        limit = f',"max_tokens":{plan.output[seq]}'
        return self._starts[cls] + said.encode() + limit.encode() + self._ends[cls]

    def _prompt(self, seq: int) -> str:
        plan = self._plan
        count = plan.prompt[seq]
        group = plan.group[seq]
        if group < 0 or plan.turn[seq] > 0:
            return f"{plan.seed}-{seq} {self._filler.words(max(0, count - 1))}"
        shared = min(count - 1, plan.classes[plan.cls[seq]].prefix_tokens)
        own = max(0, count - shared - 1)
        return f"group {group} {self._filler.words(max(0, shared - 2))}{plan.seed}-{seq} {self._filler.words(own)}"

    def heard(self, seq: int, text: str) -> None:
        """The server's answer to `seq`, for the turns that follow it."""
        session = self._plan.session[seq]
        if session not in self._done and seq != self._turns[session][-1]:
            self._answers[seq] = json.dumps(text)

    def _talk(self, seq: int) -> str:
        """The session so far. Arrivals wait for nothing: where an answer is not there, the plan's text stands."""
        plan = self._plan
        parts: list[str] = []
        turns = self._turns[plan.session[seq]]
        for earlier in turns:
            parts.append(f'{{"role":"user","content":"{self._prompt(earlier)}"}}')
            if earlier == seq:
                break
            text = self._answers.get(earlier) or f'"{self._filler.words(plan.output[earlier])}"'
            parts.append(f'{{"role":"assistant","content":{text}}}')
        if seq == turns[-1]:
            self._done.add(plan.session[seq])
            for earlier in turns:
                self._answers.pop(earlier, None)
        return f"[{','.join(parts)}]"
