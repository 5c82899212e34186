"""Makes `python -m separation` the same command as `separation`."""

from separation.cli.start import run

if __name__ == "__main__":
    run()
