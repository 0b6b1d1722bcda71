"""A web server on loopback addresses that misbehaves on request, and remembers what it was asked.

In a test: `with WebServer({"/a.jpg": data}) as server: ... server.url("/a.jpg")`. In a process of its own, for benchmarks:
`with ServerProcess(folder) as server`, or `python -m tests.data_prep.web_server FOLDER`. All of 127.0.0.0/8 is loopback on Linux,
so `hosts=("127.0.0.1", "127.0.0.2")` are two hosts as far as a client can tell (and the client must allow that network).

What a path does is its `Fault`: given to `WebServer.fault(path, Fault(...))`, or written into any address as a query, which works
across processes: `/a.jpg?fault=status&status=503&times=2`.
"""

import argparse
import asyncio
import gzip
import hashlib
import json
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl, unquote

Kind = Literal[
    "status", "hang", "drip", "reset", "short", "long", "garbage", "redirect", "loop", "headers", "gzip", "bomb", "endless", "chunked", "raw"
]
"""What can go wrong:

status     answers `status` with `headers` (Retry-After: `Fault(kind="status", status=429, retry_after="1")`)
hang       reads the request and never answers
drip       sends the head, then one byte every `pause_s`
reset      breaks the connection off with RST: after `cut` bytes of the body, or at once if that is 0
short      announces more bytes than it sends, then closes
long       sends more bytes than it announces
garbage    sends something that is not HTTP
redirect   `status` (302) to `location`; with `count`, through that many hops first
loop       redirects to itself
headers    the ordinary answer with `headers` added
gzip       the ordinary answer compressed, although nobody asked for that
bomb       a gzip body of `size` zero bytes
endless    a body without length that does not end before `size` bytes
chunked    the ordinary answer with Transfer-Encoding: chunked
raw        sends `raw` as it stands, then closes
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What a path does in place of answering."""

    kind: Kind
    times: int | None = None
    """Only the first so many requests of this path; then all is well. None: always."""
    status: int = 0
    """0: 500 for `status`, 302 for `redirect`."""
    headers: tuple[tuple[str, str], ...] = ()
    retry_after: str = ""
    location: str = ""
    count: int = 0
    pause_s: float = 0.05
    cut: int = 0
    size: int = 2**30
    raw: bytes = b""


@dataclass(frozen=True, slots=True)
class Entry:
    """One request, as it arrived."""

    path: str
    """With the query."""
    host: str
    """The Host header, so with the port."""
    user_agent: str
    time: float
    """`time.monotonic()`."""
    headers: dict[str, str]
    """Names in lower case."""


@dataclass(slots=True, kw_only=True)
class Options:
    """How the whole server behaves. Everything random follows from `seed` and the path, not from the order of requests."""

    hosts: Sequence[str] = ("127.0.0.1",)
    port: int = 0
    """0: any free one; the same on every host."""
    robots: str | bytes | None = None
    """Content of /robots.txt, None: 404."""
    robots_fault: Fault | None = None
    delay_s: tuple[float, float] = (0.0, 0.0)
    """Every answer waits for a time between the two."""
    seed: int = 0
    fail_share: float = 0.0
    """Share of the paths that get `fail_with` until `heal()`."""
    fail_with: Fault = field(default_factory=lambda: Fault(kind="status", status=503))
    tls: ssl.SSLContext | None = None


