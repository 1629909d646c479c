"""The hub's road, against a small server of the hub's protocol on this machine, in processes of their own (the hub
library reads its environment once, at import)."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from paceline.loading.hub import reachable

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEADER = json.dumps(
    {
        "a": {"dtype": "BF16", "shape": [100, 30], "data_offsets": [0, 6000]},
        "b": {"dtype": "F32", "shape": [250], "data_offsets": [6000, 7000]},
    }
).encode()
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": len(HEADER).to_bytes(8, "little") + HEADER + b"weights" * 1000,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"again",
    "original/params.json": b"{}",
    "modules.json": b"[]",
    "1_Pooling/config.json": b"{}",
}
OLD_FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "pytorch_model-00001-of-00002.bin": b"pickle" * 100,
    "pytorch_model-00002-of-00002.bin": b"more",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"no model",
    "onnx/pytorch_model.bin": b"again",
}
REPOSITORIES = {"org/tiny": FILES, "org/old": OLD_FILES}
RESOLVE = """
import json, sys
from paceline.errors import PacelineError
from paceline.loading.resolve import resolve
class Watch:
    def __init__(self): self.log = []
    def start(self, label, total_bytes): self.log.append([label, total_bytes])
    def advance(self, n): pass
    def done(self): self.log.append("done")
watch = Watch()
try:
    source = resolve(sys.argv[1], progress=watch)
    print(json.dumps([str(source.path), source.revision, source.note, watch.log]))
except PacelineError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


