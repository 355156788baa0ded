"""The probe that the doctor starts on each host: reads questions from stdin, a JSON line each, and answers on stdout.

It ends with its input, so nothing stays behind when the doctor or the connection does, and after its time in any case.
Needs no package that is not in Python, except to read shards: it has to run where an environment is broken.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MARK = "vidcls-doctor: "


def serve(seconds: float) -> int:
    """Answer questions until stdin ends, for at most `seconds`. Returns the exit code."""
    timer = threading.Timer(seconds, os._exit, args=(3,))  # a file system that hangs holds the main thread
    timer.daemon = True
    timer.start()
    # Imported when they are needed: the first answer must not wait, and its absence is told as a fault of ssh or code.
    from vidcls.doctor import facts, folders, network

    files, listeners = folders.Files(), network.Listeners()
    questions: dict[str, Callable[..., Any]] = {
        "clock": time.time,
        "facts": facts.gather,
        "torch": facts.ask_torch,
        "listen": listeners.listen,
        "reach": network.reach,
        "link": network.measure,
        "nearest": folders.nearest,
        "write": files.write,
        "read": files.read,
        "lock": files.lock,
        "try_lock": files.try_lock,
        "remove": files.remove,
        "shards": folders.read_shards,
    }
    _say({"result": os.getpid()})
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                _say({"result": questions[asked.pop("do")](**asked)})
            except Exception as error:  # whatever goes wrong belongs into the table, not into a log
                _say({"error": f"{type(error).__name__}: {error}"})
    finally:
        files.remove()
    return 0


def _say(answer: dict[str, Any]) -> None:
    print(MARK + json.dumps(answer), flush=True)
