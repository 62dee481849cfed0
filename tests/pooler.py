"""A connection pooler, as small as one can be: it hands out the sessions of a server.

Like pgbouncer it has three modes: a client keeps a session for as long as it stays, for a
transaction, or for a statement. Unlike pgbouncer it resets nothing that it does not have to, and
hands every transaction to the session that has been free for longest, so that whatever a client
leaves behind is met by another one soon.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading

from cluster import Cluster
from faults import shut_down

SESSIONS = 6

# Requests of a client's first message: any protocol 3, and encryption.
PROTOCOL, SSL, GSS = 196608, 80877103, 80877104


class Peer:
    """One end of a connection, message by message."""

    def __init__(self, way: socket.socket) -> None:
        self.way = way
        self._file = way.makefile("rb")

    def send(self, kind: bytes, body: bytes) -> None:
        self.way.sendall(kind + struct.pack("!i", len(body) + 4) + body)

    def receive(self, has_kind: bool = True) -> tuple[bytes, bytes]:
        """The next message. Raises OSError at the end of the connection."""
        kind = self._file.read(1 if has_kind else 0)
        head = self._file.read(4)
        if len(head) < 4:
            raise ConnectionError
        return kind, self._file.read(struct.unpack("!i", head)[0] - 4)


class Pooler:
    """Takes connections on a listener, for a user and a database of the cluster; no password.

    Its clients are told `version` as the server's, where it is not empty."""

    def __init__(
        self,
        listener: socket.socket,
        cluster: Cluster,
        database: str,
        mode: str,
        version: str = "",
    ) -> None:
        self._mode = mode
        self._listener = listener
        self._address = f"{cluster.directory}/.s.PGSQL.{cluster.port}"
        self._startup = f"user\0postgres\0database\0{database}\0\0".encode()
        self._parameters: dict[bytes, bytes] = {}
        self._free: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self._ends: list[socket.socket] = []
        for _ in range(SESSIONS):
            self._free.put(self._new_session())
        if version:
            self._parameters[b"server_version"] = version.encode()
        self._start(self._accept)

    def __enter__(self) -> Pooler:
        return self

    def __exit__(self, *_exception: object) -> None:
        shut_down(self._listener, *self._ends)

    @staticmethod
    def _start(work: object, *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _new_session(self) -> Peer:
        way = socket.socket(socket.AF_UNIX)
        way.connect(self._address)
        self._ends.append(way)
        session = Peer(way)
        session.send(b"", struct.pack("!i", PROTOCOL) + self._startup)
        while (message := session.receive())[0] != b"Z":
            if message[0] == b"S":
                name, value, _end = message[1].split(b"\0")
                self._parameters[name] = value
        return session

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                way = self._listener.accept()[0]
                way.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._ends.append(way)
                self._start(self._serve, way)

    def _serve(self, way: socket.socket) -> None:
        with contextlib.suppress(OSError), way:
            client = Peer(way)
            _, first = client.receive(has_kind=False)
            while struct.unpack("!i", first[:4])[0] in (SSL, GSS):
                way.sendall(b"N")
                _, first = client.receive(has_kind=False)
            if struct.unpack("!i", first[:4])[0] != PROTOCOL:
                return  # a request to cancel a query
            words = first[4:].split(b"\0")
            asked = {n.lower(): v for n, v in zip(words[::2], words[1::2], strict=False)}
            client.send(b"R", struct.pack("!i", 0))
            for name, value in self._parameters.items():
                client.send(b"S", b"%s\0%s\0" % (name, asked.get(name.lower(), value)))
            client.send(b"K", struct.pack("!ii", 7, 7))  # nobody's process
            client.send(b"Z", b"I")
            with contextlib.suppress(OSError):
                self._answer(client)

    def _answer(self, client: Peer) -> None:
        session = None
        try:
            while (message := client.receive())[0] != b"X":
                session = session or self._free.get()
                session.send(*message)
                while (answer := session.receive())[0] != b"Z":
                    client.send(*answer)
                is_in_transaction = answer[1] != b"I"
                if is_in_transaction and self._mode == "statement":
                    client.send(b"E", b"SFATAL\0C08P01\0Mno transactions here\0\0")
                    return
                if not is_in_transaction and self._mode != "session":
                    self._free.put(session)
                    session = None
                client.send(*answer)
        finally:
            if session is not None:  # left in a session or a transaction of the client's own
                session.way.close()
                self._free.put(self._new_session())
