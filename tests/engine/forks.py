"""Forks ranks for tests (`python -m tests.engine.forks FD`): torch is imported once, a rank takes milliseconds.

Every message on the socket FD carries the end of a rank's connection; the answer is the rank's pid.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from serving.engine.rank import run_rank


def main(fd: int) -> None:
    control = socket.socket(fileno=fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            run_rank(socket.socket(fileno=fds[0]))
        os.close(fds[0])
        control.sendall(pid.to_bytes(4, "little"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
