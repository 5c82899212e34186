"""Downloads songs from URLs that strangers give to a server.

Such a URL must not reach the server itself or machines that only its network can reach (server-side request forgery).
So this module resolves the host, checks all its addresses, and connects to one of them. It resolves only once, because
a hostile name server could give another address the second time (DNS rebinding). Redirects are checked the same way.
Behind a proxy (http_proxy, https_proxy), the proxy connects and decides what it reaches; a host that can be resolved
here is checked all the same.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from requests import PreparedRequest, Response, Session, TooManyRedirects
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidSchema, ProxyError
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import ConnectTimeoutError, DecodeError, NewConnectionError

from separation.errors import AudioError, InputError
from separation.settings import switch
from separation.system.network_errors import why_no_connection
from separation.web.errors import log_traceback

LOCAL, PRIVATE = "SEPARATION_LOCAL_URLS", "SEPARATION_PRIVATE_URLS"
DOWNLOAD_SECONDS = 600.0  # for the whole download
SILENT_SECONDS = 10.0  # to connect, and between two bytes
RETRY_SECONDS = 0.5  # before a download that broke off is tried once more
MAX_REDIRECTS = 10
BLOCK_BYTES = 1 << 16

Address = IPv4Address | IPv6Address
THIS_NETWORK = ip_network("0.0.0.0/8")
SITE_LOCAL = ip_network("fec0::/10")  # private addresses of IPv6 before fc00::/7
NAT64 = ip_network("64:ff9b::/96")
ISATAP = (0x00005EFE, 0x02005EFE)  # the third 32 bits of an address; the IPv4 address follows
# Metadata services of Alibaba, Amazon, Azure, Google and Oracle, besides the link-local 169.254.169.254. They hand out
# credentials.
METADATA = {
    ip_address(text) for text in ("100.100.100.200", "fd00:ec2::254", "168.63.129.16", "fd20:ce::254", "192.0.0.192")
}


logger: logging.Logger = logging.getLogger("separation")


@dataclass(frozen=True)
class Allowed:
    """The addresses that songs may come from, besides public ones."""

    local: bool = False  # this machine, its link, and its cloud's services
    private: bool = True  # private networks: a hosting platform may keep its users' songs there

    @classmethod
    def from_environment(cls) -> Self:
        """What SEPARATION_LOCAL_URLS and SEPARATION_PRIVATE_URLS allow. Raises InputError unless each is on or off."""
        return cls(switch(LOCAL, default=False), switch(PRIVATE, default=True))


class BrokenOffError(InputError):
    """A download failed in a way that another try may mend."""


def save(content: Callable[[], Generator[bytes, None, None]], path: Path, max_mib: float) -> None:
    """Write what `content` yields to a file. If that breaks off, it is called once more, and the file starts anew.

    Raises AudioError if there are more than `max_mib` MiB, and what `content` raises.
    """
    try:
        _write(content(), path, max_mib)
    except BrokenOffError as e:
        logger.warning("%s; trying once more", str(e).partition(": ")[0])
        time.sleep(RETRY_SECONDS)
        try:
            _write(content(), path, max_mib)
        except BrokenOffError as again:
            raise InputError(str(again)) from again


def _write(blocks: Generator[bytes, None, None], path: Path, max_mib: float) -> None:
    n_bytes = 0
    with path.open("wb") as file, closing(blocks):
        for block in blocks:
            n_bytes += len(block)
            if n_bytes > max_mib * 2**20:
                raise AudioError(f"{path.name!r} has more than {max_mib:,g} MiB, the limit here: send a smaller file")
            file.write(block)


def download(url: str, name: str, allowed: Allowed) -> Generator[bytes, None, None]:
    """Yield the content behind an http or https URL block by block. `name` is the song's name in errors.

    Raises InputError if the address is not allowed or the download fails: a BrokenOffError if the connection failed or
    the web server has an error of its own (5xx).
    """
    with _Guard(name, allowed) as guard, _session(guard) as session:
        try:
            with session.get(url, stream=True, timeout=SILENT_SECONDS) as response:
                response.raise_for_status()
                response.raw.decode_content = True
                while block := response.raw.read1(BLOCK_BYTES):
                    yield block
            guard.check_time()  # a connection cut at the deadline can look like the end of the file
        except InputError:
            raise
        except TooManyRedirects as e:
            raise InputError(f"{name!r} is redirected more than {MAX_REDIRECTS} times: give the file's own URL") from e
        except Exception as e:  # from the HTTP client or the socket
            guard.check_time()
            log_traceback()
            status = getattr(getattr(e, "response", None), "status_code", None)
            reason = f"the {'proxy' if status == 407 else 'web server'} answers {status}" if status else _reason(e)
            # Errors of the URL itself are ValueErrors: another try would fail in the same way.
            may_pass = status >= 500 if status else not isinstance(e, ValueError)
            raise (BrokenOffError if may_pass else InputError)(
                f"{name!r} could not be downloaded ({reason}): check the URL"
            ) from e


def _reason(error: Exception) -> str:
    """Why a song could not be downloaded, in words without a host or an address."""
    match error:
        case InvalidSchema():
            return "it is no http or https URL"
        case ValueError():
            return "it is not a valid URL"
        case DecodeError():
            return "its compression is damaged"
    return why_no_connection(error, with_proxy=isinstance(error, ProxyError))


def kind_of_address(address: Address) -> str:
    """What makes an address, or the IPv4 address in it, not public; empty for a public one.

    Every kind except `a private address` counts as local.
    """
    for inner in _inner(address):
        kinds = {
            "a loopback address": inner.is_loopback,
            "an unspecified address": inner.is_unspecified or inner in THIS_NETWORK,
            "a link-local address": inner.is_link_local,
            "a multicast address": inner.is_multicast,
            "a cloud's metadata address": inner in METADATA,
            "a reserved address": inner.is_reserved,
            "an address of this server": _is_own(inner),
            "a private address": not inner.is_global or inner in SITE_LOCAL,
        }
        if kind := next((kind for kind, holds in kinds.items() if holds), ""):
            return kind
    return ""


def _inner(address: Address) -> list[Address]:
    """The IPv4 addresses that an IPv6 address is translated or tunnelled to, or else the address itself."""
    if isinstance(address, IPv4Address):
        return [address]
    number = int(address)
    found: list[Address | None] = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in NAT64 or (number >> 32) & 0xFFFFFFFF in ISATAP:
        found.append(IPv4Address(number & 0xFFFFFFFF))
    return [inner for inner in found if inner] or [address]


def _is_own(address: Address) -> bool:
    """Whether this machine has the address.

    A machine reaches its own address from that same address. Connecting a UDP socket shows this and sends nothing.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:  # OSError: no route to it
        probe.connect((str(address), 9))
        return ip_address(probe.getsockname()[0]) == address
    return False


