"""Nothing needs what Windows lacks."""

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
# The first compiles kernels for a kind of CPU, of which Windows has none. The second waits for a non-blocking pipe,
# which Windows does not have. The others first ask whether the system has it.
LINUX_ONLY = {
    ("separation.models.kernels.native", "getuid"),
    ("separation.cli.process", "select"),
    ("separation.system.memory", "sysconf"),
    ("separation.system.stopwatch", "sysconf"),
}

# Runs the command line without Unix's modules and signals.
WINDOWS = f"""
import signal, subprocess, sys
import filelock  # imports what it needs on Windows instead of fcntl
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
    """The attributes of OWNERS, the keyword arguments and the imported names in a file."""
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
def test_no_module_uses_names_that_only_unix_has(module: str) -> None:
    used = {(module, name) for name in names_in(modules()[module]) & NAMES}
    assert used <= LINUX_ONLY


def test_the_names_to_avoid_exist_on_unix() -> None:
    """Otherwise a misspelt name would never be found."""
    import select
    import signal
    import socket

    if sys.platform != "linux":
        pytest.skip("compares with the names of Linux")
    there = {name for module in (os, select, signal, socket) for name in dir(module)}
    assert NAMES - there <= {"kqueue", "lockf_", "preexec_fn", "pass_fds"}


@pytest.mark.slow
@needs_ffmpeg
def test_a_song_is_separated_without_unixs_modules_and_signals(tmp_path: Path) -> None:
    samples, rate = soundfile.read(SONG, frames=44100)
    soundfile.write(tmp_path / "song.wav", samples, rate)
    environment = os.environ | {"SEPARATION_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", WINDOWS, "separate", str(tmp_path / "song.wav"), "--recipe", "demo", "--json"]
    for output, format in (("one", "wav"), ("two", "mp3")):  # the second comes from the cache
        options = ["-o", str(tmp_path / output), "--format", format, "--device", "cpu"]
        ran = subprocess.run(
            [*command, *options], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0 and not ran.stderr, ran.stderr
        (line,) = ran.stdout.splitlines()
        assert all(Path(path).exists() for path in json.loads(line)["stems"].values())
    assert not list(tmp_path.rglob(".separating-*"))
