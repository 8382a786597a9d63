"""The download, against a real server on this machine that misbehaves in every way we could think of."""

import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import download as dl

DATA = b"".join(b"%07d\n" % i for i in range(40_000))  # 320,000 bytes, no two places alike
NEW = DATA[::-1]
HERE = Path(__file__).parent


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.close_connection = True
        self.server.log.append(self)
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """Gives the answers of `script` in turn, and the last of them for ever; `log` has the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.log, self.released = [answer()], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/stories.txt"

    def handle_error(self, *args):  # the client hung up: nothing to tell
        pass

    def asked(self, header="Range"):
        return [request.headers[header] for request in self.log]


def answer(data=DATA, status=None, ranges=True, if_range=True, cut=None, stall=None, linger=False, chunked=False,
           etag='"one"', **headers):
    """An answer with `data`, or the range asked for. cut: hang up after so many bytes of body; stall: wait there, 20 s
    at most (-1: before the headers); linger: do not close the connection; headers override: Content_Range="..."."""
    def send(h):
        first, last, code = 0, len(data) - 1, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range", "")) if ranges else None
        if asked and not (if_range and h.headers.get("If-Range", etag) not in (etag, headers.get("Last_Modified"))):
            first, last, code = int(asked[1]), min(int(asked[2] or last), last), 206
        out = {"Content-Type": "text/plain", "ETag": etag, "Content-Length": last - first + 1}
        if code == 206:
            code = 206 if first < len(data) else 416
            out["Content-Range"] = f"bytes {first}-{last}/{len(data)}" if code == 206 else f"bytes */{len(data)}"
            out["Content-Length"] = max(last - first + 1, 0)
        out |= {"Transfer-Encoding": "chunked", "Content-Length": None} if chunked else {}
        out |= {name.replace("_", "-"): value for name, value in headers.items()}
        body = data[first : first + int(out["Content-Length"] or last - first + 1)]
        if stall == -1:
            h.server.released.wait(20)
        h.send_response(status or code)
        for name, value in out.items():
            if value is not None:
                h.send_header(name, str(value))
        h.end_headers()
        steps = sorted({0, stall or 0, cut or 0, len(body)})
        for begin, end in zip(steps, steps[1:]):
            if begin == stall:
                h.server.released.wait(20)
            if cut is not None and begin >= cut:
                return
            h.wfile.write(b"%x\r\n%b\r\n" % (end - begin, body[begin:end]) if chunked else body[begin:end])
        if linger:
            h.server.released.wait(20)
        if chunked and cut is None:
            h.wfile.write(b"0\r\n\r\n")
    return send


def error(status, **headers):
    return answer(b"sorry", status, ranges=False, **headers)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """No proxy, and no real waiting: the list of the waits between attempts."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "*")
    urllib.request.install_opener(None)  # it remembers the proxies that it began with
    waits = []
    monkeypatch.setattr(dl, "sleep", waits.append)
    yield waits
    urllib.request.install_opener(None)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "stories.txt"


