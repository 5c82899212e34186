"""`python -m separation`: the command line."""

from separation.cli.start import run

if __name__ == "__main__":
    run()
