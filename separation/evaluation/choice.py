"""The scores that `evaluate` offers, by the names of its option `--scores`. Importing it is cheap."""

from collections.abc import Iterable

# name -> the fields of `Scores` that it fills, which are also the fields in JSON, with their headings in the table
SCORES: dict[str, dict[str, str]] = {
    "sdr": {"sdr_musdb_db": "SDR MUSDB", "sdr_mdx23_db": "SDR MDX23"},
    "si_sdr": {"si_sdr_db": "SI-SDR"},
    "sir": {"sir_db": "SIR"},
    "sar": {"sar_db": "SAR"},
    "bleedless": {"bleedless": "bleedless"},
    "fullness": {"fullness": "fullness"},
    "log_wmse": {"log_wmse": "log-WMSE"},
    "l1_freq": {"l1_freq": "L1 freq"},
    "mrstft": {"mrstft": "MR-STFT"},
}
DEFAULT_SCORES = ("sdr", "si_sdr", "sir", "sar")


def columns(names: Iterable[str]) -> dict[str, str]:
    """The fields of these scores and their headings, in the order of SCORES."""
    wanted = set(names)
    return {field: heading for name, fields in SCORES.items() if name in wanted for field, heading in fields.items()}
