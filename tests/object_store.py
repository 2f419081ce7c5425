"""A small object store on the loopback interface, for tests and benchmarks.

It serves the files under a folder as the objects of one bucket, through as much of the S3 REST API (with the bucket
in the path) and of the Google Cloud Storage JSON API as readers need: ranged reads, metadata, listings, plain uploads,
and the deletions of S3. Signatures and tokens are ignored. Each answer can be held back by a latency, during
which other requests go on, and requests and bytes of content are counted. Run as a program, it prints its port and
serves until it is killed.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlencode
from xml.sax.saxutils import escape, unescape

CODES = {403: "AccessDenied", 404: "NoSuchKey", 405: "MethodNotAllowed", 416: "InvalidRange", 503: "SlowDown"}
GCS_PATH = re.compile(r"/(?:upload/|download/)?storage/v1/b/([^/]+)(?:/(o)(?:/(.+))?/?)?", re.S)
KEY = re.compile("<Key>(.*?)</Key>", re.S)  # in the body of a request to delete several objects
RANGE = re.compile(r"bytes=(?:(\d+)-(\d*)|-(\d+))")
SENDFILE_SIZE = 1 << 20  # Longer contents are sent by the kernel, at the client's pace.


class Answer(NamedTuple):
    """An answer, whose content is `body` or else the bytes `start` to `stop` of `file`."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012  read only
    file: str = ""
    start: int = 0
    stop: int = 0


