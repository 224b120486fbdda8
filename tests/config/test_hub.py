"""Whether the hub answers is told in seconds, whatever it does."""

import http.server
import socket
import threading
import time

import pytest

from titanfunc.config import hub
from titanfunc.config.data import DataConfig
from titanfunc.config.vocabulary import read_tokenizer, require_reach


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(int(self.path[1:]))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def address(monkeypatch):
    """Of a server on this machine, which answers with the status that the path says."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def nobody(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("status", [200, 404, 503])
def test_any_answer_is_one(address, monkeypatch, status):
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/{status}")
    assert hub.reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.reachable()


def test_nobody_there(nobody, monkeypatch):
    assert not hub.reachable()
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert not hub.reachable()


def test_one_that_never_answers(monkeypatch):
    monkeypatch.setattr(hub, "LOOK", 0.2)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        assert not hub.reachable()
        assert time.monotonic() - begun < 5


def test_what_cannot_be_fetched_is_told_in_one_line(nobody, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(hub, "is_kept", lambda *_: False)
    message = r"^data\.tokenizer: nope/nope cannot be fetched from the hub \(http.* does not answer, .*\); wanted bytes"
    begun = time.monotonic()
    for look in (read_tokenizer, require_reach):
        with pytest.raises(ValueError, match=message) as error:
            look("nope/nope")
        assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 10 and capfd.readouterr() == ("", "")
    config = DataConfig("hub", "a/b", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"^data\.path: wanted a folder laid out like a dataset, as http"):
        config.check_hub()
    (tmp_path / "files-1.json").touch()  # which of them were listed before is seen where they are read
    config.check_hub()
    DataConfig("hub", str(tmp_path), cache_dir=str(tmp_path / "cache")).check_hub()


def test_what_is_kept_needs_no_hub(nobody, monkeypatch):
    monkeypatch.setattr(hub, "is_kept", lambda *_: True)
    require_reach("nope/nope")
    require_reach("llama2")
