"""The HTTP proxy that ends TLS itself and hands every request to the rehearsed Azure.

Listens on loopback only. A CONNECT to any host is answered here: nothing leaves the machine. Only
a client that trusts ca.pem, the certificate of the rehearsal's own authority, accepts it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import ssl
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trustme

from .cloud import Cloud, router
from .identity import check_right, check_token
from .wire import AzureError, Reply, Request

_log = logging.getLogger(__name__)
_IDLE_SECONDS = 300.0  # of a kept-alive connection; the SDKs poll more often


class Proxy:
    """Serves until `close`. `url` is the value for HTTPS_PROXY."""

    def __init__(self, cloud: Cloud, authority: Authority, port: int = 0) -> None:
        try:
            self._server = _Server(("127.0.0.1", port), _Connection)
        except OSError:  # another program has it by now
            self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.cloud, self._server.authority = cloud, authority
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; connections that are open end with the process."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    cloud: Cloud
    authority: Authority


class CutError(Exception):
    """An injected fault: the connection breaks off."""


class _Connection(BaseHTTPRequestHandler):
    """One connection: CONNECT, TLS, then any number of requests."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "phi3-rehearsal", ""
    timeout = _IDLE_SECONDS
    _host = ""

    def do_CONNECT(self) -> None:
        """Act as the host that the client wants to reach."""
        self._host = self.path.rsplit(":", 1)[0].strip("[]").lower()
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self.wfile.flush()
        context = self.server.authority.context(self._host)
        try:
            self.connection = context.wrap_socket(self.connection, server_side=True)
        except (ssl.SSLError, OSError) as error:
            _log.warning("%s: the client ended the TLS handshake: %s", self._host, error)
            self.close_connection = True
            return
        self.rfile = self.connection.makefile("rb", -1)
        self.wfile = self.connection.makefile("wb")
        self.close_connection = False

    def handle_expect_100(self) -> bool:
        """Let the client send its body: the writer is buffered, so say it at once."""
        answered = super().handle_expect_100()
        self.wfile.flush()
        return answered

    def _serve(self) -> None:
        host = self._host or (urlsplit(self.path).hostname or "")
        headers = {name.lower(): value for name, value in self.headers.items()}
        if "chunked" in headers.get("transfer-encoding", "").lower():
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers, up to the empty line
                pass
            body = b"".join(pieces)
        else:
            body = self.rfile.read(int(headers.get("content-length") or 0))
        request = Request(self.command, host, self.path, headers, body)
        try:
            reply = answer(self.server.cloud, request)
        except CutError:
            # A reset, no polite end, as when a gateway dies: with linger on and 0 s close() sends
            # RST, not FIN.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        try:
            self._send(reply)
        except (ssl.SSLError, OSError):
            self.close_connection = True  # the client went away

    # The names that http.server calls.
    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = do_OPTIONS = _serve  # noqa: N815

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        body = reply.body
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            reply.headers.setdefault("Content-Type", "application/json; charset=utf-8")
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if isinstance(body, bytes) or body is None:
            if "Content-Length" not in reply.headers and reply.status not in (204, 304):
                self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(body)
        else:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in filter(None, body):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def finish(self) -> None:
        """Close; a connection that was cut has nothing left to flush."""
        with contextlib.suppress(ValueError, OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Nothing: the journal has every call, without its query."""


def answer(cloud: Cloud, request: Request) -> Reply:
    """The service's answer, or the fault that is to happen instead; CutError where none comes."""
    fault = cloud.faults.of_call(request)
    if fault and fault.kind == "reset":
        cloud.journal(request, "reset")
        raise CutError
    if fault and fault.kind != "reset-after":
        reply = fault.error().reply()
    else:
        reply = _dispatch(cloud, request)
    lost = fault is not None and fault.kind == "reset-after"
    deployment = reply.headers.get("azureml-model-deployment", "")
    cloud.journal(request, f"{reply.status} answer lost" if lost else reply.status, deployment)
    if lost:
        raise CutError
    return reply


def _dispatch(cloud: Cloud, request: Request) -> Reply:
    match = router.find(request)
    if match is None:
        text = f"The rehearsal does not know {request.method} https://{request.host}{request.path}"
        return AzureError(501, "NotRehearsed", text).reply()
    route, request.args = match
    try:
        claims = check_token(cloud, request, route.audience)
        if claims is not None:
            check_right(cloud, str(claims["oid"]), request)
        if not route.locked:
            return route.handler(cloud, request)
        with cloud.lock:
            cloud.settle()
            try:
                return route.handler(cloud, request)
            finally:
                cloud.save()
    except AzureError as error:
        return error.reply()


# --- the certificate authority ---


class Authority:
    """Hands out TLS contexts that present a certificate for any host name."""

    def __init__(self, folder: Path) -> None:
        self.ca_file = folder / "ca.pem"
        key_file = folder / "ca.key"
        if self.ca_file.is_file() and key_file.is_file():
            self._ca = trustme.CA.from_pem(self.ca_file.read_bytes(), key_file.read_bytes())
        else:
            self._ca = trustme.CA(organization_name="phi3 rehearsal, not Azure")
            folder.mkdir(parents=True, exist_ok=True)
            key_file.unlink(missing_ok=True)
            descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self._ca.private_key_pem.bytes())
            self._ca.cert_pem.write_to_path(self.ca_file)
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._lock = threading.Lock()

    def context(self, host: str) -> ssl.SSLContext:
        """The server side of TLS for `host`."""
        with self._lock:
            if host not in self._contexts:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                self._ca.issue_cert(host).configure_cert(context)
                self._contexts[host] = context
            return self._contexts[host]
