"""Publishing, against a stand-in for the hub's API on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support import launch
from tests.support.checkpoints import make_checkpoint
from tools.make_random_checkpoint import write_checkpoint

pytestmark = pytest.mark.launch


class Hub:
    """What was asked of it, and the files of its commits."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False
        self.url = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, content: Any, status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            if self.headers.get("transfer-encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().strip(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("content-length", 0)))

        def do_PUT(self) -> None:
            content = self.body()
            hub.large[hashlib.sha256(content).hexdigest()] = content
            self.answer({})

        def do_GET(self) -> None:
            self.answer({"error": "not here"}, 404)

        def do_POST(self) -> None:
            content = self.body()
            hub.tokens.add(self.headers.get("authorization"))
            path = self.path.partition("?")[0]
            if hub.refuses:
                self.answer({"error": "you may not"}, 403)
            elif path == "/api/repos/create":
                hub.created.append(json.loads(content))
                self.answer({"url": f"{hub.url}/me/clips"})
            elif "/preupload/" in path:
                files = json.loads(content)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in files
                ]
                self.answer({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/put/{each['oid']}", "header": {}}}}
                    for each in json.loads(content)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                for line in content.splitlines():
                    row = json.loads(line)
                    value = row["value"]
                    if row["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif row["key"] == "lfsFile":
                        hub.files[value["path"]] = hub.large[value["oid"]]
                self.answer({"commitUrl": f"{hub.url}/me/clips/commit/1", "commitOid": "1", "success": True})
            else:
                self.answer({})  # the card's header is checked, and so on

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_an_export_is_published_as_it_is(
    hub: Hub, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    base = write_checkpoint(tmp_path / "base", "tiny")
    checkpoint = make_checkpoint(tmp_path / "checkpoint-1", {"default": small_shards}, model_name_or_path=str(base))
    words = [launch.PYTHON, "launch/export.py", checkpoint, "--push-to-hub", "me/clips"]
    done = launch.run([*words, "--out", tmp_path / "out"], log=tmp_path / "log")
    assert done.code == 0, done.output[-3000:]
    assert f"published: {hub.url}/me/clips/commit/1" in done.output
    (created,) = hub.created
    assert (created["name"], created["visibility"]) == ("clips", "private")
    here = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*")}
    kept = {name: path.read_bytes() for name, path in here.items() if path.is_file()}
    assert hub.files == {name: data for name, data in kept.items() if name not in ("MANIFEST.json", "COMPLETE")}
    assert "Bearer hf_secret" in hub.tokens
    assert "hf_secret" not in done.output

    hub.refuses = True
    done = launch.run([*words, "--out", tmp_path / "again"], log=tmp_path / "log")
    assert done.code == 2, done.output[-3000:]
    assert f"error: --push-to-hub: {hub.url} does not take me/clips: " in done.output
    assert (tmp_path / "again" / "README.md").is_file()  # to be published by hand


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    from vidcls.export import hub as hub_module

    nowhere = HfApi(endpoint=f"http://127.0.0.1:{launch.free_port()}", token="x")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: nowhere)
    with pytest.raises(ValueError, match=r"--push-to-hub: http://127.0.0.1:.* does not take me/clips: "):
        hub_module.push(tmp_path, "me/clips", private=True)
    with pytest.raises(ValueError, match="--push-to-hub: 'a/b/c' is no name of a repository"):
        hub_module.push(tmp_path, "a/b/c", private=True)
