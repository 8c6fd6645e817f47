"""How an inference engine spends its time: continuous batching over a paged KV cache, after vLLM's V1 scheduler.

Pure logic without a clock of its own: `Scheduler.plan()` says what the next step computes and how long that
takes, `Scheduler.complete()` does the book-keeping and hands out the tokens. First come, first served; running
sequences go first; when blocks run out the youngest running sequence is preempted and recomputed later.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step costs, in seconds. The defaults are a small model on a fast GPU."""

    step: float = 0.012
    per_sequence: float = 0.0001  # a decode step grows a little with its batch
    prefill: float = 0.008  # a step with any prefill in it
    per_prefill_token: float = 0.00006

    def of(self, decodes: int, prefill_tokens: int) -> float:
        first = self.prefill + self.per_prefill_token * prefill_tokens if prefill_tokens else 0.0
        return self.step + self.per_sequence * decodes + first


@dataclass(frozen=True, slots=True)
class Limits:
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    blocks: int = 1024
    block_size: int = 16
    max_model_len: int = 8192


@dataclass(slots=True, eq=False)
class Seq:
    """One request inside the engine. Times are the caller's monotonic seconds, 0 until they happen."""

    prompt_tokens: int
    prompt_hashes: Sequence[int]  # one per full block of the prompt, chained
    max_tokens: int
    ends_after: int  # tokens after which the model itself stops
    emit: Callable[[Finish | None], None]  # called for every token; must not block
    arrived: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    computed: int = 0
    generated: int = 0
    cached: int = 0  # tokens of the prompt found in the prefix cache
    blocks: list[int] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.generated


class BlockPool:
    """KV-cache blocks. Freed blocks keep their content until they are needed: that is the prefix cache."""

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))  # least recently used first
        self._users = [0] * blocks
        self._hash_of: dict[int, int] = {}
        self._block_of: dict[int, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        return 1 - len(self._free) / self.total

    def cached(self, hashes: Sequence[int]) -> list[int]:
        """The longest run of cached blocks from the start of these hashes."""
        found = []
        for value in hashes:
            block = self._block_of.get(value)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, cached: Sequence[int], fresh: int) -> list[int] | None:
        """Claim these cached blocks and `fresh` new ones, or nothing at all."""
        idle = sum(block in self._free for block in cached)
        if fresh > len(self._free) - idle:
            return None
        for block in cached:
            self._free.pop(block, None)
            self._users[block] += 1
        return [*cached, *(self._new() for _ in range(fresh))]

    def remember(self, block: int, value: int) -> None:
        if block not in self._hash_of and value not in self._block_of:
            self._hash_of[block], self._block_of[value] = value, block

    def give_back(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):  # the tail of a prefix is the first to be reused
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None

    def _new(self) -> int:
        block, _ = self._free.popitem(last=False)
        if (old := self._hash_of.pop(block, None)) is not None:
            del self._block_of[old]
        self._users[block] = 1
        return block


@dataclass(frozen=True, slots=True)
class Step:
    seconds: float
    work: tuple[tuple[Seq, int], ...]  # how many tokens of each sequence are computed
    prefill_tokens: int


class Scheduler:
    def __init__(self, limits: Limits, cost: Cost) -> None:
        self._limits, self._cost = limits, cost
        self.pool = BlockPool(limits.blocks)
        self.waiting: deque[Seq] = deque()
        self.running: list[Seq] = []
        self.preemptions = 0
        self.prefix_queries = 0  # tokens looked up and found, as vLLM counts them
        self.prefix_hits = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seq: Seq, now: float) -> None:
        seq.arrived = now
        self.waiting.append(seq)

    def abort(self, seq: Seq) -> bool:
        """Forget a sequence wherever it is; False when it had ended already."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        else:
            return False
        self._release(seq)
        return True

    def plan(self, now: float) -> Step | None:
        """The next step, or None when there is nothing to compute."""
        budget = self._limits.max_num_batched_tokens
        work: list[tuple[Seq, int]] = []
        preempted = False
        for seq in list(self.running):
            if seq not in self.running:  # preempted for an older one in this very step
                continue
            tokens = min(seq.tokens - seq.computed, budget)
            if not tokens:
                continue
            while not (fits := self._grow(seq, tokens)):
                preempted = True
                if self._preempt_youngest() is seq:
                    break
            if fits:
                work.append((seq, tokens))
                budget -= tokens
        work = [(seq, tokens) for seq, tokens in work if seq in self.running]
        if not preempted:
            self._admit(work, budget, now)
        if not work:
            return None
        prefill = sum(tokens for seq, tokens in work if tokens > 1 or not seq.generated)
        decodes = sum(1 for seq, tokens in work if tokens == 1 and seq.generated)
        return Step(self._cost.of(decodes, prefill), tuple(work), prefill)

    def complete(self, step: Step, now: float) -> list[Seq]:
        """Book a computed step; emits the tokens and returns the sequences that ended."""
        ended = []
        for seq, tokens in step.work:
            if not seq.blocks:  # aborted while the step ran
                continue
            seq.computed += tokens
            if not seq.generated:
                self._remember(seq)
            if seq.computed < seq.tokens:
                continue  # a long prompt, in several steps
            seq.generated += 1
            seq.first_token = seq.first_token or now
            if seq.generated >= seq.ends_after:
                seq.finish = "stop"
            elif seq.generated >= seq.max_tokens:
                seq.finish = "length"
            seq.emit(seq.finish)
            seq.last_token = now
            if seq.finish:
                self.running.remove(seq)
                self._release(seq)
                ended.append(seq)
        return ended

    def _admit(self, work: list[tuple[Seq, int]], budget: int, now: float) -> None:
        size = self._limits.block_size
        while self.waiting and budget and len(self.running) < self._limits.max_num_seqs:
            seq = self.waiting[0]
            # At least one token must be computed to get a token out.
            cached = self.pool.cached(seq.prompt_hashes)[: (seq.tokens - 1) // size]
            hit = len(cached) * size
            tokens = min(seq.tokens - hit, budget)
            blocks = self.pool.take(cached, -(-(hit + tokens) // size) - len(cached))
            if blocks is None:
                break
            self.waiting.popleft()
            seq.blocks, seq.computed = blocks, hit
            if not seq.scheduled:
                seq.scheduled, seq.cached = now, hit
                self.prefix_queries += seq.prompt_tokens
                self.prefix_hits += hit
            self.running.append(seq)
            work.append((seq, tokens))
            budget -= tokens

    def _grow(self, seq: Seq, tokens: int) -> bool:
        missing = -(-(seq.computed + tokens) // self._limits.block_size) - len(seq.blocks)
        if missing <= 0:
            return True
        more = self.pool.take((), missing)
        if more is None:
            return False
        seq.blocks += more
        return True

    def _preempt_youngest(self) -> Seq:
        seq = self.running.pop()
        self._release(seq)
        seq.computed = 0
        self.preemptions += 1
        self.waiting.appendleft(seq)
        return seq

    def _remember(self, seq: Seq) -> None:
        full = min(seq.computed // self._limits.block_size, len(seq.prompt_hashes))
        for block, value in zip(seq.blocks[:full], seq.prompt_hashes, strict=False):
            self.pool.remember(block, value)

    def _release(self, seq: Seq) -> None:
        self.pool.give_back(seq.blocks)
        seq.blocks = []
