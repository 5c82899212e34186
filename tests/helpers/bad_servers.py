"""Web servers on 127.0.0.1 that break off in one of many ways, and the words in which a download says so."""

import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HEAD = b"HTTP/1.1 200 OK\r\n"
SILENT_SECONDS = 0.2  # how long a client should wait for a byte


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _sends(content: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(content)


def _nothing(connection: socket.socket) -> None:
    pass


def _waits(connection: socket.socket) -> None:
    connection.recv(1)  # until the client gives up


ANSWERS: dict[str, tuple[str, Callable[[socket.socket], None], str]] = {  # the scheme, what to do, what is said
    "reset": ("http", _reset, "the connection was reset"),
    "closed": ("http", _nothing, "the connection was closed without an answer"),
    "cut chunk": (
        "http",
        _sends(HEAD + b"Transfer-Encoding: chunked\r\n\r\n10\r\nabc"),
        "the connection was closed early",
    ),
    "silent": ("http", _waits, "the connection timed out"),
    "other protocol": ("http", _sends(b"SSH-2.0-OpenSSH_9.6\r\n"), "the answer is not HTTP"),
    "no TLS": ("https", _sends(HEAD + b"Content-Length: 0\r\n\r\n"), "the server does not speak HTTPS"),
    "TLS cut": ("https", _nothing, "the connection was closed early"),
    "self-signed": ("tls", _nothing, "the certificate is not trusted: self-signed certificate"),
}
FAILURES = {name: words for name, (_, _, words) in ANSWERS.items()} | {
    "refused": "the connection was refused",
    "no name": "there is no host of that name",
    "no name server": "no name server answers",
    "proxy refused": "through the proxy: the connection was refused",
    "proxy's password": "the proxy answers 407",
}


@contextmanager
def failing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL of a server that fails in one of the ways in FAILURES."""
    for variable in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    if name in ANSWERS:
        scheme, answer, _ = ANSWERS[name]
        with serving(answer, _certified(tmp_path) if scheme == "tls" else None) as place:
            yield f"{scheme.replace('tls', 'https')}://{place}/file"
    elif name == "proxy's password":
        with serving(_sends(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")) as place:
            monkeypatch.setenv("https_proxy", f"http://{place}")
            yield "https://songs.invalid/file"
    elif name.startswith("no name"):
        number = socket.EAI_AGAIN if name == "no name server" else socket.EAI_NONAME

        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(number, "what the system says")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        yield "http://songs.invalid/file"
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = f"127.0.0.1:{server.getsockname()[1]}"
        if name == "proxy refused":
            monkeypatch.setenv("https_proxy", f"http://{place}")
        yield "https://songs.invalid/file" if name == "proxy refused" else f"http://{place}/file"


@contextmanager
def serving(answer: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that answers one connection after the other. Yields its host and port."""
    over = threading.Event()

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection:
                if over.is_set():
                    return
                try:
                    connection.settimeout(10)
                    if tls:
                        connection = tls.wrap_socket(connection, server_side=True)
                    connection.recv(1 << 16)
                    answer(connection)
                except OSError:  # the client has gone, or refuses the certificate
                    pass
                finally:
                    connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            socket.create_connection(server.getsockname()).close()
            thread.join()


def _certified(folder: Path) -> ssl.SSLContext:
    """A server's TLS with a certificate that nobody has signed."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    new = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run(
        [*new, "-subj", "/CN=localhost", "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context
