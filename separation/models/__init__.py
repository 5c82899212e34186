"""Model definitions. To add an architecture: one file here and one line below."""

from separation.models.base import SeparationModel
from separation.models.bs_roformer import BSRoFormer
from separation.models.htdemucs import HTDemucs

ARCHITECTURES: dict[str, type[SeparationModel]] = {
    "bs_roformer": BSRoFormer,
    "htdemucs": HTDemucs,
}
