"""Names that the command needs before it imports PyTorch."""

VIPERX, KIM, SW = "bs_roformer_viperx_1297", "mel_band_roformer_kim", "bs_roformer_sw"
HTDEMUCS, HTDEMUCS_FT = "htdemucs", "htdemucs_ft"
MDX23C, DRUMSEP, SCNET, SCNET_XL = "mdx23c_instvoc_hq_2", "drumsep", "scnet", "scnet_xl_ihf"
MODELS = (VIPERX, HTDEMUCS, HTDEMUCS_FT, MDX23C, KIM, SW, SCNET_XL, SCNET, DRUMSEP)  # with random weights
DEMO = "demo"  # its real weights ship with the project

# The steps of steps.py, the most valuable first.
STEPS = (
    "environment",
    "correctness",
    "settle",
    "viperx",
    "demucs",
    "roformers",
    "convolutions",
    "small_memory",
    "kernel_profile",
    "cold",
    "other_programs",
)
UNBLEND_BATCH_SIZES = (8, 16)  # by default it chooses by free memory; two fixed sizes compare across cards
