"""A web server on the loopback that counts what is asked of it, and misbehaves on request; and processes to ask it."""

import multiprocessing
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Web:
    """files: path without its first slash -> contents. seconds: that each whole answer takes, in ten parts.

    faults: path -> what happens to the next requests for it, one after the other, before it is answered well:
    a status, "cut" (half, then the connection ends), "short" (half, said to be all), "wrong" (a byte flipped),
    "long" (one byte more), "endless" (no length, no end), "stall" (nothing, until the server stops).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, deque[int | str]] = {}
        self.requests: Counter[str] = Counter()
        self.seconds = 0.0
        self.stopping = threading.Event()
        self.started = threading.Event()
        """Set once the first bytes of an answer are on their way."""
        self.url = ""


@contextmanager
def web() -> Iterator[Web]:
    """A running Web at its url; stopped afterwards, together with the answers that are still on their way."""
    served = Web()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield served
    finally:
        served.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def _handler(served: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept and used again
        timeout = 60

        def do_GET(self) -> None:
            path = self.path[1:]
            served.requests[path] += 1
            faults = served.faults.get(path)
            fault = faults.popleft() if faults else None
            data = served.files.get(path)
            if fault == "stall":
                served.stopping.wait(60)
                self.close_connection = True
            elif isinstance(fault, int) or data is None:
                self.send_error(fault if isinstance(fault, int) else 404)
            elif fault == "endless":
                self.answer(None, data * 100)
            elif fault == "cut":
                self.answer(len(data), data[: len(data) // 2])
            elif fault == "short":
                self.answer(len(data) // 2, data[: len(data) // 2])
            elif fault == "wrong":
                self.answer(len(data), bytes([data[0] ^ 1]) + data[1:])
            elif fault == "long":
                self.answer(len(data) + 1, data + b"x")
            else:
                self.answer(len(data), data)

        def answer(self, length: int | None, data: bytes) -> None:
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", str(length))
            if length != len(data):
                self.send_header("Connection", "close")
            self.end_headers()
            step = max(1, len(data) // 10)
            for start in range(0, len(data), step):
                served.stopping.wait(served.seconds / 10)
                try:
                    self.wfile.write(data[start : start + step])
                except OSError:  # whoever asked has had enough
                    self.close_connection = True
                    return
                served.started.set()

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


def forked(calls: list[Callable[[], None]], seconds: float = 20) -> list[int | None]:
    """Exit codes of forked processes that make one call each, all at once; those that take longer are killed."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=call) for call in calls]
    for process in processes:
        process.start()
    ends = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, ends - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