def put_part(path, data, etag=None):
    """What a killed download leaves behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part_of(path).write_bytes(data)
    if etag:
        path.with_name(path.name + ".part.etag").write_text(etag)


def part_of(path):
    return path.with_name(path.name + ".part")


def left(path):
    return sorted(p.name for p in path.parent.iterdir())


def fetch(server, path, **options):
    return dl.download(server.url, path, **{"timeout": 10, **options})


def failure(url, path, **options):
    """The message of a download that must fail."""
    with pytest.raises(SystemExit) as e:
        dl.download(url, path, **{"timeout": 10, **options})
    message = e.value.code
    assert message.startswith(f"Could not download {url}: ") and "\n" not in message
    assert not path.exists()
    return message


# -----------------------------------------------------------------------------
# what is there at the end


def test_fetches_the_whole_file_and_leaves_nothing_else(server, path):
    """Guards against lost bytes, a missing folder, a side file that stays."""
    assert fetch(server, str(path)) == path
    assert path.read_bytes() == DATA
    assert left(path) == ["stories.txt"]
    assert server.asked() == [None]


def test_a_file_that_is_there_is_not_asked_for(server, path):
    """Guards against a second download, and against one over a finished file."""
    path.parent.mkdir()
    path.write_bytes(b"mine")
    assert fetch(server, path) == path
    assert path.read_bytes() == b"mine" and not server.log


def test_an_empty_file_is_a_file(server, path):
    """Guards against a 416 for "bytes=0-99" of nothing, after which there would be no .part to rename."""
    server.script = [answer(b"")]
    assert fetch(server, path, max_bytes=100).read_bytes() == b""
    assert server.asked() == ["bytes=0-99"]


@pytest.mark.parametrize("max_bytes,size", [(100_000, 100_000), (320_000, 320_000), (400_000, 320_000)])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("have", [0, 50_000])
def test_max_bytes_takes_the_beginning_and_asks_for_no_more(server, path, max_bytes, size, ranges, have):
    """Guards against a range off by one, against the whole file from a server without ranges, against no end."""
    put_part(path, DATA[:have], '"one"')
    server.script = [answer(ranges=ranges)]
    assert fetch(server, path, max_bytes=max_bytes).read_bytes() == DATA[:size]
    assert server.asked() == [f"bytes={have}-{max_bytes - 1}"]


def test_max_bytes_cuts_a_longer_part_without_asking(server, path):
    """Guards against a range that ends before it begins, after a call with a larger max_bytes was broken off."""
    put_part(path, DATA[:70_000])
    assert fetch(server, path, max_bytes=60_000).read_bytes() == DATA[:60_000]
    assert not server.log


def test_chunked_without_length_is_whole_at_its_end(server, path):
    """Guards against treating an unknown length as 0 or as an error."""
    server.script = [answer(chunked=True)]
    assert fetch(server, path).read_bytes() == DATA
    assert len(server.log) == 1


def test_a_connection_that_stays_open_is_not_waited_for(server, path):
    """Guards against reading on after the last byte: a proxy may keep the connection, and that read times out."""
    server.script = [answer(linger=True)]
    start = time.monotonic()
    assert fetch(server, path).read_bytes() == DATA
    assert time.monotonic() - start < 10 and len(server.log) == 1


def test_the_bar_starts_at_the_resumed_offset(server, path, monkeypatch):
    """Guards against a bar from 0, or one that ends elsewhere than at 100%."""
    bars = []

    class Bar(dl.tqdm):
        def __init__(self, **options):
            bars.append(self)
            self.first = options
            super().__init__(**options)

    monkeypatch.setattr(dl, "tqdm", Bar)
    put_part(path, DATA[:50_000])
    fetch(server, path, max_bytes=300_000)
    [bar] = bars
    assert bar.first == dict(desc="stories.txt", initial=50_000, total=300_000, unit="B", unit_scale=True)
    assert bar.n == 300_000


# -----------------------------------------------------------------------------
# broken connections


def test_a_short_body_is_noticed_and_resumed(server, path, waits):
    """Guards against a cut-off file taken for whole: http.client does not complain of an early end."""
    server.script = [answer(cut=100_000), answer()]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked() == [None, "bytes=100000-"]
    assert server.asked("If-Range") == [None, '"one"']
    assert waits == [1]


def test_a_broken_chunked_body_is_resumed(server, path):
    """Guards against IncompleteRead as a traceback, and against a broken stream taken for a clean end."""
    server.script = [answer(chunked=True, cut=100_000), answer(chunked=True)]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked() == [None, "bytes=100000-"]


@pytest.mark.parametrize("stall", [-1, 100_000])
def test_a_stalled_server_is_left_and_asked_again(server, path, stall):
    """Guards against a missing time-out, before the headers and in the middle of the body."""
    server.script = [answer(stall=stall), answer()]
    assert fetch(server, path, timeout=1).read_bytes() == DATA
    assert server.asked()[1] == (None if stall == -1 else "bytes=100000-")


def test_a_part_of_an_earlier_call_is_resumed(server, path):
    """Guards against starting from 0 after a crash, and against forgetting of which version the .part is."""
    put_part(path, DATA[:123_457], '"one"')
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked() == ["bytes=123457-"] and server.asked("If-Range") == ['"one"']


def test_a_whole_part_is_only_renamed(server, path):
    """Guards against fetching all again, or failing on 416, when the kill came just before the rename."""
    put_part(path, DATA)
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked() == [f"bytes={len(DATA)}-"]


def test_progress_resets_the_count_of_failures(server, path, waits):
    """Guards against giving up on a large file because its connection broke `retries` times in all."""
    server.script = [answer(cut=40_000)] * 7 + [answer()]
    assert fetch(server, path, retries=2).read_bytes() == DATA
    assert len(server.log) == 8 and waits == [1] * 7


def test_back_off_doubles_up_to_30_seconds_and_ends(server, path, waits):
    """Guards against hammering a server, against waits of hours, and against retrying for ever."""
    server.script = [error(503)]
    message = failure(server.url, path, retries=8)
    assert waits == [1, 2, 4, 8, 16, 30, 30] and len(server.log) == 8
    assert "HTTP 503 Service Unavailable" in message and "run the command again" in message


def test_no_progress_after_the_start_over_ends_too(server, path):
    """Guards against an endless loop: no ranges, and the connection breaks at the same place each time."""
    server.script = [answer(cut=100_000, ranges=False)]
    assert "closed early, at 100000 of 320000 bytes" in failure(server.url, path, retries=3)
    assert len(server.log) == 4
    assert part_of(path).read_bytes() == DATA[:100_000]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, path, waits, status):
    """Guards against failing on what passes."""
    server.script = [error(status), error(status), answer()]
    assert fetch(server, path).read_bytes() == DATA
    assert waits == [1, 2]


@pytest.mark.parametrize("value,wait", [("7", 7), ("86400", 1), ("Fri, 31 Dec 1999 23:59:59 GMT", 1), ("-5", 1)])
def test_retry_after_is_honoured_when_it_is_small(server, path, waits, value, wait):
    """Guards against ignoring the server's wish, sleeping for a day, and a crash on a date."""
    server.script = [error(429, Retry_After=value), answer()]
    fetch(server, path)
    assert waits == [wait]


