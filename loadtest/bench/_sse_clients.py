"""Many clients of server-sent events in one process, which read cheaply: one system call and one count per read.

It measures the server from outside: what arrived in a window of time, what CPU time the server's process used in
exactly that window, and, for some streams, when each event arrived.
"""

from __future__ import annotations

import select
import socket
import sys
import time

import msgspec

from loadtest.bench._processes import cpu_s

MARK = b"data: "
MAX_BEGINNING = 256
"""Streams that may wait for their first event at once: a gateway refuses what it cannot prepare."""
_READ_BYTES = 1 << 16


class ClientSettings(msgspec.Struct, frozen=True, kw_only=True):
    port: int
    requests: list[str]  # one stream each: the whole HTTP request
    server_pid: int
    settle_s: float  # between the first event of the last stream and the window
    window_s: float
    num_timed: int = 0  # streams whose arrivals are reported
    start_timeout_s: float = 30.0


class Seen(msgspec.Struct, kw_only=True):
    """What happened in the window."""

    num_events: int
    window_s: float
    server_cpu_s: float
    arrivals: dict[int, list[tuple[int, float]]]  # stream -> [(number of the event in its stream, when)]
    sample: str  # the last event of the first stream


class Stream:
    __slots__ = ("arrivals", "last", "num_events", "number", "rest", "sock")

    def __init__(self, number: int, sock: socket.socket, is_timed: bool) -> None:
        self.number = number
        self.sock = sock
        self.num_events = 0
        self.rest = b""  # read, but not yet known to hold no half of a mark
        self.last = b""
        self.arrivals: list[tuple[int, float]] | None = [] if is_timed else None


class Clients:
    """All streams, read by one loop."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._poll = select.epoll()
        self._streams: dict[int, Stream] = {}
        self._num_begun = 0
        self.num_events = 0

    def begin(self) -> None:
        """Returns when every stream has shown an event. Raises RuntimeError after `start_timeout_s`."""
        settings = self._settings
        give_up_at = time.monotonic() + settings.start_timeout_s
        stride = max(len(settings.requests) // max(settings.num_timed, 1), 1)
        for number, request in enumerate(settings.requests):
            sock = socket.create_connection(("127.0.0.1", settings.port), timeout=10.0)
            sock.sendall(request.encode())
            sock.setblocking(False)
            is_timed = number % stride == 0 and number // stride < settings.num_timed
            self._streams[sock.fileno()] = Stream(number, sock, is_timed)
            self._poll.register(sock, select.EPOLLIN)
            self._read(0.0)
            self._wait(MAX_BEGINNING, give_up_at)
        self._wait(0, give_up_at)

    def _wait(self, num_beginning: int, give_up_at: float) -> None:
        while len(self._streams) - self._num_begun > num_beginning:
            self._read(0.5)
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"{self._num_begun} of {len(self._settings.requests)} streams began in time")

    def run(self) -> Seen:
        """Raises RuntimeError when the streams do not begin, or one of them ends."""
        settings = self._settings
        self.begin()
        self._read_until(time.monotonic() + settings.settle_s)
        begun, cpu, events = time.monotonic(), cpu_s(settings.server_pid), self.num_events
        self._read_until(begun + settings.window_s)
        ended, cpu_end, events_end = time.monotonic(), cpu_s(settings.server_pid), self.num_events
        return Seen(
            num_events=events_end - events,
            window_s=ended - begun,
            server_cpu_s=cpu_end - cpu,
            arrivals={
                stream.number: [(number, when) for number, when in stream.arrivals if begun <= when < ended]
                for stream in self._streams.values()
                if stream.arrivals is not None
            },
            sample=next(iter(self._streams.values())).last.decode(errors="replace"),
        )

    def _read_until(self, deadline: float) -> None:
        while (left := deadline - time.monotonic()) > 0:
            self._read(left)

    def _read(self, timeout_s: float) -> None:
        streams = self._streams
        for descriptor, _ in self._poll.poll(timeout_s):
            stream = streams[descriptor]
            data = stream.sock.recv(_READ_BYTES)
            if not data:
                raise RuntimeError(f"stream {stream.number} ended: {stream.last[-500:]!r}")
            stream.last = data
            if stream.rest:
                data = stream.rest + data
                stream.rest = b""
            if not data.endswith(b"\n"):  # cut anywhere, perhaps inside a mark; a mark holds no line end
                at = data.rfind(b"\n") + 1
                data, stream.rest = data[:at], data[at:]
            count = data.count(MARK)
            if not count:
                if stream.num_events == 0 and data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(f"stream {stream.number} was refused: {data[:500]!r}")
                continue
            if stream.num_events == 0:
                self._num_begun += 1
            if stream.arrivals is not None:
                now = time.monotonic()
                stream.arrivals += [(stream.num_events + k, now) for k in range(count)]
            stream.num_events += count
            self.num_events += count


def main() -> int:
    clients = Clients(msgspec.json.decode(sys.argv[1], type=ClientSettings))
    try:
        seen = clients.run()
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(msgspec.json.encode(seen).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