class Object:
    """The file that holds an object; `size` is -1 when there is no such object."""

    def __init__(self, folder: str, key: str) -> None:
        self.key, self.path, self.size = key, os.path.join(folder, key), -1
        self.allowed = os.path.normpath(self.path) == self.path and self.path.startswith(folder + os.sep)
        if self.allowed and os.path.isfile(self.path):
            status = os.stat(self.path)
            self.size, self.seconds, self.version = status.st_size, status.st_mtime, str(status.st_mtime_ns)

    def describe(self) -> dict[str, str]:
        """The object's metadata as GCS gives it."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.seconds))
        numbers = {"size": str(self.size), "generation": self.version, "metageneration": "1"}
        return {"name": self.key, "etag": f'"{self.version}"', "timeCreated": when, "updated": when} | numbers


class Bucket:
    """A bucket, the settings it is served with, and counts of what was asked of it."""

    def __init__(self, folder: str, name: str, latency: float) -> None:
        self.folder, self.name, self.latency = os.path.realpath(folder), name, latency
        self.failures, self.failure_status = 0, 503
        self.reset()

    def reset(self) -> None:
        """Sets the counters to zero."""
        self.requests, self.sent, self.methods = Counter[str](), Counter[str](), Counter[str]()
        self.connections, self.waiting, self.most_waiting, self.cpu = 0, 0, 0, time.process_time()

    def counters(self) -> dict[str, Any]:
        """What was asked since the last reset; requests of the bucket itself, such as listings, have the key ''."""
        keys = {key: {"requests": n, "bytes": self.sent[key]} for key, n in self.requests.items()}
        totals = {"requests": self.requests.total(), "bytes": self.sent.total(), "methods": self.methods, "keys": keys}
        busy = {"connections": self.connections, "most_at_once": self.most_waiting}
        return totals | busy | {"cpu_seconds": time.process_time() - self.cpu}

    def answer(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        """Answers a request; one that does not have the form of GCS is taken as one of S3."""
        if path == "/__counters__":  # The rest of the query changes settings.
            counters = self.counters()
            for name, value in query.items():
                self.reset() if name == "reset" else setattr(self, name, type(getattr(self, name))(value))
            return to_json(counters)
        if gcs := GCS_PATH.fullmatch(path):
            name, key = gcs[1], unquote(gcs[3] or query.get("name", ""))
        else:
            name, _, key = unquote(path[1:]).partition("/")
        self.requests[key] += 1
        self.methods[method] += 1
        found, uploading = Object(self.folder, key), method == "PUT" or query.get("uploadType") == "media"
        if self.failures > 0:
            self.failures -= 1
            return error(self.failure_status, key, gcs)
        if name != self.name:
            return error(404, key, gcs, "NoSuchBucket")
        if uploading and found.allowed:
            return self.write(found, body, gcs)
        if method == "DELETE" or (method == "POST" and not key and not gcs):
            return self.delete([key] if key else [unescape(name) for name in KEY.findall(body.decode())])
        if method not in ("GET", "HEAD"):
            return error(405, key, gcs)
        if key:
            answer = self.read(found, query, headers.get("range", ""), gcs)
            self.sent[key] += answer.stop - answer.start if method == "GET" else 0
            return answer
        if gcs and not gcs[2]:
            return to_json({"name": name, "location": "US"})
        region = {"x-amz-bucket-region": "us-east-1"}
        return Answer(200, headers=region) if method == "HEAD" else self.list(query, gcs)

    def read(self, found: Object, query: dict[str, str], wanted: str, gcs: Any) -> Answer:
        """Answers with an object's content, whole or one range of it, or with its metadata."""
        if found.size < 0 or query.get("generation", found.version) != found.version:
            return error(404, found.key, gcs)
        if gcs and query.get("alt") != "media":
            return to_json(found.describe())
        start, stop, status = 0, found.size, 200
        headers = {"ETag": f'"{found.version}"', "Last-Modified": formatdate(found.seconds, usegmt=True)}
        headers |= {"x-goog-generation": found.version} if gcs else {}
        if bounds := RANGE.fullmatch(wanted):
            start = int(bounds[1]) if bounds[1] else max(0, stop - int(bounds[3]))
            stop = min(stop, int(bounds[2]) + 1) if bounds[2] else stop
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{found.size}"
            if start >= stop:
                return error(416, found.key, gcs)._replace(headers={"Content-Range": f"bytes */{found.size}"})
        return Answer(status, b"", headers, found.path, start, stop)

    def delete(self, keys: list[str]) -> Answer:
        """Deletes objects, and folders that are empty then, which a bucket does not have."""
        for found in (Object(self.folder, key) for key in keys):
            if found.allowed and found.size >= 0:
                os.remove(found.path)
                with contextlib.suppress(OSError):
                    os.removedirs(os.path.dirname(found.path))
        return Answer(200, b"<DeleteResult></DeleteResult>")

    def write(self, found: Object, body: bytes, gcs: Any) -> Answer:
        """Stores an object."""
        os.makedirs(os.path.dirname(found.path), exist_ok=True)
        with open(found.path, "wb") as file:
            file.write(body)
        found = Object(self.folder, found.key)
        return to_json(found.describe()) if gcs else Answer(200, headers={"ETag": f'"{found.version}"'})

    def list(self, query: dict[str, str], gcs: Any) -> Answer:
        """Answers with one page of the objects and of the common prefixes."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        low, high = query.get("startOffset", ""), query.get("endOffset") or "\U0010ffff"
        after, limit = query.get("pageToken" if gcs else "continuation-token", ""), "maxResults" if gcs else "max-keys"
        tree = os.walk(os.path.join(self.folder, prefix.rpartition("/")[0]))
        entries: dict[str, bool] = {}  # Whether each is an object.
        for key in (os.path.join(folder, name)[len(self.folder) + 1 :] for folder, _, names in tree for name in names):
            if key.startswith(prefix) and low <= key < high:
                end = key.find(delimiter, len(prefix)) if delimiter else -1
                entries[key if end < 0 else key[: end + len(delimiter)]] = end < 0
        names = sorted(name for name in entries if name > after)
        page = names[: int(query.get(limit, 1000))]
        token = page[-1] if 0 < len(page) < len(names) else ""
        items = [Object(self.folder, name).describe() for name in page if entries[name]]
        prefixes = [name for name in page if not entries[name]]
        if gcs:
            more = {"nextPageToken": token} if token else {}
            return to_json({"kind": "storage#objects", "items": items, "prefixes": prefixes} | more)
        text = f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{'true' if token else 'false'}</IsTruncated>"
        text += f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
        for item in items:
            fields = {"Key": "name", "Size": "size", "ETag": "etag", "LastModified": "updated"}
            values = "".join(f"<{tag}>{escape(item[field])}</{tag}>" for tag, field in fields.items())
            text += f"<Contents>{values}<StorageClass>STANDARD</StorageClass></Contents>"
        text += "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in prefixes)
        return Answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())


def to_json(value: Any, status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def error(status: int, key: str, gcs: Any, code: str = "") -> Answer:
    """An error in the form of GCS or of S3."""
    code = code or CODES.get(status, "InternalError")
    if gcs:
        return to_json({"error": {"code": status, "message": f"{code}: {key}"}}, status)
    return Answer(status, f"<Error><Code>{code}</Code><Key>{escape(key)}</Key></Error>".encode())


class Connection(asyncio.Protocol):
    """One client's connection, whose requests are answered one after the other."""

    transport: Any

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.buffer, self.busy, self.invited = bucket, bytearray(), False, False
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes a new connection."""
        self.transport = transport
        self.bucket.connections += 1

    def data_received(self, data: bytes) -> None:
        """Takes bytes from the client, and the next request once it is whole and the one before is answered."""
        self.buffer += data
        end = -1 if self.busy else self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        try:
            first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
            method, target, _ = first.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            stop = end + 4 + int(headers.get("content-length", 0))
        except ValueError:
            self.transport.abort()
            return
        if len(self.buffer) < stop:
            if "expect" in headers and not self.invited:
                self.invited = True
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        path, _, query = target.partition("?")
        request = (method, path, dict(parse_qsl(query)), headers, bytes(self.buffer[end + 4 : stop]))
        del self.buffer[:stop]
        self.busy, self.invited = True, False
        self.bucket.waiting += 1
        self.bucket.most_waiting = max(self.bucket.most_waiting, self.bucket.waiting)
        if self.bucket.latency > 0 and path != "/__counters__":
            self.loop.call_later(self.bucket.latency, self.reply, request)
        else:
            self.reply(request)

    def reply(self, request: tuple[str, str, dict[str, str], dict[str, str], bytes]) -> None:
        """Answers a request and goes on to the next."""
        self.bucket.waiting = max(0, self.bucket.waiting - 1)
        if self.transport.is_closing():
            return
        method = request[0]
        try:
            answer = self.bucket.answer(*request)
        except (OSError, ValueError, AttributeError) as problem:
            answer = Answer(500, str(problem).encode())
        size = answer.stop - answer.start if answer.file else len(answer.body)
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()] + [f"Content-Length: {size}", "", ""]
        head, body = "\r\n".join(lines).encode("latin-1"), b"" if method == "HEAD" else answer.body
        if answer.file and method != "HEAD":
            if size > SENDFILE_SIZE:
                self.task = self.loop.create_task(self.stream(head, answer))
                return
            with open(answer.file, "rb", buffering=0) as file:
                body = os.pread(file.fileno(), size, answer.start)
        self.transport.write(head + body)
        self.next()

    async def stream(self, head: bytes, answer: Answer) -> None:
        """Sends an answer with long content."""
        self.transport.write(head)
        with contextlib.suppress(OSError, RuntimeError), open(answer.file, "rb") as file:  # The client may have left.
            await self.loop.sendfile(self.transport, file, answer.start, answer.stop - answer.start)
            self.next()

    def next(self) -> None:
        """Goes on to the next request."""
        self.busy = False
        if self.buffer:
            self.data_received(b"")


async def serve(bucket: Bucket, port: int) -> None:
    """Serves a bucket until cancelled, after printing the port."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(bucket), "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class ObjectStore:
    """A bucket served from a folder by another process while the context lasts."""

    def __init__(self, folder: str, bucket: str = "bucket", latency: float = 0.0) -> None:
        self.folder, self.bucket, self.latency, self.port = str(folder), bucket, latency, 0

    @property
    def url(self) -> str:
        """Where the store is served."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make s3fs, gcsfs and TensorStore's gcs driver use this store."""
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
        places = {"AWS_ENDPOINT_URL": self.url, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
        files = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        gcs = {"STORAGE_EMULATOR_HOST": self.url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        tensorstore = {"TENSORSTORE_GCS_HTTP_URL": self.url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test"}
        return keys | places | files | gcs | tensorstore | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def __enter__(self) -> Self:
        arguments = [self.folder, "--bucket", self.bucket, "--latency", str(self.latency), "--until-eof"]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen([sys.executable, __file__, *arguments], stdin=pipe, stdout=pipe)
        self.port = int(self.child.stdout.readline())  # type: ignore[union-attr]
        return self

    def __exit__(self, *problem: object) -> None:
        self.child.communicate()

    def counters(self, **settings: float) -> dict[str, Any]:
        """The requests and the bytes of content answered with, in total and by key, since the last reset.

        The settings take effect afterwards: `reset=True` sets the counters to zero, `latency` is the new latency, and
        the next `failures` requests are answered with the status `failure_status`.
        """
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("GET", "/__counters__?" + urlencode(settings))
            return json.loads(connection.getresponse().read())


def main() -> None:
    """Serves a folder as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--bucket", default="bucket")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds to hold back each answer")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--until-eof", action="store_true", help="stop when the standard input ends")
    options = parser.parse_args()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if options.until_eof:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(Bucket(options.folder, options.bucket, options.latency), options.port))


if __name__ == "__main__":
    main()