def test_no_connection_is_one_line_and_keeps_the_part(path, waits):
    """Guards against a traceback, and against losing what was fetched before the network went."""
    with Server() as server:
        url = server.url  # closed again: nobody listens there
    put_part(path, DATA[:1000])
    message = failure(url, path, retries=3)
    assert "no connection (" in message and "kept: run the command again" in message
    assert len(waits) == 2 and part_of(path).read_bytes() == DATA[:1000]


# -----------------------------------------------------------------------------
# servers with ideas of their own


@pytest.mark.parametrize("etag", [None, '"one"'])
def test_a_server_without_ranges_starts_over(server, path, etag):
    """Guards against the whole file appended to its own beginning."""
    put_part(path, b"x" * 1000, etag)
    server.script = [answer(ranges=False)]
    assert fetch(server, path).read_bytes() == DATA
    assert len(server.log) == 1


def test_a_redirect_keeps_the_range_and_retries_begin_at_the_original_address(server, path):
    """Guards against a retry at a signed address that has expired, and against a resume that becomes a restart."""
    go = answer(b"", 302, ranges=False, Location="/signed/1"), answer(b"", 302, ranges=False, Location="/signed/2")
    server.script = [go[0], answer(cut=100_000), go[1], answer()]
    assert fetch(server, path).read_bytes() == DATA
    assert [request.path for request in server.log] == ["/stories.txt", "/signed/1", "/stories.txt", "/signed/2"]
    assert server.asked() == [None, None, "bytes=100000-", "bytes=100000-"]
    assert server.asked("If-Range")[3] == '"one"'


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_a_file_that_changed_is_started_over(server, path, if_range, within):
    """Guards against half of the old file and half of the new one, in one call or across two, even from a server that
    ignores If-Range."""
    new = answer(NEW, etag='"two"', if_range=if_range)
    server.script = [answer(cut=100_000), new] if within else [new]
    if not within:
        put_part(path, DATA[:100_000], '"one"')
    assert fetch(server, path).read_bytes() == NEW


def test_the_version_is_that_of_the_bytes_on_disk(server, path):
    """Guards against the validator of the old file beside the bytes of the new one, once a start-over breaks too."""
    put_part(path, DATA[:100_000], '"one"')
    server.script = [answer(NEW, etag='"two"', cut=50_000), answer(DATA, cut=110_000), answer()]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked("If-Range") == ['"one"', '"two"', '"one"']


def test_a_part_of_unknown_version_takes_that_of_its_continuation(server, path):
    """Guards against appending twice without a check, when the side file is missing."""
    put_part(path, DATA[:100_000])
    server.script = [answer(cut=50_000), answer()]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked("If-Range") == [None, '"one"']


def test_a_range_that_does_not_name_its_version_is_taken(server, path):
    """Guards against starting over for nothing: If-Range has been heeded already."""
    put_part(path, DATA[:100_000], '"one"')
    server.script = [answer(ETag=None, cut=50_000), answer()]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked("If-Range") == ['"one"', '"one"']


