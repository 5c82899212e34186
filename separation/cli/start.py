"""What `python -m separation` and the command `separation` import first.

Ctrl-C ends the program at once and without a traceback from here on, until `run` says otherwise: the imports take a
while.
"""

import _signal  # type: ignore[import-not-found]  # `signal` without the enumerations, which take a while too

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from separation.cli.process import run

__all__ = ["run"]
