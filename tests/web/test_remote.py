"""The container downloads songs from allowed addresses only, within limits."""

import itertools
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from helpers.bad_servers import FAILURES, SILENT_SECONDS, failing, serving
from helpers.common import quick_first
from helpers.served_process import Receiver
from separation.errors import AudioError, InputError
from separation.web import remote
from separation.web.remote import Allowed, download, kind_of_address, save

ALL = Allowed(local=True)


def fetched(url: str, allowed: Allowed = ALL) -> bytes:
    with closing(download(url, "song.wav", allowed)) as content:
        return b"".join(content)


def refusal(host: str, kind: str, name: str = "SEPARATION_LOCAL_URLS") -> str:
    reason = f"'song.wav' is at {host!r}, {kind}, which this server does not download from"
    return f"{reason}: give a public URL, or set {name}=on on the server if its network is trusted"


# Kinds of addresses

LOOPBACK, LINK, MULTICAST = "a loopback address", "a link-local address", "a multicast address"
UNSPECIFIED, METADATA, PRIVATE = "an unspecified address", "a cloud's metadata address", "a private address"
RESERVED = "a reserved address"


@pytest.mark.parametrize(
    "address, kind",
    [
        ("127.0.0.1", LOOPBACK),
        ("127.255.0.3", LOOPBACK),
        ("::1", LOOPBACK),
        ("0.0.0.0", UNSPECIFIED),
        ("0.1.2.3", UNSPECIFIED),
        ("::", UNSPECIFIED),
        ("169.254.169.254", LINK),
        ("fe80::1", LINK),
        ("fe80::1%1", LINK),
        ("febf::1", LINK),
        ("224.0.0.1", MULTICAST),
        ("239.255.255.255", MULTICAST),
        ("ff02::1", MULTICAST),
        ("255.255.255.255", RESERVED),
        ("240.0.0.1", RESERVED),
        ("::127.0.0.1", RESERVED),
        ("::ffff:0:127.0.0.1", RESERVED),
        ("64:ff9b:1::7f00:1", RESERVED),
        ("fd00:ec2::254", METADATA),
        ("100.100.100.200", METADATA),
        ("168.63.129.16", METADATA),
        ("10.0.0.1", PRIVATE),
        ("172.16.0.1", PRIVATE),
        ("172.31.255.255", PRIVATE),
        ("192.168.1.1", PRIVATE),
        ("100.64.0.1", PRIVATE),
        ("100.127.255.255", PRIVATE),
        ("fc00::1", PRIVATE),
        ("fdff::1", PRIVATE),
        ("fec0::1", PRIVATE),
        ("198.18.0.1", PRIVATE),
        ("9.255.255.255", ""),
        ("11.0.0.1", ""),
        ("172.15.255.255", ""),
        ("172.32.0.1", ""),
        ("100.128.0.1", ""),
        ("128.0.0.1", ""),
        ("126.255.255.255", ""),
        ("223.255.255.255", ""),
        ("2606:4700::1111", ""),
    ],
)
def test_each_address_has_its_kind(address: str, kind: str) -> None:
    assert kind_of_address(ip_address(address)) == kind


@pytest.mark.parametrize(
    "form",
    [
        "::ffff:{0}",  # mapped
        "64:ff9b::{0}",  # NAT64
        "2002:{1}::1",  # 6to4
        "2606:4700::5efe:{0}",  # ISATAP
        "2606:4700::200:5efe:{0}",
        "2001:0:{1}:0:0:f7f7:f7f7",  # Teredo: the server
        "2001:0:808:808::{2}",  # Teredo: the client
    ],
)
@pytest.mark.parametrize(
    "inner, kind", [("127.0.0.1", LOOPBACK), ("169.254.169.254", LINK), ("10.1.2.3", PRIVATE), ("8.8.8.8", "")]
)
def test_an_ipv6_address_has_the_kind_of_the_ipv4_address_in_it(form: str, inner: str, kind: str) -> None:
    number = int(ip_address(inner))
    halves, inverse = [f"{n >> 16:x}:{n & 0xFFFF:x}" for n in (number, number ^ 0xFFFFFFFF)]
    assert kind_of_address(ip_address(form.format(inner, halves, inverse))) == kind


