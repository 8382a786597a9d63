"""Download a large text file over a connection that may break: an attempt goes on where the last stopped.

    from download import download
    path = download("https://example.com/stories.txt", "data/stories.txt", max_bytes=50_000_000)

Until the file is whole it is called stories.txt.part, and stories.txt.part.version says of which version
it is a part, so no part is continued with another version. requests does the work: proxies,
redirects, certificates, and waiting for a busy server.
"""

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
    network or the server fails for good; what has come by then stays, and the next call goes on.
    """
    path = Path(path)
    part, failures, most = path.with_name(path.name + ".part"), 0, 0
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    session = requests.Session()
    busy = Retry(total=retries, connect=0, read=0, backoff_factor=0.5,
                 status_forcelist=(429, 500, 502, 503, 504), respect_retry_after_header=False)
    session.mount(url.split("://")[0] + "://", HTTPAdapter(max_retries=busy))
    while True:
        try:
            attempt(session, url, part, max_bytes or sys.maxsize, timeout)
            break
        except requests.exceptions.SSLError as e:
            raise failure(url, short(e)) from None
        except BROKEN as e:
            size = part.stat().st_size if part.exists() else 0
            failures, most = (0, size) if size > most else (failures + 1, most)
            if failures > retries:
                raise BadInput(f"Could not download {url}: {short(e)}. What was fetched is kept: run again "
                               "to go on, or download it elsewhere and pass it with --input.") from None
            print(f"{path.name}: {short(e)}; trying again", file=sys.stderr)
            time.sleep(min(2**failures, 30) / 2)
        except requests.RequestException as e:
            raise failure(url, short(e)) from None
    os.replace(part, path)
    version_of(part).unlink(missing_ok=True)
    return path


def attempt(session, url, part, limit, timeout):
    """Ask for what part lacks, and append it up to `limit` bytes in all; returns when part is whole."""
    version = version_of(part)
    size = part.stat().st_size if part.exists() and version.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # lengths and ranges count the file's own bytes
    if size:  # If-Range: of another version, all of it comes, with status 200
        headers |= {"Range": f"bytes={min(size, limit) - 1}-", "If-Range": version.read_text()}
    with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code not in (200, 206):
            raise failure(url, f"the server answered HTTP {response.status_code}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise failure(url, "the server sent an HTML page, not a text (is there a login?)")
        etag = response.headers.get("ETag", "")  # a weak one, W/"...", is no good for If-Range
        now = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        start = min(size, limit) - 1 if response.status_code == 206 else 0
        if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise failure(url, "the server sent another part of the file than asked for")
        version.write_text(now) if now else version.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        whole = min(start + int(length) if length else sys.maxsize, limit)
        size = write(response, part, start, whole)
    if size < whole < sys.maxsize:
        raise requests.ConnectionError(f"the connection broke after {size:,} of {whole:,} bytes")


def write(response, part, start, whole):
    """Write the body to part, from byte start to byte whole at most; returns where it ends."""
    total = whole if whole < sys.maxsize else None
    with (open(part, "r+b" if start else "wb") as file,
          progress_bar(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True) as bar):
        file.seek(start)
        for chunk in response.iter_content(1 << 16):
            bar.update(file.write(chunk[: whole - file.tell()]))
            if file.tell() >= whole:
                break
        file.truncate()
        return file.tell()


def version_of(part):
    """The file that says of which version part is: an ETag, or the date of its last change."""
    return part.with_name(part.name + ".version")


def short(error):
    """An exception of requests in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def failure(url, why):
    return BadInput(f"Could not download {url}: {why}. Check the address, or download the file "
                    "yourself and pass it with --input.")
