"""An S3 server that misbehaves on request: a reverse proxy in front of the real test server, with a hook for every request."""

import http.client
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

Verdict = Literal["pass", "reset", "lose_reply"] | tuple[int, str]
"""Let it through; break the connection off; let it through and break off instead of answering; or answer (status, S3 error code)."""

Hook = Callable[[str, str, dict[str, str]], Verdict]
"""(method, path, query) -> verdict."""


class S3Proxy(ThreadingHTTPServer):
    """Forwards to `upstream` (host:port) what `hook` lets through."""

    daemon_threads = True

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls is not None:
            # The handshake belongs into the thread of the connection: here it would keep all others waiting.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "https" if tls is not None else "http"
        self.upstream = upstream
        self.hook: Hook = lambda method, path, query: "pass"
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.num_bytes = 0  # of all answers

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL has to be."""
        return f"{self.scheme}://localhost:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave early are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        body = self._body()
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query, keep_blank_values=True).items()}
        self.server.seen.append((self.command, address.path, query))
        verdict = self.server.hook(self.command, address.path, query)
        if verdict == "reset":
            self._break_off()
        elif isinstance(verdict, tuple):
            status, code = verdict
            self._answer(status, [("Content-Type", "application/xml")], f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())
        else:
            upstream = http.client.HTTPConnection(self.server.upstream)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding", "content-length")}
            upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            reply = upstream.getresponse()
            data = reply.read()
            if verdict == "lose_reply":
                self._break_off()
            else:
                self._answer(reply.status, reply.getheaders(), data)
            upstream.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            is_length_of_head = name.lower() == "content-length" and self.command == "HEAD"
            if is_length_of_head or name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.server.num_bytes += len(data)
            self.wfile.write(data)

    def _break_off(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
        self.connection.close()
        self.close_connection = True


@contextmanager
def s3_proxy(endpoint: str, tls: ssl.SSLContext | None = None) -> Iterator[S3Proxy]:
    """A running proxy in front of `endpoint`, spoken to by https if `tls` is given."""
    with S3Proxy(urlsplit(endpoint).netloc, tls) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()


def times(number: int, verdict: Verdict, match: Callable[[str, str, dict[str, str]], bool]) -> Hook:
    """A hook that gives `verdict` to the first `number` requests that match, and lets all others through."""
    lock, left = threading.Lock(), [number]

    def hook(method: str, path: str, query: dict[str, str]) -> Verdict:
        with lock:
            if match(method, path, query) and left[0] > 0:
                left[0] -= 1
                return verdict
        return "pass"

    return hook


def own_authority(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """(PEM file of an authority that nobody else knows, the context of a server on localhost whose certificate it signed)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.now(timezone.utc)
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in ("Tests", "localhost")]
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in names]
    pems = []
    for name, key, is_authority in zip(names, keys, (True, False), strict=True):
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False
        )
        certificate = (
            x509.CertificateBuilder(names[0], name, key.public_key(), x509.random_serial_number(), now - timedelta(days=1), now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=is_authority, crl_sign=is_authority, **usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name.rdns[0].rfc4514_string()[3:])]), critical=False)
            .sign(keys[0], hashes.SHA256())
        )
        pems.append(certificate.public_bytes(serialization.Encoding.PEM))
    authority, served = folder / "authority.pem", folder / "server.pem"
    authority.write_bytes(pems[0])
    secret = keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    served.write_bytes(pems[1] + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served)
    return authority, context