class _Guard:
    """Limits one download to allowed addresses and to DOWNLOAD_SECONDS."""

    def __init__(self, name: str, allowed: Allowed) -> None:
        self._name, self._allowed = name, allowed
        self._sockets: list[socket.socket] = []
        self._expired = threading.Event()
        self._timer = threading.Timer(DOWNLOAD_SECONDS, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()
        for connection in self._sockets:
            connection.close()

    def addresses(self, host: str, port: int | None) -> list[str]:
        """The addresses of a host. Raises InputError if one of them is not allowed."""
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for address in found:
            kind = kind_of_address(ip_address(address))
            if kind == "a private address" and not self._allowed.private:
                self._refuse(host, kind, PRIVATE)
            if kind not in ("", "a private address") and not self._allowed.local:
                self._refuse(host, kind, LOCAL)
        return found

    def watch(self, connection: socket.socket) -> None:
        """Cut the connection when the time is up."""
        self._sockets.append(connection.dup())  # TLS takes over the socket itself
        self.check_time()

    def check_time(self) -> None:
        if self._expired.is_set():
            raise InputError(
                f"{self._name!r} could not be downloaded within {DOWNLOAD_SECONDS:g} s: put it on a faster web server"
            )

    def _refuse(self, host: str, kind: str, variable: str) -> None:
        raise InputError(
            f"{self._name!r} is at {host!r:.100}, {kind}, which this server does not download from: "
            f"give a public URL, or set {variable}=on on the server if its network is trusted"
        )

    def _expire(self) -> None:
        self._expired.set()
        for connection in list(self._sockets):
            with suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)


class _Connection(HTTPConnection):
    """A connection to an address that the guard has checked."""

    def __init__(self, guard: _Guard, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard = guard

    def _new_conn(self) -> socket.socket:
        name = self._dns_host
        try:
            *others, last = self._guard.addresses(name, self.port)
            for address in others:
                with suppress(ConnectTimeoutError, NewConnectionError):
                    return self._connected(address)
            return self._connected(last)
        finally:
            self._dns_host = name  # for the certificate and the Host header

    def _connected(self, address: str) -> socket.socket:
        self._guard.check_time()
        self._dns_host = address
        connection = super()._new_conn()
        self._guard.watch(connection)
        return connection


class _TLSConnection(_Connection, HTTPSConnection):
    """The same over TLS."""


class _Adapter(HTTPAdapter):
    """Makes guarded connections, for each redirect too."""

    def __init__(self, guard: _Guard) -> None:
        super().__init__()
        self._guard = guard

    def get_connection_with_tls_context(
        self, request: PreparedRequest, *args: Any, **options: Any
    ) -> HTTPConnectionPool:
        pool = super().get_connection_with_tls_context(request, *args, **options)
        if pool.proxy:
            with suppress(socket.gaierror, UnicodeError):  # only the proxy can resolve it
                self._guard.addresses(urlsplit(str(request.url)).hostname or "", None)
        else:
            connection = _TLSConnection if pool.scheme == "https" else _Connection
            pool.ConnectionCls = partial(connection, self._guard)  # type: ignore[assignment]
        return pool


def _session(guard: _Guard) -> Session:
    session = Session()
    session.max_redirects = MAX_REDIRECTS
    session.adapters.clear()
    session.mount("http://", _Adapter(guard))
    session.mount("https://", _Adapter(guard))
    session.hooks["response"].append(_without_body)
    if agent := os.environ.get("COG_USER_AGENT"):  # as for Cog's own downloads
        session.headers["User-Agent"] = agent
    return session


def _without_body(response: Response, **_: Any) -> None:
    """Close redirects: requests would read their bodies, however long."""
    if response.is_redirect:
        response.close()
