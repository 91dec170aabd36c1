"""What is sent: a pure function of the plan and a conversation's number.

Nothing is drawn from a generator that others draw from, so that the same seed sends the same bytes whatever the
number of workers, the order of arrivals or the speed of the server. (With `replies: server` later turns hold what
the server said.)
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import msgspec

from loadtest.arrivals import Arrival
from loadtest.call import Call
from loadtest.lengths import Length
from loadtest.plan import Plan
from loadtest.spec import SpecError
from loadtest.tenants import Tenants

MAX_DATA_BYTES = 1 << 30
INTRUDER = "intruder"

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 1.3, "top_p": 0.95},
)
"""Of `sampling: mixed`, in equal parts; OpenAI's own parameters only."""


class Workload:
    """Conversations by number."""

    def __init__(self, plan: Plan) -> None:
        """Raises SpecError for what the plan cannot mean, OSError for its files."""
        self.plan = plan
        self.spec = plan.workload
        self.prompt = Length(self.spec.prompt, "--prompt-tokens")
        self.output = Length(self.spec.output, "--output-tokens")
        self.tenants = Tenants(plan.keys_file)
        self.data = None if self.spec.data is None else read_data(Path(self.spec.data))
        if self.spec.extra_body.get("n", 1) not in (None, 1) or self.spec.extra_body.get("best_of", 1) not in (None, 1):
            raise SpecError("--extra-body: n and best_of stay 1: a request's token times would be those of several")
        if self.spec.replies == "server" and self.spec.endpoint != "chat":
            raise SpecError(f"--replies server is for --endpoint chat, got {self.spec.endpoint}")
        if self.spec.turns > 1 and self.spec.endpoint != "chat" and self.spec.prompt_format == "text":
            raise SpecError("--turns: completions of several turns need --prompt-format ids")
        low, high = self.spec.token_ids
        if not 0 <= low < high:
            raise SpecError(f"--token-ids: 0 ≤ low < high, got {low}:{high}")

    def conversation(self, index: int, arrival: Arrival | None = None) -> Conversation:
        """Number `index` of the run; with the lengths of `arrival` where it has some."""
        return Conversation(self, index, arrival)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 -- one workload per process
    def order(self, epoch: int) -> list[int]:
        """Lines of the data set in the order of its `epoch`-th use."""
        lines = list(range(len(self.data or ())))
        random.Random(f"argosy:{self.plan.seed}:data:{epoch}").shuffle(lines)
        return lines


