"""A stand-in for an S3 server on this machine: lists, heads and gets the files of a folder, one bucket a
folder."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 4  # keys in one answer: a client has to ask on
CUT = "cut.txt"  # a key that is listed, and refuses to be read
STAMP = "2026-01-01T00:00:00.000Z"


@contextmanager
def serving(folder: Path, closed: str = "closed") -> Iterator[str]:
    """Yield the server's address; the bucket `closed` refuses."""

    class Server(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            bucket, _, key = unquote(address.path).lstrip("/").partition("/")
            is_cut = self.command == "GET" and key.endswith(CUT)
            if bucket == closed or is_cut:
                self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
            elif not key:
                query = {name: values[0] for name, values in parse_qs(address.query).items()}
                self.answer(200, listing(folder / bucket, query))
            elif (folder / bucket / key).is_file():
                self.answer_part((folder / bucket / key).read_bytes())
            else:
                self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

        def answer_part(self, content: bytes) -> None:
            wanted = self.headers.get("Range")
            if wanted is None:
                self.answer(200, content, ETag=etag(content))
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first)
            stop = min(int(last) + 1 if last else len(content), len(content))
            place = f"bytes {start}-{stop - 1}/{len(content)}"
            self.answer(206, content[start:stop], **{"ETag": etag(content), "Content-Range": place})

        def answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *given: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def listing(bucket: Path, query: dict[str, str]) -> bytes:
    """ListObjectsV2 of a folder: PAGE keys and common prefixes an answer."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token", "")
    entries: dict[str, Path | None] = {}
    for path in sorted(path for path in bucket.rglob("*") if path.is_file()):
        key = path.relative_to(bucket).as_posix()
        if key.startswith(prefix):
            head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            entries[prefix + head + cut if cut else key] = None if cut else path
    names = [name for name in sorted(entries) if name > after]
    parts = []
    for name in names[:PAGE]:
        path = entries[name]
        if path is None:
            parts.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
            continue
        content = path.read_bytes()
        parts.append(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{STAMP}</LastModified>"
            f"<ETag>{escape(etag(content))}</ETag><Size>{len(content)}</Size></Contents>"
        )
    more = len(names) > PAGE
    token = f"<NextContinuationToken>{escape(names[PAGE - 1])}</NextContinuationToken>" if more else ""
    return (
        f'<?xml version="1.0"?><ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}'
        f"{''.join(parts)}</ListBucketResult>"
    ).encode()
