"""The entry point of `separation` and `python -m separation`.

The imports take a while. Until `run` handles signals, Ctrl-C ends the program at once and without a traceback.
"""

import _signal  # type: ignore[import-not-found]  # `signal` also imports enumerations, which takes time

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from separation.cli.process import run

__all__ = ["run"]
