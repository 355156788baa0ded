"""Ports and links, over loopback."""

from __future__ import annotations

import os
import socket

from vidcls.doctor import network
from vidcls.doctor.network import Listeners, measure, reach

TOKEN = "0123456789abcdef" * 2


def test_a_listener_is_reached_by_those_that_know_its_token() -> None:
    port = Listeners().listen(0, TOKEN)["port"]
    closed = Listeners().listen(0, TOKEN)
    other = "f" * 32
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        found = reach(
            [
                ("127.0.0.1", port, TOKEN),
                ("localhost", port, TOKEN),
                ("127.0.0.1", port, other),
                ("nosuch.invalid", port, TOKEN),
                ("127.0.0.1", closed["port"], TOKEN),
            ]
        )
        deserted = stranger.getsockname()[1]
    assert found == [None, None, "something else answers there", "the name does not resolve", None]
    assert reach([("127.0.0.1", deserted, TOKEN)]) == ["connection refused"]


def test_a_taken_port_names_its_holder() -> None:
    with socket.create_server(("", 0)) as holder:
        told = Listeners().listen(holder.getsockname()[1], TOKEN)
    assert told["error"] == "Address already in use"
    assert told["holder"].startswith(f"pid {os.getpid()} (")


def test_speed_is_that_of_what_arrived() -> None:
    """Both limits hold: no more than `size` each way, and about `seconds` where the size is out of reach."""
    port = Listeners().listen(0, TOKEN)["port"]
    quick = measure("127.0.0.1", port, TOKEN, 4 * len(network.CHUNK), 60.0)
    endless = measure("127.0.0.1", port, TOKEN, 2**62, 0.2)
    for speed in (quick, endless):
        assert set(speed) == {"up", "down"}
        assert min(speed.values()) > 1e6