def test_this_machines_own_address_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("needs a network interface beside loopback")
        own = probe.getsockname()[0]
    assert kind_of_address(ip_address(own)) == "an address of this server"
    assert kind_of_address(ip_address(f"::ffff:{own}")) == "an address of this server"


# What is refused


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "0.0.0.0"),
        *("[::1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]"),
    ],
)
def test_this_machine_is_refused_in_every_notation(host: str) -> None:
    with Receiver() as receiver:
        port = receiver.url.rpartition(":")[2]
        receiver.files["/song.wav"] = b"secret"
        kind = UNSPECIFIED if host in ("0", "0.0.0.0") else LOOPBACK
        with pytest.raises(InputError) as caught:
            fetched(f"http://{host}:{port}/song.wav", Allowed())
        assert str(caught.value) == refusal(host.strip("[]"), kind)
        assert receiver.requests == []


@pytest.mark.parametrize("host", ["user:word@127.0.0.1", "127.0.0.1.", "①②⑦.0.0.1", "LOCALHOST", "127。0。0。1"])
def test_no_spelling_of_a_url_hides_this_machine(host: str) -> None:
    with Receiver() as receiver:
        port = receiver.url.rpartition(":")[2]
        with pytest.raises(InputError, match=r"a loopback address|could not be downloaded"):
            fetched(f"http://{host}:{port}/song.wav", Allowed())
        assert receiver.requests == []


def test_private_addresses_are_refused_only_if_the_setting_says_so(names: Callable[..., list[str]]) -> None:
    names(**{"songs.internal": ["10.1.2.3"]})
    with pytest.raises(InputError) as caught:
        fetched("http://songs.internal/song.wav", Allowed(private=False))
    assert str(caught.value) == refusal("songs.internal", PRIVATE, "SEPARATION_PRIVATE_URLS")
    guard = remote._Guard("song.wav", Allowed())
    assert guard.addresses("songs.internal", 80) == ["10.1.2.3"]


def test_the_environment_allows_local_and_refuses_private_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Allowed.from_environment() == Allowed(local=False, private=True)
    monkeypatch.setenv("SEPARATION_LOCAL_URLS", "on")
    monkeypatch.setenv("SEPARATION_PRIVATE_URLS", "off")
    assert Allowed.from_environment() == Allowed(local=True, private=False)


# Names


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Gives host names addresses: a list, or an iterator over lists, one for each look-up.

    Returns the list of the names that were looked up.
    """
    real, asked = socket.getaddrinfo, []
    known: dict[str, Any] = {}

    def getaddrinfo(host: str, port: Any, *args: Any, **options: Any) -> list[Any]:
        if host not in known:
            return real(host, port, *args, **options)
        asked.append(host)
        addresses = known[host] if isinstance(known[host], list) else next(known[host])
        return [info for address in addresses for info in real(address, port, *args, **options)]

    def name(**new: Any) -> list[str]:
        known.update(new)
        return asked

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return name


@pytest.fixture
def public_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A web server at 127.0.0.2, which counts as a public address here; 127.0.0.1 does not."""
    real = remote.kind_of_address
    public = ip_address("127.0.0.2")
    monkeypatch.setattr(remote, "kind_of_address", lambda address: "" if address == public else real(address))
    with Receiver("127.0.0.2") as receiver:
        receiver.files["/song.wav"] = b"a song"
        yield receiver


def test_a_name_is_refused_if_one_of_its_addresses_is_this_machine(
    names: Callable[..., list[str]], public_server: Receiver
) -> None:
    names(**{"here.example": ["127.0.0.1"], "both.example": ["127.0.0.2", "127.0.0.1"]})
    port = public_server.url.rpartition(":")[2]
    for host in ("here.example", "both.example"):
        with pytest.raises(InputError) as caught:
            fetched(f"http://{host}:{port}/song.wav", Allowed())
        assert str(caught.value) == refusal(host, LOOPBACK)
    assert public_server.requests == []


