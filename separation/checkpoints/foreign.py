"""Models of architectures that this program does not support, recognised by the suffix, the YAML or the weights' names.

They are refused by name. Some are variants of BS-RoFormer and MelBand-RoFormer, which would load in part or even whole
and then give other stems than their authors' programs do.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from separation.errors import CheckpointError

FOREIGN_SUFFIXES = {
    ".tflite": "a network for TensorFlow Lite",
    ".h5": "a network for TensorFlow",
    ".gguf": "a network for ggml",
}
HYPER_CONNECTIONS = "a RoFormer with hyper-connections, which versions of their package compute differently"
HYPERACE_V1 = "a BS-RoFormer HyperACE of version 1, of which public copies of its code disagree"
ADAPTER = "a LoRA adapter without its model"
WRAPPED_BY_PEFT = "a model with LoRA adapters as the package peft holds both in memory"
OTHER_PROGRAM = "use the program that it was made for"
# What to use instead, where that is known.
INSTEAD = {
    HYPERACE_V1: "use one of version 2, such as bs_roformer_hyperace_v2_vocals_unwa",
    WRAPPED_BY_PEFT: "use the model's own weights and the folder that peft's save_pretrained writes",
    HYPER_CONNECTIONS: "use the program and the version of its packages that it was trained with",
}
# By the YAML's `architecture`, or the `model_type` in its `training` section.
TYPES = {
    "bs_mamba2": "a BS-Mamba2, whose layers are those of the package mamba_ssm for CUDA",
    "swin_upernet": "a Swin-UperNet, whose layers are those of the package transformers",
    "segm_models": "a network of segmentation_models_pytorch or TorchSeg, whose layers are those of the package timm",
}
TYPES["torchseg"] = TYPES["segm_models"]
INSTEAD |= dict.fromkeys(TYPES.values(), "use Music-Source-Separation-Training")
# By keys of the `model:` section that no other model has, whatever their value.
KEYS = {
    "mamba_gmlp": TYPES["bs_mamba2"],
    "num_repeat_mask": TYPES["bs_mamba2"],
    "encoder_name": TYPES["segm_models"],
}
# By names of weights that no other model has.
NAMES = {
    r"mask_estimators\.\d+\.segm\.hyperace\.high_order_branch\.2\..*": HYPERACE_V1,
    r".*\.(static_alpha|static_beta|dynamic_alpha_fn|dynamic_beta_fn)": HYPER_CONNECTIONS,
    r"mask_estimators\.\d+\.(?!to_freqs|segm|layers|norm)\w+\..*": "a RoFormer with other mask estimators",
    r".*\.A_log": TYPES["bs_mamba2"],
    r".*\.lora_[AB]\..*": WRAPPED_BY_PEFT,
    r"swin_upernet_model\..*": TYPES["swin_upernet"],
    r"unet_model\..*": TYPES["segm_models"],
}


def by_yaml(document: Mapping[str, Any]) -> str | None:
    """The kind of the unsupported model that a YAML describes; None if it describes none."""
    training, model = document.get("training"), document.get("model")
    kind = document.get("architecture") or (training.get("model_type") if isinstance(training, Mapping) else None)
    if isinstance(kind, str) and kind in TYPES:
        return TYPES[kind]
    return next((kind for key, kind in KEYS.items() if isinstance(model, Mapping) and key in model), None)


def by_names(names: Iterable[str]) -> str | None:
    """The kind of the unsupported model that has weights of these names; None if none has."""
    names = list(names)
    if names and all(re.fullmatch(r".*\.lora_[AB](\.weight)?", name) for name in names):
        return ADAPTER
    found = (kind for pattern, kind in NAMES.items() if any(re.fullmatch(pattern, name) for name in names))
    return next(found, None)


def refuse_suffix(path: Path) -> None:
    """Raise CheckpointError for a file of another program's format."""
    if kind := FOREIGN_SUFFIXES.get(path.suffix.lower()):
        raise refusal(path, kind)


def refuse_names(path: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for a file whose weights are an unsupported model's."""
    if kind := by_names(names):
        raise refusal(path, kind)


def refusal(path: Path, kind: str) -> CheckpointError:
    """The error for a model of this kind."""
    if kind == ADAPTER:
        return CheckpointError(
            f"{path} is {kind}: give the model's weights, and name this file as `file` in the section `lora` of their "
            "YAML"
        )
    return CheckpointError(f"{path} is {kind}: this architecture is not supported, {INSTEAD.get(kind, OTHER_PROGRAM)}")
