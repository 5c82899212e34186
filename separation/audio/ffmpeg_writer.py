"""Runs ffmpeg to write files: encoded sound, or the tracks of several files in one."""

import errno
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress

from separation.errors import InputError

_DISK_FULL = ("No space left on device", "File too large", "Disk quota exceeded")


def check_installed(what: str) -> str:
    """The path of ffmpeg; raises InputError if it is missing. `what` needs it, such as `format m4a`."""
    found = shutil.which("ffmpeg")
    if found is None:
        raise InputError(f"{what} needs ffmpeg: install it, or choose wav, flac or mp3")
    return found


def run_ffmpeg(arguments: Sequence[str], blocks: Iterable[bytes] = (), *, what: str) -> None:
    """Run ffmpeg with these arguments and with blocks of bytes as its input. An error in `blocks` stops it.

    Raises:
        InputError: ffmpeg is missing, or was built without what the arguments need.
        OSError: ffmpeg fails; on a full disk with that errno.
    """
    command = [check_installed(what), "-hide_banner", "-nostats", "-v", "error", "-y", *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, bufsize=0)
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it has ended early, and its exit code tells how
                for block in blocks:
                    rest = memoryview(block)
                    while rest:
                        rest = rest[process.stdin.write(rest) :]
            process.stdin.close()
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdin.close()
            process.wait()
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    if code == 0:
        return
    text = "\n".join(lines)
    if "Unknown encoder" in text or "Encoder not found" in text:
        raise InputError(f"{what} needs an ffmpeg with more encoders ({lines[0]}): install a complete build")
    full = any(words in text for words in _DISK_FULL)
    raise OSError(errno.ENOSPC if full else errno.EIO, f"ffmpeg: {lines[-1] if lines else f'exit code {code}'}")
