"""Why a connection failed, in words: libraries only give the name of a class, or wrap the reason in several others."""

import errno
import socket
import ssl
from collections.abc import Iterator
from http.client import HTTPException, IncompleteRead, RemoteDisconnected

UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
TUNNEL = "Tunnel connection failed: "  # how http.client begins a proxy's refusal


def why_no_connection(error: BaseException, *, with_proxy: bool = False) -> str:
    """What went wrong, such as "the connection was reset". `with_proxy`: there was a proxy on the way.

    No address and no text of the other side is in it.
    """
    causes = [*_causes(error)]
    why = next((words for told in _TOLD for cause in causes if (words := told(cause))), "the connection failed")
    return f"through the proxy: {why}" if with_proxy and not why.startswith("the proxy") else why


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that it wraps, the outermost first."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        inner = (each.__cause__, each.__context__, getattr(each, "reason", None), *each.args)
        waiting += [one for one in inner if isinstance(one, BaseException)]


def _certificate(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    return ""


def _tls(error: BaseException) -> str:
    if not isinstance(error, ssl.SSLError) or isinstance(error, TimeoutError):
        return ""
    reason = str(getattr(error, "reason", None) or "").replace("_", " ").lower()
    if isinstance(error, ssl.SSLEOFError) or "unexpected eof" in reason:
        return "the connection was closed early"
    if reason in ("wrong version number", "http request"):
        return "the server does not speak HTTPS"
    return f"TLS failed: {reason}" if reason else "TLS failed"


def _name(error: BaseException) -> str:
    if not isinstance(error, socket.gaierror):
        return ""
    return "no name server answers" if error.errno == socket.EAI_AGAIN else "there is no host of that name"


def _tunnel(error: BaseException) -> str:
    text = str(error) if isinstance(error, OSError) else ""
    return f"the proxy answers {text.split()[3]}" if text.startswith(TUNNEL) else ""


def _socket(error: BaseException) -> str:
    match error:
        case TimeoutError():
            return "the connection timed out"
        case RemoteDisconnected():
            return "the connection was closed without an answer"
        case ConnectionRefusedError():
            return "the connection was refused"
        case ConnectionError():
            return "the connection was reset"
        case OSError() if error.errno in UNREACHABLE:
            return "there is no route to the server"
    return ""


def _http(error: BaseException) -> str:
    if isinstance(error, IncompleteRead):
        return "the connection was closed early"
    return "the answer is not HTTP" if isinstance(error, HTTPException) else ""


_TOLD = (_certificate, _name, _tunnel, _tls, _socket, _http)  # the first that knows one of the errors
