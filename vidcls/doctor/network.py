"""Whether hosts reach each other, and how fast: plain TCP between probes. Runs on the hosts."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 5.0
STEP_SECONDS = 10.0  # without a byte
CHUNK = bytes(2**18)
TOKEN_BYTES = 32
HELLO, UPLOAD, DOWNLOAD = b"H", b"U", b"D"


class Listeners:
    """Ports that answer other probes while this one lives. What is sent there is counted and forgotten."""

    def listen(self, port: int, token: str) -> dict[str, Any]:
        """{port} that answers now (0: any free one), or {error} and {holder}, the process that has it, if known."""
        try:
            server = _server(port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            return {"error": reason, "holder": _holder(port) if error.errno == errno.EADDRINUSE else None}
        threading.Thread(target=self._accept, args=(server, token), daemon=True).start()
        return {"port": server.getsockname()[1]}

    def _accept(self, server: socket.socket, token: str) -> None:
        while True:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                threading.Thread(target=_answer, args=(connection, token), daemon=True).start()


def _server(port: int) -> socket.socket:
    with contextlib.suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))  # says why, if it is not for want of IPv6


def _answer(connection: socket.socket, token: str) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(STEP_SECONDS)
        asked = _receive(connection, TOKEN_BYTES + 1)
        if asked[:TOKEN_BYTES] != token.encode():
            return
        connection.sendall(asked[:TOKEN_BYTES])
        if asked[TOKEN_BYTES:] == UPLOAD:
            received = 0
            while data := connection.recv(len(CHUNK)):
                received += len(data)
            connection.sendall(struct.pack("!Q", received))
        elif asked[TOKEN_BYTES:] == DOWNLOAD:
            size, seconds = struct.unpack("!Qd", _receive(connection, 16))
            _send(connection, size, seconds)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "closed")
        data += part
    return data


def _send(connection: socket.socket, size: int, seconds: float) -> None:
    """Send `size` bytes, or as many as go out in `seconds`."""
    end, sent = time.monotonic() + seconds, 0
    while sent < size and time.monotonic() < end:
        connection.sendall(CHUNK)
        sent += len(CHUNK)
    connection.shutdown(socket.SHUT_WR)


def _connect(address: str, port: int, token: str, what: bytes) -> socket.socket:
    """A connection on which the listener has answered with its token; OSError otherwise."""
    connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
    try:
        connection.settimeout(STEP_SECONDS)
        connection.sendall(token.encode() + what)
        if _receive(connection, TOKEN_BYTES) != token.encode():
            raise ConnectionResetError(errno.ECONNRESET, "closed")
    except OSError:
        connection.close()
        raise
    return connection


def reach(targets: list[tuple[str, int, str]]) -> list[str | None]:
    """For each (address or name, port, token) why a connection to it fails; None: it works."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda target: _try(*target), targets))


def _try(address: str, port: int, token: str) -> str | None:
    try:
        _connect(address, port, token, HELLO).close()
    except socket.gaierror:
        return "the name does not resolve"
    except ConnectionResetError:
        return "something else answers there"
    except TimeoutError:
        return "timed out: a firewall drops it, or the address is another network's"
    except OSError as error:
        return (os.strerror(error.errno) if error.errno else str(error)).lower()
    return None


def measure(address: str, port: int, token: str, size: int, seconds: float) -> dict[str, float]:
    """Bytes per second to (`up`) and from (`down`) a listener: `size` bytes each way, or `seconds` of them."""
    with _connect(address, port, token, UPLOAD) as connection:
        started = time.monotonic()
        _send(connection, size, seconds)
        (received,) = struct.unpack("!Q", _receive(connection, 8))  # all of it has arrived then
        up = received / (time.monotonic() - started)
    with _connect(address, port, token, DOWNLOAD) as connection:
        started, received = time.monotonic(), 0
        connection.sendall(struct.pack("!Qd", size, seconds))
        while data := connection.recv(len(CHUNK)):
            received += len(data)
        down = received / (time.monotonic() - started)
    return {"up": up, "down": down}


def _holder(port: int) -> str | None:
    """The process that listens on a TCP port, as "name (pid 7)"; None where that cannot be seen."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) in inodes:
                process = descriptor.parents[1]
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f"pid {process.name} ({words.strip()[:80]})"
    return None
