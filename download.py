"""Download a large text file over a connection that may break: the next attempt goes on where the last one stopped.

    from download import download
    path = download("https://example.com/stories.txt", "data/stories.txt", max_bytes=50_000_000)

Until the file is whole it is called stories.txt.part; stories.txt.part.etag says of which version it is a part. Proxies
come from the environment (https_proxy, no_proxy), as urllib has it.
"""

import http.client
import math
import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from time import sleep  # a name of this module, so that tests can replace it

from tqdm import tqdm

from common import DISK_FULL

CHUNK = 1 << 16
ADVICE = "Check the address, or download the file yourself and pass it with --input."


def download(url, path, max_bytes=None, timeout=30, retries=5):
    """Fetch `url` into the file `path` unless that exists, and return `path` as a pathlib.Path.

    max_bytes: take only so many bytes from the beginning of the file.
    timeout: seconds to wait for a connection, and for each read.
    retries: how many attempts in a row may bring nothing new before it gives up.

    `path` exists only when it is whole, even after kill -9; a later call goes on from what is in `path`.part. What goes
    wrong outside this program (network, server, disk) raises SystemExit with one line that says what to do. Two
    processes must not fetch into the same path at the same time.
    """
    path = Path(path)
    if path.exists():
        return path
    part, version = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.etag")
    failures, ranges = 0, True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        best = _size(part)
        while True:
            try:
                if _attempt(url, part, version, max_bytes, timeout, ranges):
                    break
                ranges = False  # start over, and ask for no range again before that has brought something
            except _Again as e:
                what, wait = e.args
                # Progress is more bytes than ever before: a server without ranges that breaks off at the same place
                # each time brings bytes in every attempt, for ever.
                size = _size(part)
                failures, best, ranges = (0, size, True) if size > best else (failures + 1, best, ranges)
                if failures >= retries:
                    raise _failure(url, f"{what}. What was fetched is kept: run the command again to go on, or "
                                   "download the file elsewhere and pass it with --input.") from None
                wait = wait or min(2 ** max(failures - 1, 0), 30)
                print(f"{path.name}: {what}; trying again in {wait} s", file=sys.stderr)
                sleep(wait)
        os.replace(part, path)
        version.unlink(missing_ok=True)
    except OSError as e:  # those of the network have become _Again or SystemExit, so this is the disk
        then = "; free some space and run again, what is there is kept." if e.errno in DISK_FULL else "."
        raise _failure(url, f"cannot write {part}: {e.strerror or e}{then}") from None
    return path


class _Again(Exception):
    """An attempt failed but is worth repeating: (what happened, seconds that the server asks to wait, or 0)."""


def _failure(url, what):
    return SystemExit(" ".join(f"Could not download {url}: {what}".split()))  # some of urllib's reasons have two lines


def _size(file):
    return file.stat().st_size if file.exists() else 0


def _attempt(url, part, version, max_bytes, timeout, ranges):
    """Send one request and append its body to `part`: True if that is whole now, False if it must be started over."""
    offset, limit = _size(part), math.inf if max_bytes is None else max_bytes
    if offset >= limit:
        with open(part, "ab") as file:
            file.truncate(limit)
        return True
    known = version.read_text("latin-1") if offset and version.exists() else ""
    headers = {}
    if ranges and (offset or max_bytes is not None):
        headers["Range"] = f"bytes={offset}-{'' if max_bytes is None else max_bytes - 1}"
        if known:
            headers["If-Range"] = known  # if the file has changed since, all of it comes, with status 200
    with _request(url, headers, timeout) as response:
        etag = response.headers.get("ETag", "")  # If-Range does not take a weak one, W/"..."
        now = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        if response.status == 200:
            offset, total = 0, math.inf if response.length is None else response.length
            part.write_bytes(b"")
        else:
            pattern = rf"bytes {offset}-(\d+)/(\d+|\*)" if response.status == 206 else rf"bytes \*/{offset}"
            span = re.fullmatch(pattern, response.headers.get("Content-Range", "").strip())
            if not span or known and now and known != now:
                if not headers:
                    raise _failure(url, f"the server sent another part of the file than asked for. {ADVICE}")
                return False
            if response.status == 416:  # nothing lies beyond what we have
                part.touch()
                return True
            total = int(span[1]) + 1 if span[2] == "*" else int(span[2])
        if now or not offset:  # after part was emptied: no new version beside old bytes, wherever a kill comes
            version.write_text(now, "latin-1")
        size = _append(response, part, limit, goal=min(total, limit))
    if size > total:
        part.unlink()
        raise _failure(url, f"the server sent more than the {total} bytes that it announced. {ADVICE}")
    if size < min(total, limit) and total < math.inf:  # http.client says nothing of a body that ends early
        raise _Again(f"the connection closed early, at {size} of {min(total, limit)} bytes", 0)
    return True


def _request(url, headers, timeout):
    """The response, which may be 416 if a range was asked for; what else goes wrong is _Again or SystemExit."""
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as e:
        if e.code == 416 and headers:
            return e
        e.close()
        if e.code in (408, 429) or e.code >= 500:
            wait = e.headers.get("Retry-After", "")
            raise _Again(f"HTTP {e.code} {e.reason}", int(wait) if re.fullmatch(r"\d\d?", wait) else 0) from None
        raise _failure(url, f"HTTP {e.code} {e.reason}. {ADVICE}") from None
    except (ValueError, http.client.InvalidURL) as e:
        raise _failure(url, f"this is not a valid address ({e}). {ADVICE}") from None
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise _failure(url, f"the server's certificate cannot be verified ({reason}). {ADVICE}") from None
        raise _Again(f"no connection ({reason})", 0) from None
    html = response.headers.get_content_type() == "text/html"
    if response.status in (200, 206) and not html:
        return response
    response.close()
    what = "an HTML page instead of a text (is there a login?)" if html else f"no file but HTTP {response.status}"
    raise _failure(url, f"the server sent {what}. {ADVICE}")


def _append(response, part, limit, goal):
    """Append the body to `part` until that has `limit` bytes or the body ends; returns the size of `part`."""
    size = _size(part)
    with (open(part, "ab") as file,
          tqdm(desc=part.stem, initial=size, total=goal, unit="B", unit_scale=True) as bar):
        while size < limit:
            try:
                chunk = response.read1(min(CHUNK, limit - size))
            except (OSError, http.client.HTTPException) as e:
                raise _Again(f"the connection broke ({e})", 0) from None
            if not chunk:
                break
            file.write(chunk)
            size += len(chunk)
            bar.update(len(chunk))
    return size
