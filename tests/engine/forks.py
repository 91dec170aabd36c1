"""Forks ranks for tests (`python -m tests.engine.forks FD`): torch is imported once, a rank takes milliseconds.

Every message on the socket FD carries an end of a socket: for `b"r"` a new rank's connection to rank 0, for
`b"f"` the control of another process that forks. The answer is the new process's pid.
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
            if data == b"r":
                run_rank(socket.socket(fileno=fds[0]))
            control = socket.socket(fileno=fds[0])
            continue
        os.close(fds[0])
        control.sendall(pid.to_bytes(4, "little"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