class Conversation:
    """The turns of one arrival; most have a single one."""

    def __init__(self, workload: Workload, index: int, arrival: Arrival | None) -> None:
        self.index = index
        self.num_turns = 1 if workload.data is not None else workload.spec.turns
        self._workload = workload
        self._arrival = arrival
        self._draw = draw = random.Random(f"argosy:{workload.plan.seed}:{index}")
        spec = workload.spec
        self.tenant = workload.tenants.draw(draw)
        kinds = ("completions", "chat")
        self._endpoint = draw.choice(kinds) if spec.endpoint == "mixed" else spec.endpoint
        self._is_intruder = draw.random() < spec.intruder_share
        self._turn = 0
        self._ids: list[int] = []  # of the prompt so far
        self._messages: list[dict[str, str]] = []
        self._num_tokens = 0

    def next(self, reply: str | None = None) -> Call | None:
        """The next turn, None after the last. reply: what the server answered to the one before."""
        if self._turn == self.num_turns:
            return None
        turn = self._turn
        self._turn += 1
        return self._from_data() if self._workload.data is not None else self._drawn(turn, reply)

    def _drawn(self, turn: int, reply: str | None) -> Call:
        spec, draw = self._workload.spec, self._draw
        num_prompt = self._workload.prompt.draw(draw)
        num_output = self._workload.output.draw(draw)
        if self._arrival is not None and turn == 0:
            num_prompt = self._arrival.prompt_tokens or num_prompt
        if self._arrival is not None:
            num_output = self._arrival.output_tokens or num_output
        if self._is_intruder and turn == 0:
            num_prompt = spec.intruder_tokens
        if self._endpoint == "completions" and spec.prompt_format == "ids":
            self._ids += self._prefix_ids(num_prompt) if turn == 0 else self._some_ids(draw, num_prompt)
            prompt: dict[str, Any] = {"prompt": list(self._ids)}
            wanted: int | None = len(self._ids)
            self._ids += self._some_ids(draw, num_output)  # stands for the reply in the next turn
        else:
            prompt, wanted = self._text(turn, num_prompt, num_output, reply)
        return self._call(turn, prompt, num_output, wanted)

    def _text(
        self, turn: int, num_prompt: int, num_output: int, reply: str | None
    ) -> tuple[dict[str, Any], int | None]:
        words = self._workload.plan.words
        is_chat = self._endpoint == "chat"
        if turn == 0:
            num_units = max(num_prompt - words.overhead.get(self._endpoint, 1), 0)
            self._num_tokens = words.overhead.get(self._endpoint, 1) + num_units
            text = words.opener + self._prefix_text(num_units)
        else:
            num_units = max(num_prompt - 1, 0)
            text = words.opener + self._some_text(self._draw, num_units)
            drawn = words.opener + self._some_text(self._draw, num_output - 1)
            if is_chat:
                is_drawn = self._workload.spec.replies == "drawn"
                self._messages.append({"role": "assistant", "content": drawn if is_drawn else reply or ""})
            self._num_tokens += words.turn_overhead + num_units + num_output - 1
        if is_chat:
            self._messages.append({"role": "user", "content": text})
            is_known = words.is_exact and (turn == 0 or self._workload.spec.replies == "drawn")
            return {"messages": list(self._messages)}, self._num_tokens if is_known else None
        return {"prompt": text}, self._num_tokens if words.is_exact else None

    def _from_data(self) -> Call:
        workload = self._workload
        assert workload.data is not None
        epoch, at = divmod(self.index, len(workload.data))
        entry = workload.data[workload.order(epoch)[at]]
        num_output = entry.output_tokens or entry.max_tokens or workload.output.draw(self._draw)
        if entry.messages is not None:
            self._endpoint = "chat"
            return self._call(0, {"messages": entry.messages}, num_output, None)
        self._endpoint = "completions"
        wanted = len(entry.prompt) if isinstance(entry.prompt, list) else None
        return self._call(0, {"prompt": entry.prompt}, num_output, wanted)

    def _call(self, turn: int, prompt: dict[str, Any], num_output: int, wanted: int | None) -> Call:
        plan, spec, draw = self._workload.plan, self._workload.spec, self._draw
        is_stream = draw.random() < spec.stream_share
        is_verified = draw.random() < plan.verify_share
        seed = draw.getrandbits(31)
        body: dict[str, Any] = {"model": plan.model, **prompt, "max_tokens": num_output, "seed": seed}
        if spec.sampling != "default":
            body |= SAMPLINGS[0] if spec.sampling == "greedy" else draw.choice(SAMPLINGS)
        if spec.ignore_eos:
            body["ignore_eos"] = True
        if is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if is_verified:
            body["logprobs"] = True if self._endpoint == "chat" else 1
        body |= spec.extra_body
        body = {name: value for name, value in body.items() if value is not None}
        return Call(
            id=self.index * self.num_turns + turn,
            endpoint=self._endpoint,
            body=json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(),
            is_stream=is_stream,
            label=INTRUDER if self._is_intruder and turn == 0 else "",
            tenant=self.tenant.name,
            session=self.index if self.num_turns > 1 else None,
            turn=turn,
            wanted_prompt_tokens=wanted,
            wanted_output_tokens=num_output if spec.ignore_eos else None,
            body_seed=body.get("seed"),
            is_verified=is_verified,
        )

    # Shared prefixes: with probability prefix_hit the first `prefix_tokens` are one of `num_prefixes`, else the
    # request's own, so that both kinds have the same lengths. An intruder shares nothing.

    def _shared(self) -> int | None:
        spec = self._workload.spec
        if not spec.prefix_tokens or self._is_intruder or self._draw.random() >= spec.prefix_hit:
            return None
        return self._draw.randrange(spec.num_prefixes)

    def _prefix_ids(self, num_tokens: int) -> list[int]:
        number = self._shared()
        if number is None:
            return self._some_ids(self._draw, num_tokens)
        draw = random.Random(f"argosy:{self._workload.plan.seed}:prefix:{number}")
        prefix = self._some_ids(draw, self._workload.spec.prefix_tokens)[:num_tokens]
        return prefix + self._some_ids(self._draw, num_tokens - len(prefix))

    def _prefix_text(self, num_units: int) -> str:
        number = self._shared()
        if number is None:
            return self._some_text(self._draw, num_units)
        draw = random.Random(f"argosy:{self._workload.plan.seed}:prefix:{number}")
        num_shared = min(self._workload.spec.prefix_tokens, num_units)
        return self._some_text(draw, num_shared) + self._some_text(self._draw, num_units - num_shared)

    def _some_ids(self, draw: random.Random, num_tokens: int) -> list[int]:
        return draw.choices(range(*self._workload.spec.token_ids), k=num_tokens)

    def _some_text(self, draw: random.Random, num_units: int) -> str:
        return "".join(draw.choices(self._workload.plan.words.units, k=max(num_units, 0)))


class Entry(msgspec.Struct):
    """A line of a data set: a prompt or messages, and perhaps how much to generate."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None


def read_data(path: Path) -> list[Entry]:
    """Raises SpecError naming the file and the line."""
    entries = []
    decoder = msgspec.json.Decoder(Entry)
    try:
        if path.stat().st_size > MAX_DATA_BYTES:
            raise SpecError(f"--data: {path} has more than {MAX_DATA_BYTES} bytes")
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise SpecError(f"--data: {path}: line {number}: {error}") from None
            if (entry.prompt is None) == (entry.messages is None):
                raise SpecError(f"--data: {path}: line {number}: either prompt or messages")
            entries.append(entry)
    except OSError as error:
        raise SpecError(f"--data: {error}") from None
    if not entries:
        raise SpecError(f"--data: {path} holds no requests")
    return entries
