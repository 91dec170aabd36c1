"""A rank of a gang that is not rank 0: a process of its own at the other end of a socket (C5, C11).

The main thread takes plans and computes. A second one sends the beat and watches the connection: when
rank 0 or the process that started this one is gone, it ends the process, whatever the main thread
waits for.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import time
import traceback
from typing import Final, NoReturn

import numpy as np

from models.parallel import TransportError
from models.transports.connect import Rendezvous, connect
from serving.engine.rank_wire import (
    Begin,
    Failed,
    Loaded,
    Message,
    Passed,
    Pulse,
    Sampled,
    Setup,
    machine,
    message_frame,
    receive,
)
from serving.engine.worker import Worker
from serving.errors import ModelLoadError

log = logging.getLogger(__name__)

PULSE_S: Final = 0.1
BLAME_S: Final = 0.5  # for rank 0 to see the end of the peer that is to blame for an error of the transport
EXIT_ORPHANED: Final = 71
EXIT_FAILED: Final = 70  # EX_SOFTWARE


def run_rank(sock: socket.socket) -> NoReturn:
    """Serve rank 0 over `sock` until either ends. Everything that is needed arrives there. Never returns."""
    rank = _Rank(sock)
    try:
        rank.serve()
    except EOFError:
        os._exit(EXIT_ORPHANED)
    except TransportError as error:
        time.sleep(BLAME_S)
        rank.give_up(str(error))
    except (ModelLoadError, MemoryError) as error:
        rank.give_up(str(error) or "out of memory while loading the model")
    except BaseException as error:
        traceback.print_exc()
        rank.give_up(f"{type(error).__name__}: {error}")


class _Rank:
    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._sending = threading.Lock()
        self._parent = os.getppid()
        self._host, self._machine = socket.gethostname(), machine()
        self._is_loading = True
        self._num_steps = 0
        self._step_started_s: float | None = None
        self._beat()
        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()

    def serve(self) -> NoReturn:
        worker, place = self._load()
        is_speaker = place.tensor_rank == 0 and place.stage > 0  # one of each stage tells how long it took
        while True:
            words = receive(self._sock)
            if not isinstance(words, np.ndarray):
                raise TypeError(f"expected a plan, not {type(words).__name__}")
            self._step_started_s = time.monotonic()
            result = worker.run(words)
            self._step_started_s = None
            step = int(words[0])
            if worker.samples:
                self._send(Sampled(step, result.ids.tobytes(), dict(result.logprobs), worker.runner.busy_s))
            elif is_speaker:
                self._send(Passed(place.stage, step, worker.runner.busy_s))
            self._num_steps += 1

    def _load(self) -> tuple[Worker, Rendezvous]:
        setup = receive(self._sock)
        if not isinstance(setup, Setup):
            raise TypeError(f"expected the setup, not {type(setup).__name__}")
        begun = time.perf_counter()
        ranks = connect(setup.place)
        worker = Worker(setup.settings, ranks=ranks, num_neighbours=setup.num_neighbours)
        facts = Loaded(
            num_blocks=worker.num_blocks,
            num_parameters=worker.model.num_parameters,
            weight_bytes=worker.model.weight_bytes,
            seconds=time.perf_counter() - begun,
            agreed=worker.agreed,
        )
        self._send(facts)
        begin = receive(self._sock)
        if not isinstance(begin, Begin):
            raise TypeError(f"expected the beginning, not {type(begin).__name__}")
        worker.allocate(begin.num_blocks)
        self._is_loading = False
        self._beat()  # rank 0 waits for it
        return worker, setup.place

    def give_up(self, text: str) -> NoReturn:
        self._send(Failed(text))
        sys.stderr.flush()
        os._exit(EXIT_FAILED)

    def _send(self, message: Message) -> None:
        try:
            with self._sending:
                self._sock.sendall(message_frame(message))
        except OSError:
            os._exit(EXIT_ORPHANED)

    def _beat(self) -> None:
        started = self._step_started_s
        age_s = 0.0 if started is None else time.monotonic() - started
        self._send(Pulse(self._is_loading, self._num_steps, age_s, os.getpid(), self._host, self._machine))

    def _watch(self) -> NoReturn:
        hangup = select.poll()
        hangup.register(self._sock, select.POLLRDHUP)  # even while plans wait to be read
        while True:
            if hangup.poll(PULSE_S * 1000) or os.getppid() != self._parent:
                os._exit(EXIT_ORPHANED)
            self._beat()
