"""The download, against a server on this machine that misbehaves: by property, as requests does the
work."""

import os
import re
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from helpers import exit_code, fork, wait_until

import prepare_tinystories as dl
from model import BadInput

DATA = b"".join(b"%07d\n" % i for i in range(40_000))  # 320,000 bytes, no two places alike


class Handler(BaseHTTPRequestHandler):
    """Sends server.data, or the range asked for; the server's fields say what goes wrong, `cuts`
    for each GET in turn."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        s = self.server
        s.log.append(self.headers.get("Range"))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if s.ranges else None
        if asked and self.headers.get("If-Range") != s.etag:
            asked = None  # of another version: all of it
        first, last = (int(asked[1]), int(asked[2] or len(s.data) - 1)) if asked else (0, len(s.data) - 1)
        first += s.shift if asked else 0
        status = s.statuses.pop(0) if s.statuses else 206 if asked else 200
        body = s.data[first : last + 1]
        self.send_response(status)
        self.send_header("Content-Type", s.kind)
        self.send_header("ETag", s.etag)
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(s.data)}")
        self.end_headers()
        cut = s.cuts.pop(0) if s.cuts else len(body)
        self.wfile.write(body[:cut])
        if cut < len(body):
            self.wfile.flush()
            s.stalls and s.released.wait(120)
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(dl.time, "sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # the client hung up: nothing to tell
    server.data, server.kind, server.etag, server.ranges, server.stalls = DATA, "text/plain", '"one"', True, False
    server.statuses, server.cuts, server.log, server.released = [], [], [], threading.Event()
    server.shift = 0
    server.url = f"http://127.0.0.1:{server.server_port}/stories.txt"
    serve = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)  # ends sooner
    serve.start()
    yield server
    server.released.set()
    server.shutdown()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "stories.txt"


def starts(server):
    return [int(asked.split("=")[1].split("-")[0]) if asked else 0 for asked in server.log]


def assert_fetched(path, data=DATA):
    """The file is whole, and nothing else is left."""
    assert path.read_bytes() == data and [p.name for p in path.parent.iterdir()] == [path.name]


def test_fetches_the_file_and_leaves_nothing_else(server, path):
    assert dl.download(server.url, str(path)) == path
    assert_fetched(path)
    dl.download(server.url, path)
    assert server.log == [None]  # what is there is not asked for


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("max_bytes", [1, 100_000, len(DATA), 10**6])
def test_max_bytes_takes_the_beginning(server, path, max_bytes, has_ranges):
    server.ranges = has_ranges
    dl.download(server.url, path, max_bytes=max_bytes)
    assert_fetched(path, DATA[:max_bytes])


@pytest.mark.parametrize("stalls", [False, True])
def test_a_body_that_breaks_off_or_stalls_is_resumed(server, path, stalls):
    """Three times, each from where the last one stopped. A read that waits for half a second has
    stalled: on a machine that is as slow as that, one more may seem to, and is resumed as well."""
    server.cuts, server.stalls = [70_000, 130_000, 0], stalls
    dl.download(server.url, path, timeout=0.5 if stalls else 30)
    assert_fetched(path)
    assert starts(server) == sorted(starts(server))
    assert len(server.log) >= 4 if stalls else len(server.log) == 4
    # a buffer each may be lost
    assert sorted({*starts(server)})[1] > 60_000 and starts(server)[-1] > 120_000


def test_a_later_call_goes_on_with_the_part(server, path):
    server.cuts = [200_000] + [0] * 9
    with pytest.raises(BadInput, match="^Could not download .*kept: run again to go on"):
        dl.download(server.url, path, retries=2)
    assert not path.exists()
    dl.download(server.url, path)
    assert_fetched(path)
    assert 190_000 < starts(server)[-1] < 200_000
    path.rename(path.with_name("stories.txt.part"))  # a part that is whole already
    path.with_name("stories.txt.part.version").write_text(server.etag)
    dl.download(server.url, path)
    assert_fetched(path)
    assert starts(server)[-1] == len(DATA) - 1


def test_a_server_without_ranges_starts_over(server, path):
    """And one that breaks off at the same place for ever is given up."""
    server.ranges, server.cuts = False, [100_000]
    dl.download(server.url, path)
    assert_fetched(path)
    path.unlink()
    server.cuts = [100_000] * 99
    with pytest.raises(BadInput, match="Connection broken"):
        dl.download(server.url, path, retries=2)


def test_a_part_of_another_version_is_not_continued(server, path):
    server.cuts = [100_000] + [0] * 9
    with pytest.raises(BadInput):
        dl.download(server.url, path, retries=1)
    server.data, server.etag, server.cuts = DATA[::-1], '"two"', []
    dl.download(server.url, path)
    assert_fetched(path, DATA[::-1])


def test_a_file_that_changes_within_a_download_is_started_over(server, path, monkeypatch):
    """Half of one version and half of another would look whole."""
    def change(seconds):
        server.data, server.etag = DATA[::-1], '"two"'

    monkeypatch.setattr(dl.time, "sleep", change)
    server.cuts = [100_000]
    dl.download(server.url, path)
    assert_fetched(path, DATA[::-1])


def test_another_part_than_asked_for_is_refused(server, path):
    server.cuts, server.shift = [100_000], 7
    with pytest.raises(BadInput, match="another part of the file"):
        dl.download(server.url, path)
    assert not path.exists()


@pytest.mark.parametrize("status", [404, 403, 500])
def test_an_error_is_one_line(server, path, status):
    server.statuses = [status] * 50
    with pytest.raises(BadInput, match=rf"^Could not download \S+stories\.txt: .*{status}.*--input\.$") as e:
        dl.download(server.url, path, retries=1)
    assert "\n" not in str(e.value) and not path.exists()


def test_a_busy_server_is_asked_again(server, path):
    server.statuses = [503, 429]
    dl.download(server.url, path)
    assert_fetched(path)


def test_a_page_of_html_is_refused(server, path):
    """A login page, or a captive portal, is no text."""
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(BadInput, match="an HTML page, not a text"):
        dl.download(server.url, path)
    assert not path.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "nonsense", "https://exa mple/x", "ftp://example.com/x"])
def test_a_wrong_address_is_one_line(server, path, url):
    with pytest.raises(BadInput, match="^Could not download") as e:
        dl.download(url, path, retries=1, timeout=5)
    assert "\n" not in str(e.value)


def dies_in_a_download(url, path):
    child = fork(dl.download, url, path)
    part = Path(f"{path}.part")
    wait_until(lambda: part.exists() and part.stat().st_size >= 65_536)
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL and not Path(path).exists()


def test_kill_leaves_a_part_and_the_next_call_goes_on(server, path, forks, tmp_path):
    server.cuts, server.stalls = [150_000], True
    code, _, error = forks(tmp_path, dies_in_a_download, server.url, str(path))
    assert code == 0, error
    dl.download(server.url, path)
    assert_fetched(path)
    assert starts(server)[-1] > 60_000


def test_no_stderr_no_bar(server, path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    server.cuts = [70_000]
    dl.download(server.url, path)
    assert_fetched(path)


def test_a_body_that_ends_early_without_an_error_is_no_whole_file(tmp_path):
    """urllib3 2 says so by itself; an older one does not."""
    class Short:
        status_code, headers = 200, {"Content-Length": "10"}

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def iter_content(self, size):
            yield b"1234"

    session = SimpleNamespace(get=lambda *args, **options: Short())
    with pytest.raises(requests.ConnectionError, match="broke after 4 of 10 bytes"):
        dl.attempt(session, "http://x/y", tmp_path / "y.part", 2**40, 1)
