"""The hub, where it cannot be reached: told at once, with the cause; what was downloaded before is still found."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import shipsfast
from shipsfast import hub
from shipsfast.demo.run import MODEL
from shipsfast.models.checkpoint import find
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.models.without_weights import hollow_model


@pytest.fixture
def endpoint(monkeypatch):
    """Sets where the hub is thought to be."""
    from huggingface_hub import constants

    def put(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(hub, "_last", [None, None])

    return put


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def cached(root, monkeypatch, name="someone/village"):
    """The embedded model as if it had been downloaded."""
    from huggingface_hub import constants

    place = root / f"models--{name.replace('/', '--')}"
    shutil.copytree(MODEL, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(root))
    return name


LOADERS = [load_model, load_tokenizer, hollow_model]


@pytest.mark.parametrize("load", LOADERS)
def test_a_name_that_is_nowhere_is_told_at_once(endpoint, load):
    endpoint(f"http://127.0.0.1:{closed_port()}")
    began = time.monotonic()
    with pytest.raises(
        shipsfast.InputError, match=r"no folder nobody/none.*cannot be reached \(.*refused"
    ) as told:
        load("nobody/none")
    assert time.monotonic() - began < 5 and "\n" not in str(told.value)
    with pytest.raises(shipsfast.InputError, match="cannot be reached"):
        find("nobody/none", "model.gguf")


def test_a_hub_that_is_silent_is_waited_for_briefly_and_once(endpoint, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises(shipsfast.InputError, match="cannot be reached"):
                find("nobody/none")
        assert time.monotonic() - began < 5


def test_offline_is_honoured(endpoint, monkeypatch):
    """Nobody is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_ask", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(shipsfast.InputError, match=r"nobody/none.*HF_HUB_OFFLINE is set"):
        load_tokenizer("nobody/none")


def test_what_was_downloaded_before_loads_without_a_hub(endpoint, monkeypatch, tmp_path):
    name = cached(tmp_path, monkeypatch)
    endpoint(f"http://127.0.0.1:{closed_port()}")
    began = time.monotonic()
    assert find(name).how == {"local_files_only": True}
    assert time.monotonic() - began < 5
    assert load_tokenizer(name)("a")["input_ids"] == load_tokenizer(str(MODEL))("a")["input_ids"]
    assert load_model(name, device="cpu").config.num_hidden_layers == 4


def test_a_hub_that_answers_is_asked_as_ever(endpoint):
    """Whatever it answers: nothing is added to what transformers is told, and its own message is the one printed."""

    class Nothing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint(f"http://127.0.0.1:{server.server_port}")
        assert find("nobody/none").how == {}
    finally:
        server.shutdown()
        server.server_close()


def test_the_command_line_tells_before_it_imports_transformers(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n")
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path), "HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}", "PYTHONPROFILEIMPORTTIME": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "shipsfast", "scan", "nobody/none", str(tmp_path / "prompts.txt"), "-q"],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(said) == 1, said
    assert said[0].startswith("shipsfast: there is no folder nobody/none")
    assert not any(
        line.split("|")[-1].strip() in ("torch", "transformers") for line in done.stderr.splitlines()
    )