def test_a_server_without_validators_forgets_the_old_one(server, path):
    """Guards against an ETag of the previous file in If-Range for the bytes of a new one that has none."""
    put_part(path, DATA[:100_000], '"one"')
    server.script = [answer(NEW, ranges=False, ETag=None, cut=150_000), answer(NEW, ETag=None)]
    assert fetch(server, path).read_bytes() == NEW
    assert server.asked("If-Range") == ['"one"', None]


def test_a_weak_etag_gives_way_to_the_date(server, path):
    """Guards against If-Range with W/"...", which always brings the whole file again."""
    date = "Fri, 31 Dec 1999 23:59:59 GMT"
    weak = dict(etag='W/"one"', Last_Modified=date)
    server.script = [answer(**weak, cut=100_000), answer(**weak)]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked("If-Range") == [None, date]


def test_a_part_longer_than_the_file_is_dropped(server, path):
    """Guards against 416 as an error, or as "complete", when the .part belongs to something else."""
    put_part(path, b"x" * (len(DATA) + 1))
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked() == [f"bytes={len(DATA) + 1}-", None]


def test_416_for_ever_ends(server, path, waits):
    """Guards against an endless loop of starting over."""
    put_part(path, DATA[:1000])
    server.script = [error(416)]
    assert "HTTP 416" in failure(server.url, path)
    assert len(server.log) == 2 and not waits


@pytest.mark.parametrize("span", ["bytes 0-319999/320000", "bytes 100001-319999/320000", "rubbish", None])
def test_the_wrong_range_is_started_over(server, path, span):
    """Guards against bytes appended at the wrong place."""
    put_part(path, DATA[:100_000], '"one"')
    server.script = [answer(Content_Range=span), answer()]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked() == ["bytes=100000-", None]


def test_the_wrong_range_for_ever_ends(server, path):
    """Guards against an endless loop of starting over, with a server that answers 206 to everything."""
    put_part(path, DATA[:1000])
    server.script = [answer(status=206, Content_Range="bytes 7-319999/320000")]
    assert "another part of the file" in failure(server.url, path)
    assert len(server.log) == 2


def test_a_range_of_a_file_of_unknown_size_goes_to_its_end(server, path):
    """Guards against a crash on "bytes 5-9/*", and against taking it for whole when it is cut off."""
    put_part(path, DATA[:1000], '"one"')
    span = "bytes {}-319999/*"
    server.script = [answer(Content_Range=span.format(1000), cut=5000), answer(Content_Range=span.format(6000))]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked() == ["bytes=1000-", "bytes=6000-"]


def test_ranges_smaller_than_asked_for_add_up(server, path):
    """Guards against taking the end of a range for the end of the file."""
    put_part(path, DATA[:1000], '"one"')
    server.script = [answer(Content_Range="bytes 1000-100999/320000", Content_Length=100_000), answer()]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked() == ["bytes=1000-", "bytes=101000-"]


@pytest.mark.parametrize("chunked", [True, False])
def test_more_than_announced_is_an_error(server, path, chunked):
    """Guards against a file with something else at its end."""
    put_part(path, DATA[:1000], '"one"')
    server.released.set()  # no waiting: the "stall" makes a chunk end exactly where the file should
    server.script = [answer(Content_Range="bytes 1000-199999/200000", chunked=chunked, stall=199_000)]
    assert "more than the 200000 bytes" in failure(server.url, path)
    assert not part_of(path).exists() and len(server.log) == 1


@pytest.mark.parametrize("have", [0, 1000])
def test_an_html_page_is_refused_and_not_kept(server, path, have):
    """Guards against the login page of a hotel as training data, also at the end of a good beginning."""
    if have:
        put_part(path, DATA[:have])
    server.script = [answer(b"<html>please log in</html>", ranges=False, Content_Type="text/html; charset=utf-8")]
    assert "HTML page instead of" in failure(server.url, path)
    assert len(server.log) == 1
    assert left(path) == (["stories.txt.part"] if have else [])
    assert not have or part_of(path).read_bytes() == DATA[:have]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_permanent_error_fails_at_once(server, path, waits, status):
    """Guards against minutes of retries for a wrong address."""
    server.script = [error(status)]
    message = failure(server.url, path)
    assert f"HTTP {status} " in message and "--input" in message
    assert len(server.log) == 1 and not waits


def test_an_answer_without_content_is_refused(server, path):
    """Guards against an empty file from 204 No Content."""
    server.script = [answer(b"", 204, ranges=False)]
    assert "HTTP 204" in failure(server.url, path)


