"""Model definitions. To add an architecture: one file here and one line below."""

from separation.models.base import SeparationModel
from separation.models.bs_roformer import BSRoFormer
from separation.models.htdemucs import Demucs, HDemucs, HTDemucs
from separation.models.mdx23c import MDX23C
from separation.models.mel_band_roformer import MelBandRoFormer
from separation.models.scnet import SCNet

ARCHITECTURES: dict[str, type[SeparationModel]] = {
    "bs_roformer": BSRoFormer,
    "mel_band_roformer": MelBandRoFormer,
    "demucs": Demucs,
    "hdemucs": HDemucs,
    "htdemucs": HTDemucs,
    "mdx23c": MDX23C,
    "scnet": SCNet,
}
