"""The entry point: Ctrl-C ends the program quietly while it is imported."""

import signal
import subprocess
import sys

from helpers.common import PROJECT


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)


def test_ctrl_c_after_the_entry_point_is_imported_ends_the_program_without_a_traceback() -> None:
    ran = run(
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import separation.cli.start\n"
        "signal.raise_signal(signal.SIGINT); print('still here')"
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (-signal.SIGINT, "", "")


def test_a_callers_own_handler_of_ctrl_c_stays() -> None:
    ran = run(
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import separation.cli.start\n"
        "signal.raise_signal(signal.SIGINT); print('still here')"
    )
    assert (ran.returncode, ran.stdout) == (0, "still here\n")