def test_a_name_is_resolved_once_and_the_checked_address_is_used(
    names: Callable[..., list[str]], public_server: Receiver
) -> None:
    rebinding = itertools.chain([["127.0.0.2"]], itertools.repeat(["127.0.0.1"]))
    asked = names(**{"rebinding.example": rebinding})
    port = public_server.url.rpartition(":")[2]
    assert fetched(f"http://rebinding.example:{port}/song.wav", Allowed()) == b"a song"
    assert asked == ["rebinding.example"]
    assert public_server.requests[0].headers["Host"] == f"rebinding.example:{port}"


def test_the_next_address_is_tried_if_one_does_not_answer(
    names: Callable[..., list[str]], public_server: Receiver
) -> None:
    names(**{"many.example": ["127.0.0.3", "127.0.0.2"]})
    url = public_server.url.replace("127.0.0.2", "many.example")
    assert fetched(f"{url}/song.wav") == b"a song"


@pytest.mark.parametrize("there", ["http://127.0.0.1:{0}/song.wav", "http://[::1]:{0}/x", "//localhost:{0}/x"])
def test_a_redirect_to_this_machine_is_not_followed(there: str, public_server: Receiver) -> None:
    with Receiver() as hidden:
        public_server.files["/moved.wav"] = there.format(hidden.url.rpartition(":")[2])
        with pytest.raises(InputError, match=f"{LOOPBACK}, which this server does not download from"):
            fetched(f"{public_server.url}/moved.wav", Allowed())
        assert hidden.requests == []
    assert len(public_server.requests) == 1


