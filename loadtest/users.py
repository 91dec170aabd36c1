"""Locust users that measure a token stream as what it is. For a locustfile of your own:

    from locust import between, task
    from loadtest.users import ChatUser

    class Reader(ChatUser):
        wait_time = between(1, 5)

        @task
        def read(self):
            self.ask({"messages": [{"role": "user", "content": "Tell me about the sea."}], "max_tokens": 64})

and `locust -f mine.py --host http://127.0.0.1:8000`. `argosy loadtest` runs users of its own (loadtest/locustfile.py).
"""

from __future__ import annotations

import json
import time
from typing import Any, ClassVar

from locust import User

from loadtest import stats
from loadtest.call import Answer, Call, send
from loadtest.http import Pool, Target


class OpenAIUser(User):
    """A client of one OpenAI-compatible endpoint, with connections of its own."""

    abstract = True
    endpoint: ClassVar[str]
    model: str = ""
    """Sent with every body that names no model; "" = none."""
    api_key: str = ""
    timeout_s: float = 600.0

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self._pool = Pool(Target(self.host or "http://127.0.0.1:8000"), timeout_s=self.timeout_s)
        self._num_asked = 0

    def ask(self, body: dict[str, Any], *, stream: bool = True, label: str = "") -> Answer:
        """Send a body, wait for the whole answer, and enter it into locust's statistics.

        label: class of the request, for its row. Failures are entered, not raised.
        """
        body = ({"model": self.model} if self.model else {}) | body
        if stream:
            body = {"stream_options": {"include_usage": True}} | body | {"stream": True}
        self._num_asked += 1
        call = Call(
            id=self._num_asked,
            endpoint=self.endpoint,
            body=json.dumps(body, separators=(",", ":")).encode(),
            is_stream=stream,
            label=label,
        )
        answer = Answer(call, time.monotonic())
        send(answer, self._pool, {"Authorization": f"Bearer {self.api_key}"} if self.api_key else None)
        stats.fire(self.environment, answer)
        return answer

    def on_stop(self) -> None:
        self._pool.close()


class CompletionsUser(OpenAIUser):
    """POST /v1/completions."""

    abstract = True
    endpoint = "completions"


class ChatUser(OpenAIUser):
    """POST /v1/chat/completions."""

    abstract = True
    endpoint = "chat"
