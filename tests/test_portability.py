"""What Windows lacks, nothing needs."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from helpers.common import PROJECT, SONG, needs_ffmpeg
from helpers.house import modules

MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
SIGNALS = {"SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGUSR1", "SIGUSR2"}
# Of `os`, `signal`, `select`, `socket` and `subprocess`.
NAMES = SIGNALS | {"O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_TMPFILE", "AF_UNIX"}
NAMES |= {"chown", "chroot", "fchmod", "fchown", "fork", "forkpty", "geteuid", "getgid", "getloadavg", "getpgid"}
NAMES |= {
    "getuid",
    "killpg",
    "lchown",
    "lockf",
    "mkfifo",
    "mknod",
    "nice",
    "openpty",
    "posix_fadvise",
    "posix_fallocate",
}
NAMES |= {"posix_spawn", "pread", "preadv", "pwrite", "pwritev", "register_at_fork", "sched_getaffinity"}
NAMES |= {
    "sendfile",
    "setpgid",
    "setsid",
    "statvfs",
    "sysconf",
    "uname",
    "wait3",
    "waitid",
    "pthread_sigmask",
    "sigwait",
}
NAMES |= {"alarm", "setitimer", "pause", "epoll", "kqueue", "poll", "select", "preexec_fn", "pass_fds"}
OWNERS = {"os", "signal", "select", "socket", "subprocess"}
# The first compiles for a CPU's bfloat16, which is looked for on Linux alone; the second waits for a pipe that does not
# block, as none does on Windows.
LINUX_ONLY = {("separation.models.kernels.native", "getuid"), ("separation.cli.process", "select")}

# The process of a song, in which they are missing.
WINDOWS = f"""
import signal, subprocess, sys
import filelock  # which has what Windows has in place of fcntl
for name in {sorted(MODULES - {"posix"})}:
    sys.modules[name] = None  # importing it fails
subprocess.Popen.kill = lambda process: process.send_signal(9)
for name in {sorted(SIGNALS)}:
    if hasattr(signal, name):
        delattr(signal, name)
from separation.cli.start import run
run()
"""


def names_in(path: Path) -> set[str]:
    """The attributes of OWNERS, the keywords and the imported names in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OWNERS:
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.ImportFrom) and node.module in OWNERS:
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("module", modules())
def test_no_module_uses_what_only_unix_has(module: str) -> None:
    used = {(module, name) for name in names_in(modules()[module]) & NAMES}
    assert used <= LINUX_ONLY


def test_the_names_that_are_looked_for_are_unixs() -> None:
    """A misspelt one would be found nowhere."""
    import select
    import signal
    import socket

    if sys.platform != "linux":
        pytest.skip("compares with what Linux has")
    there = {name for module in (os, select, signal, socket) for name in dir(module)}
    assert NAMES - there <= {"kqueue", "lockf_", "preexec_fn", "pass_fds"}


@needs_ffmpeg
def test_a_song_is_separated_where_unixs_modules_and_signals_are_missing(tmp_path: Path) -> None:
    samples, rate = soundfile.read(SONG, frames=44100)
    soundfile.write(tmp_path / "song.wav", samples, rate)
    environment = os.environ | {"SEPARATION_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", WINDOWS, "separate", str(tmp_path / "song.wav"), "--recipe", "demo", "--json"]
    for output, format in (("one", "wav"), ("two", "mp3")):  # the second from the cache
        options = ["-o", str(tmp_path / output), "--format", format, "--device", "cpu"]
        ran = subprocess.run(
            [*command, *options], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0 and not ran.stderr, ran.stderr
        (line,) = ran.stdout.splitlines()
        assert all(Path(path).exists() for path in json.loads(line)["stems"].values())
    assert not list(tmp_path.rglob(".separating-*"))
