"""Loads models one after the other in a process with little memory and time for each.

`python limited.py PATH ...` prints a line of JSON for each path: the path, the result, and the peak memory of the
process in MiB. A path is a YAML file with weights beside it, or a folder with both.
"""

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

CPU_SECONDS = 15.0  # for each model; not wall-clock time, because the machine may be busy
SECONDS = 300  # for each model that waits for something
MIB = 1024  # in addition to PyTorch's own memory


def main() -> None:
    import resource

    import separation.checkpoints.load
    from separation.errors import SeparationError

    faulthandler.enable()
    with open("/proc/self/statm", encoding="ascii") as pages:
        taken = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MIB * 2**20, resource.RLIM_INFINITY))
    for path in sys.argv[1:]:
        signal.alarm(SECONDS)  # both timers end this process even if a library hangs
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            separation.checkpoints.load.load_model(path)
            answer = "loaded"
        except SeparationError as e:
            answer = f"refused: {e}"
        except Exception as e:
            answer = f"failed: {type(e).__name__}: {e}"
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        used = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
        print(json.dumps([path, answer, used]), flush=True)


def load_all(paths: list[Path]) -> dict[Path, tuple[str, int]]:
    """For each path, the result, and by how many MiB the process had grown since the first path."""
    answers: dict[Path, tuple[str, int]] = {}
    first = 0
    while len(answers) < len(paths):
        left = paths[len(answers) :]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *map(str, left)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in ran.stdout.splitlines()]
        first = first or (lines[0][2] if lines else 0)
        answers |= {Path(path): (answer, used - first) for path, answer, used in lines}
        if len(lines) < len(left):
            what = (
                "hung"
                if ran.returncode in (-signal.SIGALRM, -signal.SIGPROF)
                else f"died ({ran.returncode}): {ran.stderr[-500:]}"
            )
            answers[left[len(lines)]] = what, 0
    return answers


if __name__ == "__main__":
    main()