class WebServer:
    """Serves `pages` (path -> bytes, or a folder of files) from a thread of its own, between `__enter__` and `__exit__`.

    Attributes:
        log: every request in the order of arrival, robots.txt and favicons included, without those to `/_...`.
        peak: Host header -> the most requests that were unanswered at the same time; give the server a `delay_s` to see it.
        peak_total: the same over all hosts.
    """

    def __init__(self, pages: Mapping[str, bytes] | Path | str, **options: Any) -> None:
        self.options = Options(**options)
        self.pages: dict[str, bytes] = dict(pages) if isinstance(pages, Mapping) else {}
        self.folder = None if isinstance(pages, Mapping) else Path(pages).resolve()
        self.faults: dict[str, Fault] = {}
        self.log: list[Entry] = []
        self.peak: Counter[str] = Counter()
        self.peak_total = 0
        self.open: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.num_connections = 0
        self.port = self.options.port
        self.is_healed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="web-server", daemon=True)
        self._stop = asyncio.Event()
        self._is_up = threading.Event()

    def __enter__(self) -> "WebServer":
        self._thread.start()
        if not self._is_up.wait(10):
            raise RuntimeError("the web server did not start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def url(self, path: str, host: str | None = None) -> str:
        """Absolute address of a path, on the first host unless another is named."""
        return f"{'https' if self.options.tls else 'http'}://{host or self.options.hosts[0]}:{self.port}{path}"

    def fault(self, path: str, fault: Fault) -> str:
        """Makes `path` misbehave and returns its address; a path without a page is made one."""
        if self.folder is None:
            self.pages.setdefault(path, b"")
        self.faults[path] = fault
        return self.url(path)

    def heal(self) -> None:
        """Ends what `fail_share` does; the faults of single paths stay."""
        self.is_healed = True

    def requests(self, path: str | None = None) -> list[Entry]:
        """The log without robots.txt, or of one path alone."""
        return [entry for entry in self.log if (entry.path == path if path else not entry.path.endswith("/robots.txt"))]

    def body(self, path: str) -> bytes | None:
        """What a path holds, None if there is none. Files are read once."""
        data = self.pages.get(path)
        if data is None and self.folder is not None:
            file = (self.folder / unquote(path).lstrip("/")).resolve()
            if self.folder in file.parents and file.is_file():
                data = self.pages[path] = file.read_bytes()
        return data

    def fault_of(self, path: str, query: str, nth: int) -> Fault | None:
        """What goes wrong with the `nth` request (from 0) for a path."""
        fault = self.faults.get(path) or (_fault_of_query(query) if "fault=" in query else None)
        if fault is None and self.options.fail_share and not self.is_healed and self.chance("fail", path) < self.options.fail_share:
            fault = self.options.fail_with
        return None if fault is None or (fault.times is not None and nth >= fault.times) else fault

    def chance(self, *what: object) -> float:
        """A number in [0, 1) that depends on the seed and `what` alone."""
        text = "/".join(map(str, (self.options.seed, *what)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48

    def stats(self) -> dict[str, Any]:
        """What `/_stats` answers."""
        return {"num_requests": len(self.log), "num_connections": self.num_connections, "peak": dict(self.peak), "peak_total": self.peak_total}

    def control(self, path: str) -> bytes:
        """Answers `/_heal`, `/_log` and `/_stats`, with which another process asks the same as the methods."""
        if path == "/_heal":
            self.heal()
        if path == "/_log":
            return json.dumps([[entry.path, entry.host, entry.user_agent, entry.time] for entry in self.log]).encode()
        return json.dumps(self.stats()).encode()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self) -> None:
        servers = []
        for host in self.options.hosts:
            server = await self._loop.create_server(lambda: _Connection(self), host, self.port, ssl=self.options.tls, backlog=1024)
            self.port = server.sockets[0].getsockname()[1]
            servers.append(server)
        self._is_up.set()
        await self._stop.wait()
        for server in servers:
            server.close()


class _Connection(asyncio.Protocol):
    """One client. Answers the requests one after the other; a plain page without delay is written at once, without a task."""

    def __init__(self, server: WebServer) -> None:
        self.server = server
        self.received = b""
        self.task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.num_connections += 1

    def connection_lost(self, error: Exception | None) -> None:
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.next()

    def next(self) -> None:
        """Starts on the next request if it is there whole and none is being answered."""
        while self.task is None and b"\r\n\r\n" in self.received and not self.transport.is_closing():
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            self.answer(head.decode("latin-1"))

    def answer(self, head: str) -> None:
        server = self.server
        first, *lines = head.split("\r\n")
        target = first.split(" ")[1]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        path, _, query = target.partition("?")
        if path.startswith("/_"):
            self.transport.write(_message(200, server.control(path)))
            return
        host = headers.get("host", "")
        server.log.append(Entry(target, host, headers.get("user-agent", ""), time.monotonic(), headers))
        nth = server.asked[target]
        server.asked[target] += 1
        server.open[host] += 1
        server.peak[host] = max(server.peak[host], server.open[host])
        server.peak_total = max(server.peak_total, server.open.total())
        fault = server.fault_of(path, query, nth)
        low, high = server.options.delay_s
        if path == "/robots.txt":
            self.task = asyncio.ensure_future(self.finish(host, self.robots()))
        elif fault is None and not high:
            self.plain(path, ())
            server.open[host] -= 1
        else:
            delay = low + (high - low) * server.chance("delay", target, nth)
            self.task = asyncio.ensure_future(self.finish(host, self.slow(path, query, fault, delay)))

    async def finish(self, host: str, answering: Awaitable[None]) -> None:
        try:
            await answering
        finally:
            self.server.open[host] -= 1
            self.task = None
            self.next()

    async def slow(self, path: str, query: str, fault: Fault | None, delay: float) -> None:
        if delay:
            await asyncio.sleep(delay)
        if fault is None:
            self.plain(path, ())
        else:
            await _FAULTS[fault.kind](self, fault, path, query)

    async def robots(self) -> None:
        options = self.server.options
        if options.robots_fault is not None:
            await _FAULTS[options.robots_fault.kind](self, options.robots_fault, "/robots.txt", "")
        elif options.robots is None:
            self.transport.write(_message(404, b"none"))
        else:
            self.transport.write(_message(200, options.robots if isinstance(options.robots, bytes) else options.robots.encode()))

    def plain(self, path: str, headers: Sequence[tuple[str, str]]) -> None:
        body = self.server.body(path)
        self.transport.write(_message(404, b"not found") if body is None else _message(200, body, headers))

    def page(self, path: str) -> bytes:
        """The page for a fault that needs one: something to send even where there is none."""
        return self.server.body(path) or b"x" * 2000

    async def status(self, fault: Fault, path: str, query: str) -> None:
        headers = [*fault.headers, *([("Retry-After", fault.retry_after)] if fault.retry_after else [])]
        self.transport.write(_message(fault.status or 500, b"" if fault.status in (204, 304) else b"fault", headers))

    async def hang(self, fault: Fault, path: str, query: str) -> None:
        await asyncio.sleep(3600)

    async def drip(self, fault: Fault, path: str, query: str) -> None:
        body = self.page(path)
        self.transport.write(_message(200, b"", [("Content-Length", str(len(body)))]))
        for position in range(len(body)):
            await asyncio.sleep(fault.pause_s)
            self.transport.write(body[position : position + 1])

    async def reset(self, fault: Fault, path: str, query: str) -> None:
        if fault.cut:
            self.transport.write(_message(200, self.page(path))[: -len(self.page(path))] + self.page(path)[: fault.cut])
            await asyncio.sleep(0.05)  # let it arrive: a reset throws away what the client has not read yet
        _reset(self.transport)

    async def short(self, fault: Fault, path: str, query: str) -> None:
        body = self.page(path)
        self.transport.write(_message(200, body[: len(body) // 2], [("Content-Length", str(len(body)))]))
        self.transport.close()

    async def long(self, fault: Fault, path: str, query: str) -> None:
        body = self.page(path)
        self.transport.write(_message(200, body + b"and then some", [("Content-Length", str(len(body)))]))

    async def garbage(self, fault: Fault, path: str, query: str) -> None:
        self.transport.write(b"\x16\x03 this is no HTTP\r\n\r\n")
        self.transport.close()

    async def redirect(self, fault: Fault, path: str, query: str) -> None:
        hop = int(dict(parse_qsl(query)).get("hop", "0"))
        location = fault.location
        if hop < fault.count:
            given = "&".join(part for part in query.split("&") if part and not part.startswith("hop="))
            location = f"{path}?{given}{'&' if given else ''}hop={hop + 1}"
        self.transport.write(_message(fault.status or 302, b"moved", [("Location", location)] if location else []))

    async def loop(self, fault: Fault, path: str, query: str) -> None:
        self.transport.write(_message(fault.status or 302, b"", [("Location", f"{path}?{query}" if query else path)]))

    async def headers(self, fault: Fault, path: str, query: str) -> None:
        self.transport.write(_message(fault.status or 200, self.page(path), fault.headers))

    async def gzip(self, fault: Fault, path: str, query: str) -> None:
        self.transport.write(_message(200, gzip.compress(self.page(path)), [("Content-Encoding", "gzip")]))

    async def bomb(self, fault: Fault, path: str, query: str) -> None:
        self.transport.write(_message(200, gzip.compress(bytes(fault.size), 1), [("Content-Encoding", "gzip")]))

    async def endless(self, fault: Fault, path: str, query: str) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for _ in range(fault.size // 2**14):
            if self.transport.is_closing():
                return
            self.transport.write(b"\xff" * 2**14)
            while self.transport.get_write_buffer_size() and not self.transport.is_closing():
                await asyncio.sleep(0.001)
        self.transport.close()

    async def chunked(self, fault: Fault, path: str, query: str) -> None:
        body = self.page(path)
        pieces = [body[start : start + 5000] for start in range(0, len(body), 5000)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        self.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")

    async def raw(self, fault: Fault, path: str, query: str) -> None:
        self.transport.write(fault.raw)
        self.transport.close()


_FAULTS: dict[str, Callable[[_Connection, Fault, str, str], Awaitable[None]]] = {kind: getattr(_Connection, kind) for kind in get_args(Kind)}


def _message(status: int, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> bytes:
    """An HTTP/1.1 response. Announces the length of `body` unless `headers` announce another."""
    lines = [f"HTTP/1.1 {status} Status"]
    if not any(name.lower() == "content-length" for name, _ in headers):
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _reset(transport: asyncio.Transport) -> None:
    """Closes with RST in place of FIN."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _fault_of_query(query: str) -> Fault:
    """`fault=status&status=503&times=2&header=X-Robots-Tag:noai` -> Fault."""
    types: dict[str, Callable[[str], Any]] = {"times": int, "status": int, "count": int, "cut": int, "size": int, "pause_s": float, "raw": str.encode}
    known = {one.name for one in fields(Fault)}
    pairs = parse_qsl(query)
    values = {name: types.get(name, str)(value) for name, value in pairs if name in known}
    headers = tuple((value.partition(":")[0], value.partition(":")[2].strip()) for name, value in pairs if name == "header")
    return Fault(kind=dict(pairs)["fault"], headers=headers, **values)  # type: ignore[arg-type]


class ServerProcess:
    """The server in a process of its own, so that its work does not count as the client's. `arguments` are those of the command line."""

    def __init__(self, folder: Path | str, *arguments: str) -> None:
        self.command = [sys.executable, "-m", "tests.data_prep.web_server", str(folder), *arguments]
        self.process: subprocess.Popen[str]
        self.hosts: list[str]
        self.port: int

    def __enter__(self) -> "ServerProcess":
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} did not start")
        started = json.loads(line)
        self.hosts, self.port = started["hosts"], started["port"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()  # it serves until its input ends, so it never outlives a killed parent
        self.process.wait(10)
        self.process.stdout.close()

    def url(self, path: str, host: str | None = None) -> str:
        """Absolute address of a path, on the first host unless another is named."""
        return f"http://{host or self.hosts[0]}:{self.port}{path}"

    def heal(self) -> None:
        """As `WebServer.heal`."""
        self._ask("/_heal")

    def stats(self) -> dict[str, Any]:
        """As `WebServer.stats`."""
        stats: dict[str, Any] = self._ask("/_stats")
        return stats

    def log(self) -> list[list[Any]]:
        """[path, host, user agent, time] of every request."""
        log: list[list[Any]] = self._ask("/_log")
        return log

    def _ask(self, path: str) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url(path), timeout=30) as response:
            return json.load(response)


def main() -> None:
    """Serves a folder until the standard input ends; prints one line of JSON with `hosts` and `port` when it is up."""
    parser = argparse.ArgumentParser(description="Serves a folder on loopback, with faults on request.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hosts", nargs="+", default=["127.0.0.1"])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--robots", type=Path, help="file with the content of /robots.txt")
    parser.add_argument("--delay", nargs=2, type=float, default=(0.0, 0.0), metavar=("LOW", "HIGH"), help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fail-share", type=float, default=0.0, help="share of the paths that fail until /_heal is asked for")
    parser.add_argument("--fail-with", default="fault=status&status=503", help="a fault, written as in a query")
    arguments = parser.parse_args()
    server = WebServer(
        arguments.folder,
        hosts=arguments.hosts,
        port=arguments.port,
        robots=arguments.robots.read_text(encoding="utf-8") if arguments.robots else None,
        delay_s=tuple(arguments.delay),
        seed=arguments.seed,
        fail_share=arguments.fail_share,
        fail_with=_fault_of_query(arguments.fail_with),
    )
    with server:
        print(json.dumps({"hosts": list(server.options.hosts), "port": server.port}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
