"""Model definitions. To add an architecture, add a file here and a line below."""

from separation.models.apollo import Apollo
from separation.models.bandit import Bandit, BanditV2
from separation.models.base import SeparationModel
from separation.models.bs_roformer import BSRoFormer
from separation.models.bs_roformer_large import BSRoFormerLarge
from separation.models.conformer import Conformer, EarlyMelBandConformer
from separation.models.conformers import BSConformer, MelBandConformer
from separation.models.fno import BSRoFormerFNO
from separation.models.htdemucs import Demucs, DemucsV2, HDemucs, HTDemucs
from separation.models.hyperace import BSRoFormerHyperACE
from separation.models.mdx23c import MDX23C
from separation.models.mdx23c_stht import MDX23CSTHT
from separation.models.mdx_net import MDXNet
from separation.models.mel_band_roformer import MelBandRoFormer
from separation.models.mini_bs_roformer import MiniBSRoFormer
from separation.models.moises_light import MoisesLight
from separation.models.scnet import SCNet
from separation.models.scnet_unofficial import SCNetUnofficial
from separation.models.scnet_variants import SCNetMasked, SCNetTran
from separation.models.siamese import BSSiameseRoFormer
from separation.models.tiger import Tiger
from separation.models.value_residuals import (
    BSRoFormerExperimental,
    BSRoFormerValueResidual,
    MelBandRoFormerExperimental,
)
from separation.models.vr import VR

__all__ = ["ARCHITECTURES", "SeparationModel"]

ARCHITECTURES: dict[str, type[SeparationModel]] = {
    "bs_roformer": BSRoFormer,
    "bs_roformer_hyperace": BSRoFormerHyperACE,
    "bs_roformer_fno": BSRoFormerFNO,
    "bs_roformer_large_v2": BSRoFormerLarge,
    "bs_roformer_value_residual": BSRoFormerValueResidual,
    "bs_roformer_experimental": BSRoFormerExperimental,
    "mel_band_roformer_experimental": MelBandRoFormerExperimental,
    "bs_siamese_roformer": BSSiameseRoFormer,
    "mini_bs_roformer": MiniBSRoFormer,
    "bs_conformer": BSConformer,
    "mel_band_conformer": MelBandConformer,
    "mel_band_conformer_early": EarlyMelBandConformer,
    "conformer": Conformer,
    "mel_band_roformer": MelBandRoFormer,
    "demucs": Demucs,
    "demucs_v2": DemucsV2,
    "hdemucs": HDemucs,
    "htdemucs": HTDemucs,
    "mdx23c": MDX23C,
    "experimental_mdx23c_stht": MDX23CSTHT,
    "mdx_net": MDXNet,
    "apollo": Apollo,
    "bandit": Bandit,
    "bandit_v2": BanditV2,
    "scnet": SCNet,
    "scnet_masked": SCNetMasked,
    "scnet_tran": SCNetTran,
    "scnet_unofficial": SCNetUnofficial,
    "moises_light": MoisesLight,
    "vr": VR,
    "tiger": Tiger,
}
