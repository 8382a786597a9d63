"""Download a large text file over a connection that may break: the next attempt goes on where the
last one stopped.

    from download import download
    path = download("https://example.com/stories.txt", "data/stories.txt", max_bytes=50_000_000)

Until the file is whole it is called stories.txt.VERSION.part, so no part is continued with another
version of the file. requests does the work: proxies, redirects, certificates, and waiting for a
busy server.
"""

import hashlib
import os
import sys
import time
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from common import progress_bar
from model import BadInput

BROKEN = requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError


def download(url, path, max_bytes=None, timeout=30, retries=5):
    """Fetch url into the file path unless that exists, and return path as a pathlib.Path.

    max_bytes: take only so many bytes from the beginning. timeout: seconds to wait for a connection
    and for each read. retries: how many attempts in a row may bring nothing new. BadInput where the
    network or the server fails for good; what has come by then stays, and the next call goes on
    from there.
    """
    path, failures, most = Path(path), 0, 0
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    session = requests.Session()
    busy = Retry(total=retries, connect=0, read=0, backoff_factor=0.5,
                 status_forcelist=(429, 500, 502, 503, 504))
    session.mount(url.split("://")[0] + "://", HTTPAdapter(max_retries=busy))
    while True:
        try:
            os.replace(attempt(session, url, path, max_bytes, timeout), path)
            return path
        except BROKEN as e:
            parts = path.parent.glob(f"{path.name}.*.part")
            size = max((part.stat().st_size for part in parts), default=0)
            failures, most = (0, size) if size > most else (failures + 1, most)
            if failures > retries:
                raise BadInput(
                    f"Could not download {url} ({type(e).__name__}). What was fetched is kept: run "
                    "again to go on, or download the file elsewhere and pass it with --input.") from None
            print(f"{path.name}: {type(e).__name__}; trying again", file=sys.stderr)
            time.sleep(min(2**failures, 30) / 2)
        except requests.RequestException as e:
            raise failure(url, " ".join(str(e).split())[:200]) from None


def attempt(session, url, path, max_bytes, timeout):
    """Fetch what the part lacks, and return the part, which is whole then."""
    options = dict(timeout=timeout, allow_redirects=True)
    plain = {"Accept-Encoding": "identity"}  # lengths and ranges count the file's own bytes
    head = check(session.head(url, headers=plain, **options), url).headers
    version = head.get("ETag") or head.get("Last-Modified", "")
    part = path.with_name(f"{path.name}.{hashlib.sha256(version.encode()).hexdigest()[:8]}.part")
    whole = min(int(head.get("Content-Length", sys.maxsize)), max_bytes or sys.maxsize)
    size = part.stat().st_size if part.exists() else 0
    if size < whole or not size:
        last = whole - 1 if whole < sys.maxsize else ""
        headers = {**plain, "Range": f"bytes={size}-{last}"} if whole else plain
        with check(session.get(url, headers=headers, stream=True, **options), url) as response:
            at_size = response.headers.get("Content-Range", "").startswith(f"bytes {size}-")
            size = append(response, part, size if at_size else 0, whole)  # 0: it knows no ranges
        if size < whole < sys.maxsize:
            raise requests.ConnectionError(f"{size:,} of {whole:,} bytes came")
    with open(part, "r+b") as file:
        file.truncate(min(size, whole))
    return part


def append(response, part, size, whole):
    """Write the body to part from byte size to byte whole at most; returns where it ends."""
    total = whole if whole < sys.maxsize else None
    with (open(part, "r+b" if size else "wb") as file,
          progress_bar(desc=part.stem, initial=size, total=total, unit="B", unit_scale=True) as bar):
        file.seek(size)
        for chunk in response.iter_content(1 << 16):
            chunk = chunk[: whole - size]
            size += file.write(chunk)
            bar.update(len(chunk))
            if size == whole:
                break
    return size


def check(response, url):
    """The response, or BadInput where it is an error or a page of HTML."""
    if response.status_code not in (200, 206):
        raise failure(url, f"the server answered HTTP {response.status_code}")
    if "text/html" in response.headers.get("Content-Type", ""):
        raise failure(url, "the server sent an HTML page, not a text (is there a login?)")
    return response


def failure(url, why):
    return BadInput(f"Could not download {url}: {why}. Check the address, or download the file "
                    "yourself and pass it with --input.")
