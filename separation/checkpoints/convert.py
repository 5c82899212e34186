"""`models convert`: a checkpoint of any format as a .safetensors file, which loads fastest."""

import hashlib
import shutil
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from separation.checkpoints.files import SOURCE_SHA256
from separation.checkpoints.state_dict import metadata_of, open_weights, read_weights
from separation.errors import InputError
from separation.system.os_errors import output_errors
from separation.system.output import OutputFolder
from separation.system.record import check_targets


def convert(checkpoint: Path, target: Path, *, overwrite: bool = False) -> None:
    """Write a checkpoint's state dict as a .safetensors file, each tensor in its own type.

    `target` appears complete or not at all; it replaces a file only with `overwrite`. Its metadata has the checkpoint's
    name and sha256, by which `fetch` recognises it, and the checkpoint's description of its network, if it has one, in
    the form of demucs 4.1.

    Raises CheckpointError for a checkpoint that cannot be used, InputError for a target with another suffix,
    OutputError if the file cannot be written.
    """
    if target.suffix != ".safetensors":
        raise InputError(f"the output {str(target)!r} must end in .safetensors: that is its format")
    check_targets(target.parent, [target.name], overwrite=overwrite)
    stored = open_weights(checkpoint)
    weights = read_weights(stored, {})
    with checkpoint.open("rb") as stream:
        metadata = {SOURCE_SHA256: hashlib.file_digest(stream, "sha256").hexdigest(), "source_name": checkpoint.name}
    if stored.blueprint is not None:
        metadata |= metadata_of(stored.blueprint)
    with OutputFolder(target.parent, overwrite=overwrite, record=None) as folder:
        part = folder.work / target.name
        with output_errors(target, SafetensorError):
            safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, part, metadata)
            shutil.copymode(checkpoint, part)  # the library makes its files readable for their owner only
        folder.publish({"weights": part})
