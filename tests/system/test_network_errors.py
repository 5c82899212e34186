"""Reasons are found through the errors that wrap them. Real connections fail in the tests of both downloads."""

import errno
import ssl
from http.client import IncompleteRead
from urllib.error import URLError

import pytest

from separation.system.network_errors import TUNNEL, why_no_connection


def raised(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as e:
        return e


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.EHOSTUNREACH, "No route to host"), "there is no route to the server"),
        (BrokenPipeError(), "the connection was reset"),
        (TimeoutError(), "the connection timed out"),
        (IncompleteRead(b"ab", 3), "the connection was closed early"),
        (ssl.SSLError(1, "[SSL: TLSV1_ALERT_PROTOCOL_VERSION] (x.c:1)"), "TLS failed"),
        (OSError(f"{TUNNEL}502 <secret>"), "the proxy answers 502"),
        (RuntimeError("10.0.0.1 is not for you"), "the connection failed"),
    ],
)
def test_each_error_has_its_words_however_deep_it_is(error: Exception, words: str) -> None:
    for wrapped in (error, URLError(error), raised(RuntimeError("no"), error), Exception("pool", URLError(error))):
        assert why_no_connection(wrapped) == words


def test_errors_that_cause_each_other_end() -> None:
    one, other = RuntimeError(), ConnectionResetError()
    one.__context__, other.__context__ = other, one
    assert why_no_connection(one, with_proxy=True) == "through the proxy: the connection was reset"
