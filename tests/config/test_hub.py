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


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """By this process itself: no proxy answers in the hub's place."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    hub._answers_in_time.cache_clear()
    yield
    hub._answers_in_time.cache_clear()


@pytest.fixture
def address():
    """Of a server on this machine, which answers with the status that the path says."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def nobody(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("status", [200, 404, 503])
def test_any_answer_is_one(address, monkeypatch, status):
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/{status}")
    assert hub.reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.reachable()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_there(nobody, monkeypatch):
    assert not hub.reachable()
    for wrong in ("no address", "http://a b", "http://a:b"):
        monkeypatch.setenv("HF_ENDPOINT", wrong)
        assert not hub.reachable()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_speaks_another_language(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            caller, _ = server.accept()
            with caller:
                caller.recv(4096)
                caller.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not hub.reachable()
        thread.join()


def test_one_that_never_answers_is_asked_once(monkeypatch, tmp_path):
    """On the clock: each look would wait for as long as the first."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "is_kept", lambda *_: False)
        config = DataConfig("hub", "a/b", cache_dir=str(tmp_path))
        begun = time.monotonic()
        for look in (lambda: require_reach("nope/nope"), lambda: read_tokenizer("nope/nope"), config.check_hub):
            with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:\d+ does not answer"):
                look()
        assert time.monotonic() - begun < 6
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


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


def test_the_copy_that_is_kept_is_read(nobody, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--a--b"
    for path, text in (("refs/main", "1234"), ("snapshots/1234/tokenizer.json", "{}")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    assert hub.fetch("a/b", "tokenizer.json") == str(folder / "snapshots/1234/tokenizer.json")
    assert hub.is_kept("a/b", "tokenizer.json") and not hub.is_kept("a/b", "other.json")


def test_what_is_kept_needs_no_hub(nobody, monkeypatch):
    monkeypatch.setattr(hub, "is_kept", lambda *_: True)
    require_reach("nope/nope")
    require_reach("llama2")