@pytest.mark.parametrize("url", ["stories.txt", "http://127.0.0.1:port/x", "http://[::1/x", "http://127.0.0.1/a b",
                                 "http://127.0.0.1/\u00e4", Path(__file__).as_uri()])
def test_a_wrong_address_is_one_line_at_once(path, waits, url):
    """Guards against a traceback, or retries, for an address with a typing error; and against copying local files."""
    assert "--input" in failure(url, path)
    assert not waits


def test_a_redirect_in_circles_is_one_line_at_once(server, path, waits):
    """Guards against the two-line reason that urllib has for it, and against circling again."""
    server.script = [answer(b"", 302, ranges=False, Location="/stories.txt")]
    assert "HTTP 302" in failure(server.url, path)
    assert not waits


def test_a_bad_certificate_fails_at_once(path, waits, monkeypatch):
    """Guards against retries, and "no connection", where the certificates are missing or a proxy replaces them."""
    def urlopen(*args, **options):
        raise urllib.error.URLError(ssl.SSLCertVerificationError(1, "certificate verify failed"))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert "certificate cannot be verified" in failure("https://127.0.0.1/x", path)
    assert not waits


def test_a_proxy_of_the_environment_is_used(server, path, monkeypatch):
    """Guards against a direct connection where only the proxy has one."""
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/stories.txt"))
    assert dl.download("http://stories.invalid/x", path, timeout=10).read_bytes() == DATA
    assert [request.requestline for request in server.log] == ["GET http://stories.invalid/x HTTP/1.1"]


# -----------------------------------------------------------------------------
# interruptions and the disk


def start(code, *args):
    """A Python process that knows download and its arguments as `args`."""
    code = "import sys; from download import download; args = sys.argv[1:]\n" + code
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=HERE, stderr=subprocess.PIPE, text=True)


def test_kill_leaves_nothing_false_and_the_next_call_goes_on(server, path):
    """Guards against a half-written file under the final name, and against bytes that are lost or doubled by a kill."""
    server.script = [answer(stall=200_000), answer()]
    process = start("download(args[0], args[1])", server.url, path)
    deadline = time.monotonic() + 20
    while not (part_of(path).exists() and part_of(path).stat().st_size > 100_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()  # SIGKILL where there is one
    process.communicate()
    assert process.returncode == (-signal.SIGKILL if hasattr(signal, "SIGKILL") else 1)
    assert not path.exists()
    size = part_of(path).stat().st_size
    assert 100_000 < size < len(DATA) and part_of(path).read_bytes() == DATA[:size]
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked() == [None, f"bytes={size}-"] and server.asked("If-Range")[1] == '"one"'
    assert left(path) == ["stories.txt"]


def test_ctrl_c_passes_and_what_came_is_on_disk(server, path, monkeypatch):
    """Guards against Ctrl-C taken for a network error, and against bytes that stay in a buffer."""
    class Bar(dl.tqdm):
        def update(self, n):
            raise KeyboardInterrupt

    monkeypatch.setattr(dl, "tqdm", Bar)
    monkeypatch.setattr(dl, "CHUNK", 1000)  # smaller than the buffer of a file
    with pytest.raises(KeyboardInterrupt) as e:
        fetch(server, path)
    assert part_of(path).read_bytes() == DATA[:1000] and not path.exists()
    del e


def test_a_full_disk_is_one_line_and_keeps_the_part(server, path):
    """Guards against a traceback, against retries, and against dropping what could be written."""
    pytest.importorskip("resource")
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\ndownload(args[0], args[1])"
    process = start(code, server.url, path)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 1 and "Traceback" not in stderr
    assert [line for line in stderr.splitlines() if "free some space and run again" in line] == stderr.splitlines()[-1:]
    assert part_of(path).read_bytes() == DATA[:100_000] and not path.exists() and len(server.log) == 1
    assert fetch(server, path).read_bytes() == DATA
    assert server.asked()[1] == "bytes=100000-"


def test_a_file_that_cannot_be_written_is_one_line_at_once(server, path, waits):
    """Guards against an error of the disk taken for one of the network, and retried."""
    part_of(path).mkdir(parents=True)
    message = failure(server.url, path)
    assert "cannot write" in message and "free some space" not in message
    assert not waits


def test_an_error_of_ours_is_not_swallowed(server, path, monkeypatch):
    """Guards against an except that is too broad."""
    monkeypatch.setattr(dl, "CHUNK", "64k")
    with pytest.raises(TypeError):
        fetch(server, path)