DESCRIBE = """
import json, sys
from pathlib import Path
from paceline.errors import PacelineError
from paceline.loading.description import describe
answers = []
for name in sys.argv[1].split():
    try:
        found = describe(name)
        names = sorted(path.name for path in Path(sys.argv[2]).rglob("snapshots/*/*"))
        answers.append([dict(found.config), dict(found.stored), found.stored_dtype, found.note, names])
    except PacelineError as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for REPOSITORIES (branch main), 'org/gated' (403) and any other name (404)."""

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if "org/gated" in path:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
            return
        repo = next((repo for repo in REPOSITORIES if f"/{repo}" in path), "org/none")
        files = REPOSITORIES.get(repo, {})
        if files and path.startswith(f"/api/models/{repo}/tree/"):
            listing = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
            self.reply(200, json.dumps(listing).encode(), {}, body)
        elif files and path in (f"/api/models/{repo}", *(f"/api/models/{repo}/revision/{r}" for r in ("main", COMMIT))):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            info = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self.reply(200, json.dumps(info).encode(), {}, body)
        elif path.startswith((f"/{repo}/resolve/{COMMIT}/", f"/{repo}/resolve/main/")):
            name = path.split("/", 5)[5]
            if name not in files:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
                return
            data = files[name]
            tag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.reply(200, data, tag, body)
        elif files and path.startswith(f"/api/models/{repo}/revision/"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def run_resolve(name: str, home: Path, **environment: str) -> list[Any]:
    return run(RESOLVE, name, home, **environment)


def run(code: str, name: str, home: Path, **environment: str) -> list[Any]:
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(home)],
        env={**clean, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars or warnings of the hub's own
    answer: list[Any] = json.loads(done.stdout)
    return answer


def test_download_then_the_cache_without_a_hub(hub: str, tmp_path: Path) -> None:
    path, revision, note, progress = run_resolve("org/tiny@main", tmp_path, HF_ENDPOINT=hub)
    assert (revision, note) == (COMMIT, f"commit {COMMIT[:12]}")
    taken = FILES.keys() - {"pytorch_model.bin", "original/consolidated.safetensors", "original/params.json"}
    assert {str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()} == taken
    assert (Path(path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert progress == [["org/tiny", sum(len(FILES[name]) for name in taken)], "done"]

    dead = "http://127.0.0.1:9"
    for environment, why in (
        ({"HF_ENDPOINT": dead}, f"{dead} does not answer"),
        ({"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "1"}, "switched off by HF_HUB_OFFLINE"),
    ):
        again, revision, note, progress = run_resolve(f"org/tiny@{COMMIT}", tmp_path, **environment)
        assert (again, revision, progress) == (path, COMMIT, [])
        assert "from the cache" in note
        assert why in note
    (Path(path) / "model.safetensors").unlink()
    kind, message = run_resolve(f"org/tiny@{COMMIT}", tmp_path, HF_ENDPOINT=dead)
    assert kind == "DownloadError"
    assert "org/tiny" in message


def test_pickled_weights_are_fetched_where_there_are_no_others(hub: str, tmp_path: Path) -> None:
    path, _, _, progress = run_resolve("org/old", tmp_path, HF_ENDPOINT=hub)
    taken = OLD_FILES.keys() - {"training_args.bin", "onnx/pytorch_model.bin"}
    assert {str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()} == taken
    assert progress == [["org/old", sum(len(OLD_FILES[name]) for name in taken)], "done"]
    again, *_ = run_resolve("org/old", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert again == path
    (Path(path) / "pytorch_model-00002-of-00002.bin").unlink()
    kind, message = run_resolve("org/old", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert (kind, "org/old" in message) == ("DownloadError", True)


def test_a_description_takes_the_config_and_the_headers_alone(hub: str, tmp_path: Path) -> None:
    answer, missing, pickled = run(DESCRIBE, "org/tiny@main org/none org/old", tmp_path, HF_ENDPOINT=hub)
    assert len(answer) == 5, answer
    config, stored, dtype, note, files = answer
    assert (config, stored, dtype) == ({"model_type": "llama"}, {"bfloat16": 3000, "float32": 250}, "bfloat16")
    assert note == f"config.json and headers, commit {COMMIT[:12]}"
    assert files == ["config.json"]
    assert missing[0] == "ModelNotFoundError"
    assert pickled[1:4] == [{}, "float32", f"config.json, commit {COMMIT[:12]}"]
    # Without the hub the config is in the cache, and the headers are not.
    (cached,) = run(DESCRIBE, "org/tiny@main", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    config, stored, dtype, note, _ = cached
    assert (config, stored, dtype) == ({"model_type": "llama"}, {}, "float32")
    assert note == "config.json from the cache, as the hub is switched off by HF_HUB_OFFLINE"
    ((kind, message),) = run(DESCRIBE, "org/other", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert kind == "DownloadError"
    assert "'org/other' is not in the cache and http://127.0.0.1:9 does not answer" in message


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("org/none", "ModelNotFoundError", "'org/none' is not on the hub, or is private"),
        ("org/tiny@v9", "ModelNotFoundError", "'org/tiny' at revision 'v9' is not on the hub"),
        ("org/gated", "DownloadError", "is gated: accept its licence"),
    ],
)
def test_what_the_hub_refuses(name: str, kind: str, said: str, hub: str, tmp_path: Path) -> None:
    got, message = run_resolve(name, tmp_path, HF_ENDPOINT=hub)
    assert got == kind
    assert said in message
    assert "\n" not in message


def test_out_of_reach_is_known_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert reachable(endpoint)
    assert not reachable(endpoint)
    # A resolver without a network, as libc's: no answer for many seconds, and no way to interrupt it.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3) or [])
    started = time.monotonic()
    assert not reachable("http://huggingface.co", seconds=0.3)
    assert time.monotonic() - started < 1.5


def test_a_hub_that_accepts_and_never_answers_is_given_up_soon(tmp_path: Path) -> None:
    code = """
import sys, time
from paceline.errors import DownloadError
from paceline.loading.hub import fetch_snapshot
from paceline.loading.progress import Silent
started = time.monotonic()
try:
    fetch_snapshot("org/tiny", None, None, sys.argv[1], Silent(), patience=0.5)
except DownloadError as error:
    print(time.monotonic() - started < 2.0, error)
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        out = subprocess.check_output(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**clean, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"},
            text=True,
            timeout=60,
        )
    assert out.startswith("True 'org/tiny' is not in the cache and the hub failed (")


def test_a_proxy_is_asked_in_the_hubs_place(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", hub)
    assert reachable("http://name.invalid", seconds=1.0)
    monkeypatch.setenv("http_proxy", "127.0.0.1:9")
    assert not reachable(hub, seconds=1.0)