def test_a_redirect_to_a_public_address_is_followed(public_server: Receiver) -> None:
    public_server.files["/moved.wav"] = "/song.wav"
    assert fetched(f"{public_server.url}/moved.wav", Allowed()) == b"a song"


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_the_tls_certificate_is_checked_against_the_name(
    names: Callable[..., list[str]], public_server: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    new = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subject = ["-subj", "/CN=songs.example", "-addext", "subjectAltName=DNS:songs.example"]
    subprocess.run([*new, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    public_server._server.socket = context.wrap_socket(public_server._server.socket, server_side=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    names(**{"songs.example": ["127.0.0.2"], "other.example": ["127.0.0.2"]})
    url = public_server.url.replace("http://127.0.0.2", "https://songs.example")
    assert fetched(f"{url}/song.wav", Allowed()) == b"a song"
    with pytest.raises(
        InputError, match=r"could not be downloaded \(the certificate is not trusted: Hostname mismatch"
    ):
        fetched(f"{url.replace('songs', 'other')}/song.wav", Allowed())


def test_a_proxy_resolves_unknown_names_but_this_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        proxy.files["http://songs.invalid/song.wav"] = b"a song"
        assert fetched("http://songs.invalid/song.wav", Allowed()) == b"a song"
        with pytest.raises(InputError) as caught:
            fetched("http://127.0.0.1/song.wav", Allowed())
        assert str(caught.value) == refusal("127.0.0.1", LOOPBACK)
        assert [request.path for request in proxy.requests] == ["http://songs.invalid/song.wav"]


# Limits


def test_a_redirect_loop_ends_after_ten_redirects() -> None:
    with Receiver() as receiver:
        receiver.files["/song.wav"] = "/song.wav"
        with pytest.raises(InputError, match=r"redirected more than 10 times: give the file's own URL$"):
            fetched(f"{receiver.url}/song.wav")
        assert len(receiver.requests) == 11


@pytest.mark.parametrize("scheme", ["ftp", "file", "gopher", "data"])
def test_a_redirect_to_another_scheme_is_refused(scheme: str) -> None:
    with Receiver() as receiver:
        receiver.files["/song.wav"] = f"{scheme}://127.0.0.1/etc/passwd"
        with pytest.raises(InputError, match=r"could not be downloaded \(it is no http or https URL\): check the URL"):
            fetched(f"{receiver.url}/song.wav")


@contextmanager
def raw_server(*parts: bytes, endless: bytes) -> Iterator[str]:
    """Sends the parts to each client, then `endless` repeatedly until the client disconnects."""
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        for part in itertools.chain(parts, itertools.repeat(endless)):
            connection.sendall(part)
            if over.wait(0.01):
                return

    with serving(answer) as place:
        try:
            yield f"http://{place}"
        finally:
            over.set()


@pytest.mark.parametrize(
    "parts, endless",
    quick_first(
        [
            ([b"HTTP/1.1 200 OK\r\nX: "], b"x"),
            ([b"HTTP/1.1 200 OK\r\n\r\n"], b"x"),
            ([b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"], b"x"),
            ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], b"1\r\nx\r\n"),
        ],
        1,
    ),
    ids=["head", "body", "body of known length", "chunks"],
)
def test_a_slow_download_times_out(parts: list[bytes], endless: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DOWNLOAD_SECONDS", 0.3)
    with raw_server(*parts, endless=endless) as url, pytest.raises(InputError) as caught:
        fetched(url)
    assert str(caught.value) == "'song.wav' could not be downloaded within 0.3 s: put it on a faster web server"


def test_the_body_of_a_redirect_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver() as receiver:
        receiver.files["/song.wav"] = b"a song"
        head = f"HTTP/1.1 302 Found\r\nLocation: {receiver.url}/song.wav\r\n\r\n".encode()
        with raw_server(head, endless=bytes(1 << 16)) as url:
            assert fetched(url) == b"a song"


@contextmanager
def failing_server(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Answers in turn, and the last answer again and again; a status of 0 sends too little. Yields URL and requests."""
    requested: list[str] = []

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # http.server's name
            status, body = answers[min(len(requested), len(answers) - 1)]
            requested.append(self.path)
            self.send_response(status or 200)
            self.send_header("Content-Length", str(len(body) if status else 100))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/song.wav", requested
        finally:
            server.shutdown()


def saved(url: str, path: Path, max_mib: float = 1) -> bytes:
    save(lambda: download(url, "song.wav", ALL), path, max_mib)
    return path.read_bytes()


@pytest.mark.parametrize("first", [(0, b"a longer beginning"), (503, b"busy")])
def test_one_download_that_breaks_off_is_started_anew_with_a_warning(
    first: tuple[int, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)
    with failing_server(first, (200, b"a song")) as (url, requested):
        assert saved(url, tmp_path / "song.wav") == b"a song"
    assert len(requested) == 2
    (warning,) = caplog.messages
    assert warning.startswith("'song.wav' could not be downloaded (") and warning.endswith("); trying once more")


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_download_says_in_words_what_happened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SILENT_SECONDS", SILENT_SECONDS)
    with failing(name, tmp_path, monkeypatch) as url, pytest.raises(InputError) as caught:
        fetched(url)
    assert str(caught.value) == f"'song.wav' could not be downloaded ({FAILURES[name]}): check the URL"


@pytest.mark.parametrize("answer, tries", [((0, b"short"), 2), ((500, b""), 2), ((404, b""), 1)])
def test_a_download_that_keeps_failing_is_an_error(
    answer: tuple[int, bytes], tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)
    with (
        failing_server(answer) as (url, requested),
        pytest.raises(InputError, match="could not be downloaded") as caught,
    ):
        saved(url, tmp_path / "song.wav")
    assert type(caught.value) is InputError  # its name is part of what clients read
    assert len(requested) == tries


def test_a_download_is_accepted_up_to_the_limit_and_not_tried_again_beyond_it(tmp_path: Path) -> None:
    with failing_server((200, bytes(2**19))) as (url, requested):
        assert len(saved(url, tmp_path / "song.wav", 0.5)) == 2**19
        with pytest.raises(AudioError, match=r"'song\.wav' has more than 0\.4 MiB, the limit here"):
            saved(url, tmp_path / "song.wav", 0.4)
    assert len(requested) == 2
