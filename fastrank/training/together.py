"""Processes that end together.

Where one process of a run fails, the others wait for it inside a collective operation. torchrun
ends those of its own machine; those of other machines wait until a timeout, half an hour by
default. So a thread of every process holds a connection to a thread of the first one. When a
process fails, it says why; whatever else ends it closes its connection, and the others learn that
it is lost. They then end too, with one line that names it.

Heartbeats would have to be patient with a process that is busy, and so slow to tell; a connection
closes as soon as its process is gone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterator

from fastrank.errors import InputError, TrainingInterrupted, TrainingStopped
from fastrank.training.engine import all_processes

_PATIENCE = 3.0  # seconds in which a process may end by itself when another one has failed
_CONNECTING = 10.0  # seconds
_LONGEST = 1 << 16  # bytes of a message
_DONE = "done"


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Context of a run on several processes: if it fails in one of them, it ends in all of them.

    Every process must enter it. Within another one, in a single process, and without an address of
    the first process (``MASTER_ADDR``) it does nothing.

    Raises:
        TrainingStopped: the error here followed from that of another process, which is named.
    """
    if all_processes().world_size == 1 or "MASTER_ADDR" not in os.environ or _Link.current:
        yield
        return
    link = _Link()
    try:
        yield
    except TrainingInterrupted:  # in every process
        link.close(None)
        raise
    except BaseException as error:
        expected = isinstance(error, (InputError, TrainingStopped))
        # A broken connection of the engine comes before the news of what broke it.
        if not expected and isinstance(error, Exception) and link.failed.wait(1.0):
            link.closed = True
            raise TrainingStopped(link.reason) from None
        link.close(" ".join(f"{error}".split()) or type(error).__name__)
        raise
    else:
        link.close(None)


class _Link:
    """This process's connections: of the first process to all others, of those to the first."""

    current: _Link | None = None

    def __init__(self) -> None:
        everyone = all_processes()
        self.rank = everyone.rank
        self.failed = threading.Event()
        self.closed = False
        self.reason = ""
        self.names: dict[socket.socket, str] = {}
        self.selector = selectors.DefaultSelector()
        host = socket.gethostname()
        server, port, secret = None, 0, ""
        if self.rank == 0:
            server, secret = _listen(), secrets.token_hex(16)
            port = server.getsockname()[1]
        port, secret, first = everyone.gather([(port, secret, host)])[0]
        if server is None:
            address = (os.environ["MASTER_ADDR"], port)
            connection = socket.create_connection(address, _CONNECTING)
            connection.sendall(f"{secret} process {self.rank} on {host}\n".encode())
            self._watch(connection, f"process 0 on {first}")
        else:
            with server:
                server.settimeout(_CONNECTING)
                while len(self.names) < everyone.world_size - 1:
                    self._accept(server, secret)
        _Link.current = self
        threading.Thread(target=self._listen_on, name="ending_together", daemon=True).start()

    def _accept(self, server: socket.socket, secret: str) -> None:
        connection, _ = server.accept()
        connection.settimeout(_CONNECTING)
        with contextlib.suppress(OSError):  # a stranger
            unbuffered = connection.makefile("rb", buffering=0)  # more may have been sent already
            given, _, name = unbuffered.readline(300).strip().partition(b" ")
            if secrets.compare_digest(given, secret.encode()):
                self._watch(connection, name.decode(errors="replace"))
                return
        connection.close()

    def _watch(self, connection: socket.socket, name: str) -> None:
        connection.settimeout(None)
        self.names[connection] = name
        self.selector.register(connection, selectors.EVENT_READ)

    def _listen_on(self) -> None:
        while self.names:
            for key, _ in self.selector.select():
                if self.closed:
                    return
                connection: socket.socket = key.fileobj  # type: ignore[assignment]
                try:
                    message = connection.recv(_LONGEST)
                except OSError:
                    message = b""
                name = self.names.pop(connection)
                self.selector.unregister(connection)
                connection.close()
                text = message.decode(errors="replace").strip()
                if text == _DONE:
                    continue
                # What the first process passes on has the name of who said it.
                passed_on = text.startswith("process ")
                self._fail(text if passed_on else f"{name}: {text or 'lost (killed, or cut off)'}")
                return

    def _fail(self, reason: str) -> None:
        """Another process has failed: pass it on, and end this one if it does not end itself."""
        self.reason = reason
        self._tell(reason)
        self.failed.set()
        threading.Event().wait(_PATIENCE)
        # One line per machine, if it has not been said by ending.
        if os.environ.get("LOCAL_RANK", "0") == "0" and not self.closed:
            print(f"fastrank: stopped: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    def _tell(self, message: str) -> None:
        for connection in list(self.names):
            with contextlib.suppress(OSError):
                connection.sendall(message.encode()[: _LONGEST - 1] + b"\n")

    def close(self, error: str | None) -> None:
        """The run has come to its end here, by an ``error`` or without."""
        _Link.current, self.closed = None, True
        named = f"process {self.rank} on {socket.gethostname()}: {error}"
        self._tell(_DONE if error is None else named)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _forget() -> None:
    """Close the connections in a forked child, where they would outlive this process."""
    if _Link.current is not None:
        for connection in _Link.current.names:
            connection.close()
        _Link.current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
