"""MDX-Nets load from the checkpoints of their training, and equal the network that was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from helpers.small_model import write_weights
from separation import CheckpointError, load_model
from separation.checkpoints.catalogue import read_config
from separation.models.mdx_net import MDXNet

pytestmark = pytest.mark.usefixtures("one_thread")

N_FFT, HOP, BINS, FRAMES = 80, 16, 32, 16
ARGUMENTS = {"target_name": "drums", "n_fft": N_FFT, "hop_length": HOP, "dim_t": FRAMES, "optimizer": "rmsprop"}


def normed(layer: nn.Module, features: int, norm: type[nn.Module] | None = None) -> nn.Sequential:
    return nn.Sequential(layer, (norm or nn.BatchNorm2d)(features), nn.ReLU())


class TrainedBlock(nn.Module):
    def __init__(self, features: int, bins: int, *, bias: bool) -> None:
        super().__init__()
        self.tfc: nn.Module = nn.Module()
        self.tfc.H = nn.ModuleList(normed(nn.Conv2d(features, features, 3, padding=1), features) for _ in range(2))
        widths = ((bins, bins // 4), (bins // 4, bins))
        self.tdf: nn.Sequential = nn.Sequential(
            *(each for ends in widths for each in normed(nn.Linear(*ends, bias=bias), features))
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.tfc.H:
            x = layer(x)
        y: Tensor = x + self.tdf(x)
        return y


class TrainedNet(nn.Module):
    """The network of kuielab/mdx-net in plain PyTorch, with its names, for a few bins; with random norms."""

    def __init__(self, *, scales: int = 2, features: int = 6, bias: bool = False) -> None:
        super().__init__()
        self.window: nn.Parameter = nn.Parameter(torch.hann_window(N_FFT))
        self.freq_pad: nn.Parameter = nn.Parameter(torch.zeros(1, 4, N_FFT // 2 + 1 - BINS, FRAMES))
        sizes = [features * (scale + 1) for scale in range(scales + 1)]
        self.first_conv: nn.Module = normed(nn.Conv2d(4, features, 1), features)
        blocks = [TrainedBlock(size, BINS >> scale, bias=bias) for scale, size in enumerate(sizes)]
        self.encoding_blocks: nn.ModuleList = nn.ModuleList(blocks[:-1])
        self.ds: nn.ModuleList = nn.ModuleList(
            normed(nn.Conv2d(size, size + features, 2, 2), size + features) for size in sizes[:-1]
        )
        self.bottleneck_block: TrainedBlock = blocks[-1]
        self.us: nn.ModuleList = nn.ModuleList(
            normed(nn.ConvTranspose2d(size + features, size, 2, 2), size) for size in sizes[-2::-1]
        )
        self.decoding_blocks: nn.ModuleList = nn.ModuleList(
            TrainedBlock(sizes[scale], BINS >> scale, bias=bias) for scale in reversed(range(scales))
        )
        self.final_conv: nn.Sequential = nn.Sequential(nn.Conv2d(features, 4, 1))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values in (module.weight.data, module.running_var):
                    values.uniform_(0.5, 1.5)
                for values in (module.bias.data, module.running_mean):
                    values.normal_(0, 0.2)
        self.eval()

    def forward(self, chunks: Tensor) -> Tensor:
        """Chunks of waveform `[B, 2, T]` to the estimate, `[B, 2, T]`."""
        settings: dict[str, Any] = {"n_fft": N_FFT, "hop_length": HOP, "window": self.window}
        spectrum = torch.view_as_real(torch.stft(chunks.flatten(0, 1), **settings, return_complex=True))
        x = spectrum.unflatten(0, (-1, 2)).permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :, :BINS]
        x, skips = self.first_conv(x).mT, []
        for block, down in zip(self.encoding_blocks, self.ds, strict=True):
            skips.append(block(x))
            x = down(skips[-1])
        x = self.bottleneck_block(x)
        for up, block in zip(self.us, self.decoding_blocks, strict=True):
            x = block(up(x) * skips.pop())
        x = F.pad(self.final_conv(x.mT), (0, 0, 0, N_FFT // 2 + 1 - BINS))
        parts = x.unflatten(1, (2, 2)).permute(0, 1, 3, 4, 2).flatten(0, 1).contiguous()
        return torch.istft(torch.view_as_complex(parts), **settings).unflatten(0, (-1, 2))


def trained(**sizes: Any) -> TrainedNet:
    torch.manual_seed(0)
    return TrainedNet(**sizes).requires_grad_(False)


def write(folder: Path, network: nn.Module, arguments: dict[str, Any] | None = None) -> Path:
    """A file as PyTorch Lightning writes it."""
    saved = {"state_dict": network.state_dict(), "epoch": 3, "pytorch-lightning_version": "1.3.8"}
    path = folder / "epoch=1529.ckpt"
    torch.save(saved if arguments is None else saved | {"hyper_parameters": arguments}, path)
    return path


def assert_equal(model: Any, network: TrainedNet) -> None:
    assert isinstance(model, MDXNet) and model.chunk_samples == HOP * (FRAMES - 1) - N_FFT
    chunks = torch.randn(3, 2, HOP * (FRAMES - 1)) * 0.1
    with torch.inference_mode():
        expected, got = network(chunks), model(chunks)[:, 0]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sizes", [{}, {"scales": 3, "bias": True}, {"features": 4}], ids=str)
@pytest.mark.parametrize("attention", ["auto", "sdpa"])  # with and without the layers for CPUs
def test_a_checkpoint_of_a_training_equals_the_trained_network(
    tmp_path: Path, sizes: dict[str, Any], attention: str
) -> None:
    network = trained(**sizes)
    path = write(tmp_path, network, ARGUMENTS)
    model = load_model(path, attention=attention)
    assert model.stems == ("drums",) and read_config(path).architecture == "mdx_net"
    assert_equal(model, network)


@pytest.mark.parametrize(
    "document",
    [
        {"architecture": "mdx_net", "stems": ["drums"], "audio": {"hop_length": HOP}},
        {"_target_": "src.models.mdxnet.ConvTDFNet", "lr": 1e-4, "ckpt": None} | ARGUMENTS,
    ],
    ids=["this project's YAML", "the training's YAML"],
)
def test_a_bare_state_dict_loads_with_a_yaml(tmp_path: Path, document: dict[str, Any]) -> None:
    network = trained()
    path = write_weights(network.state_dict(), tmp_path / "x.pth")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    model = load_model(path)
    assert model.stems == ("drums",)
    assert_equal(model, network)


def test_without_a_stem_the_error_says_what_to_add(tmp_path: Path) -> None:
    path = write(tmp_path, trained(), None)
    with pytest.raises(CheckpointError, match=r"does not name its stem: put a file epoch=1529\.yaml with the lines"):
        load_model(path)
    path.with_suffix(".yaml").write_text("{architecture: mdx_net, stems: [bass], audio: {hop_length: sixteen}}")
    with pytest.raises(CheckpointError, match="hop_length of its section audio must be a positive integer"):
        load_model(path)


def test_without_an_n_fft_the_error_says_what_to_add(tmp_path: Path) -> None:
    network = trained()
    del network.window
    path = write(tmp_path, network, {"target_name": "drums"})
    with pytest.raises(CheckpointError, match=r"lines `architecture: mdx_net`, `stems: \[vocals\]` and `audio: "):
        load_model(path)
    document = {"architecture": "mdx_net", "stems": ["bass"], "audio": {"n_fft": N_FFT, "hop_length": HOP}}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    assert load_model(path).stems == ("bass",)


def group_norm(network: TrainedNet) -> None:
    network.first_conv[1] = nn.GroupNorm(2, 6)  # type: ignore[operator]


def no_bottleneck(network: TrainedNet) -> None:
    for module in network.modules():
        if isinstance(module, TrainedBlock):
            module.tdf = module.tdf[:3]


def more_layers(network: TrainedNet) -> None:
    network.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (group_norm, r"first_conv\.0 is not followed by a batch norm, which would have first_conv\.1\.running_mean"),
        (no_bottleneck, "its linear layers do not narrow the bins and widen them again"),
        (more_layers, r"it has extra\.bias"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    network = trained()
    change(network)
    with pytest.raises(CheckpointError, match=rf"is a ConvTDFNet .* but not an MDX-Net \({message}\): use the program"):
        load_model(write(tmp_path, network, ARGUMENTS))
