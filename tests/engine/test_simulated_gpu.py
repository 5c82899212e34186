"""The whole GPU path on a simulated GPU (simulated_gpu.py): no forward waits or mixes devices; the stems are the CPU's.

What a chunk of each model costs a GPU is kept in gpu_counts.json. After a change that lowers it, or that is worth more:

    pytest tests/engine/test_simulated_gpu.py -m 'slow or not slow' -k table --update-gpu-counts
"""

import copy
import json
import math
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from helpers.common import SONG, below, read, slow
from helpers.simulated_gpu import DEVICE, Counts, SimulatedGPU, SimulatedTensor, simulated_gpu
from helpers.small_model import HYPER_PARAMETERS, write_yaml
from separation import EstimateError, Separator, device
from separation.checkpoints.build import build, random_weights
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.load import load_model
from separation.engine.chunk_plan import ChunkPlan
from separation.engine.chunking import ReadyModel, separate
from separation.engine.gpu_models import on_stereo
from separation.engine.options import EngineOptions
from separation.engine.song_waveforms import Samples
from separation.evaluation.metrics import sdr
from separation.models import ARCHITECTURES

TABLE = Path(__file__).with_name("gpu_counts.json")
UPDATE = "pytest tests/engine/test_simulated_gpu.py -m 'slow or not slow' -k table --update-gpu-counts"
MOST_MORE_BYTES = 1.02  # of what the table says
# The least SDR in dB of estimates in fp16, against those in float32.
NEAR = {"mdx23c": 42.0} | dict.fromkeys(("htdemucs", "hdemucs", "demucs"), 60.0)
NEAR |= dict.fromkeys(("bs_roformer", "mel_band_roformer", "scnet"), 55.0)
NEAR |= dict.fromkeys(
    ("scnet_masked", "scnet_tran", "scnet_unofficial", "bandit", "bandit_v2", "apollo", "tiger"), 45.0
)
NEAR |= {"mdx_net": 40.0, "bs_roformer_hyperace": 12.0}  # with random weights, HyperACE's norms enlarge all rounding
NEAR |= dict.fromkeys((name for name in ARCHITECTURES if name not in NEAR), 45.0)

QUICK = ("bs_roformer", "htdemucs")  # the others are slow tests

Forward = Callable[[str], tuple[Counts, Tensor, Tensor]]

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is there: test_on_gpu.py is for it")
pytestmark = pytest.mark.usefixtures("one_thread")

ROFORMER = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16}
RNNS = {"n_sqm_modules": 1, "emb_dim": 32, "rnn_dim": 32, "mlp_dim": 64}
MINI = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "band_proj_size": 16}
EXPERIMENTAL = ROFORMER | {"use_value_residual_learning": True}
LAYERS_OF_ROFORMERS = dict.fromkeys(("time_transformer_depth", "freq_transformer_depth"))
CONFORMERS: dict[str, Any] = ROFORMER | LAYERS_OF_ROFORMERS | {"time_conformer_depth": 1, "freq_conformer_depth": 1}
CONFORMER: dict[str, Any] = {
    **dict.fromkeys(read_config("bs_roformer_viperx_1297").hyper_parameters),  # none of BS-RoFormer's
    "n_fft": 1024,
    "hop_length": 256,
    "freq_bins": 513,
    "sources": 1,
    "embed_dim": 32,
    "depth": 1,
    "dim_head": 16,
    "heads": 2,
}
MOISES: dict[str, Any] = {
    **dict.fromkeys(read_config("bs_roformer_viperx_1297").hyper_parameters),  # none of BS-RoFormer's
    "sources": ["vocals"],
    "G": 8,
    "n_rope": 1,
}
UNOFFICIAL: dict[str, Any] = {
    **dict.fromkeys(name for name in read_config("scnet").hyper_parameters),  # none of SCNet's
    "dims": [4, 16, 32, 64],
    "bandsplit_ratios": [0.175, 0.392, 0.433],
    "downsample_strides": [1, 4, 16],
    "n_conv_modules": [3, 2, 1],
    "n_rnn_layers": 2,
    "rnn_hidden_dim": 32,
    "n_fft": 4096,
}
# By architecture: a shipped configuration, what makes it small, and the samples of a chunk.
SMALL: dict[str, tuple[str, dict[str, Any], int]] = {
    "bs_roformer": ("bs_roformer_viperx_1297", ROFORMER, 16_384),
    "mel_band_roformer": ("mel_band_roformer_kim", ROFORMER, 16_384),
    "mdx23c": ("mdx23c_instvoc_hq_2", {"num_channels": 8, "growth": 8}, 31 * 1024),
    "htdemucs": ("htdemucs", {"channels": 8, "bottom_channels": 64, "t_layers": 3, "segment": "1/2"}, 22_050),
    "hdemucs": ("hdemucs_mmi", {"channels": 8, "segment": "1/2"}, 22_050),
    "demucs": ("hdemucs_mmi", {"channels": 8, "segment": "1/2", "nfft": None}, 22_050),
    "scnet": ("scnet", {"num_dplayer": 2}, 22_050),
    "scnet_masked": ("scnet", {"num_dplayer": 2}, 22_050),
    "scnet_tran": ("scnet", {"num_dplayer": 2, "tran_heads": 2}, 22_050),
    "scnet_unofficial": ("scnet", UNOFFICIAL, 22_050),
    "bandit": ("bandit_plus_dnr", RNNS, 22_050),
    "bandit_v2": ("bandit_v2_multi", RNNS, 22_050),
    "apollo": ("apollo_lq_mp3_restoration", {"feature_dim": 64, "layer": 1}, 22_050),
    "mini_bs_roformer": ("mini_bs_roformer_v2_hidolen", MINI, 16_384),
    "moises_light": ("bs_roformer_viperx_1297", MOISES, 16_384),
    "tiger": ("tiger_dnr", {"out_channels": 24, "in_channels": 16, "num_blocks": 2}, 22_050),
    "bs_roformer_hyperace": ("bs_roformer_hyperace_v2_vocals_unwa", ROFORMER, 88_200),
    "bs_roformer_fno": ("bs_roformer_inst_fno_unwa", ROFORMER, 16_384),
    "bs_roformer_large_v2": ("bs_roformer_large_v2_inst_unwa", ROFORMER, 16_384),
    "bs_roformer_value_residual": ("bs_roformer_inst_value_residual_unwa", ROFORMER, 16_384),
    "bs_siamese_roformer": ("bs_roformer_viperx_1297", ROFORMER, 16_384),
    "bs_roformer_experimental": ("bs_roformer_viperx_1297", EXPERIMENTAL, 16_384),
    "mel_band_roformer_experimental": ("mel_band_roformer_kim", EXPERIMENTAL, 16_384),
    "bs_conformer": ("bs_roformer_viperx_1297", CONFORMERS, 16_384),
    "mel_band_conformer": ("mel_band_roformer_kim", CONFORMERS, 16_384),
    "mel_band_conformer_early": ("mel_band_roformer_kim", CONFORMERS, 16_384),
    "conformer": ("bs_roformer_viperx_1297", CONFORMER, 16_384),
    "demucs_v2": ("hdemucs_mmi", {"channels": 8, "segment": "1/2", "nfft": None}, 22_050),
    "experimental_mdx23c_stht": ("mdx23c_instvoc_hq_2", {"num_channels": 16, "growth": 8}, 31 * 1024),
    "mdx_net": ("mdx_net_inst_hq_3", {"num_channels": 16}, 25 * 1024),
    "vr": ("vr_denoise_lite_foxjoy", {"hop_lengths": [128]}, 384 * 128),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGPU]:
    if torch.cuda.is_available():
        pytest.skip("a real GPU is there: test_on_gpu.py is for it")
    monkeypatch.setattr(device, "_earlier_peaks", {})
    with simulated_gpu() as gpu:
        yield gpu
    assert not gpu.races


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Three seconds of the demo song, [2, T]."""
    audio, _ = soundfile.read(SONG, dtype="float32", frames=132_300)
    return torch.from_numpy(audio.T.copy())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """By architecture: the YAML of a small model, and random weights for it."""
    folder = tmp_path_factory.mktemp("small")

    def make(architecture: str) -> tuple[Path, Path]:
        path, weights = folder / f"{architecture}.yaml", folder / f"{architecture}.safetensors"
        if not weights.exists():
            name, changes, chunk_samples = SMALL[architecture]
            shipped = read_config(name)
            sizes = {key: value for key, value in (shipped.hyper_parameters | changes).items() if value is not None}
            document = {
                "architecture": architecture,
                "stems": [*shipped.stems],
                "files": [{"name": weights.name}],
                "audio": shipped.audio | {"chunk_size": chunk_samples},
                "model": {key: [*value] if isinstance(value, tuple) else value for key, value in sizes.items()},
            }
            path.write_text(yaml.safe_dump(document), encoding="utf-8")
            save_file(random_weights(path), weights)
        return path, weights

    return make


# The device


def test_an_operation_on_tensors_of_two_devices_is_an_error(gpu: SimulatedGPU) -> None:
    ours, theirs = torch.ones(3, device="cuda"), torch.ones(3)
    assert (ours + 1).device == DEVICE and (ours * torch.tensor(2.0)).device == DEVICE
    for meet in (torch.add, torch.dot, lambda a, b: torch.stack([a, b]), lambda a, b: a.addcmul_(a, b)):
        for pair in ((ours, theirs), (theirs, ours)):
            with pytest.raises(RuntimeError, match="at least two devices"):
                meet(*pair)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.empty(4).copy_(x),
        lambda x: x.to("cpu", non_blocking=False),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().record_event().synchronize(),
    ],
)
def test_an_operation_that_makes_the_host_wait_is_recorded(
    gpu: SimulatedGPU, wait: Callable[[Tensor], Any], inference: bool
) -> None:
    with torch.inference_mode(inference):
        x = torch.arange(4.0, device="cuda")
        with gpu.counted() as counts:
            wait(x)
    assert counts.waits and Path(__file__).name in counts.waits[0]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "upload",
    [
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.ones(3).to("cuda", non_blocking=True),
        lambda x: torch.ones(3).pin_memory().to("cuda"),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.as_tensor([1.0, 2.0], device="cuda"),
        lambda x: x[[0, 1]],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.copy_(torch.ones(4)),
    ],
)
def test_a_copy_from_memory_that_is_not_page_locked_is_recorded(
    gpu: SimulatedGPU, upload: Callable[[Tensor], Any], inference: bool
) -> None:
    with torch.inference_mode(inference):
        x = torch.arange(4.0, device="cuda")
        with gpu.counted() as counts:
            upload(x)
    assert len(counts.uploads) == 1 and not counts.waits


@pytest.mark.parametrize("inference", [False, True])
def test_operations_on_the_gpu_alone_record_no_wait_and_no_copy(gpu: SimulatedGPU, inference: bool) -> None:
    with torch.inference_mode(inference):
        pinned = torch.ones(8, pin_memory=True)
        with gpu.counted() as counts:
            x = torch.zeros(8, device="cuda")
            x[2:].copy_(pinned[2:], non_blocking=True)
            x[:1] = 3.0
            y = x.new_ones(8).add_(x).masked_fill_(x > 2, 0.0)[:4]
            y.view(2, 2).transpose(0, 1).contiguous()
    assert not counts.waits and not counts.uploads
    assert y.tolist() == [0.0, 1.0, 2.0, 2.0]


def test_kernels_and_bytes_are_counted_and_views_are_free(gpu: SimulatedGPU) -> None:
    with torch.inference_mode(), gpu.counted() as counts:
        x = torch.empty(10, 10, device="cuda")
        x.zero_()  # writes 400 bytes
        y = x + 1  # reads 400, writes 400
        y[:5].mul_(2)  # reads 200, writes 200
        (y.t() @ x[:, :1].expand(10, 4)).view(2, 20)  # reads 400 and 40, writes 160
    assert (counts.kernels, counts.bytes) == (4, 400 + 800 + 400 + 600)
    assert counts.names == {"zero_": 1, "add": 1, "mul_": 1, "mm": 1}


def test_an_operation_of_another_namespace_is_one_kernel_and_runs_its_reference(gpu: SimulatedGPU) -> None:
    library = torch.library.Library("simulated_test", "FRAGMENT")
    library.define("turn(Tensor(a!) x, Tensor angles) -> ()")
    library.define("double(Tensor x) -> Tensor")
    library.define("both(Tensor(a!) x) -> Tensor")
    library.impl("turn", _turn, "CPU")
    library.impl("double", lambda x: (x + 0) * 2, "CPU")
    library.impl("both", lambda x: x.zero_() + 7, "CPU")
    for inference in (False, True):
        with torch.inference_mode(inference), gpu.counted() as counts:
            x = torch.ones(10, device="cuda")
            torch.ops.simulated_test.turn(x, torch.zeros(5, device="cuda").repeat(2))
            assert torch.ops.simulated_test.double(x).cpu().tolist() == [4.0] * 10
        assert counts.names["simulated_test::turn"] == counts.names["simulated_test::double"] == 1
        assert counts.names.total() == 5  # ones, zeros, repeat
        assert torch.ops.simulated_test.both(x).tolist() == [7.0] * 10 and x.tolist() == [0.0] * 10
        with gpu.shapes_alone(), torch.inference_mode(inference), gpu.counted() as counts:
            assert torch.ops.simulated_test.double(torch.empty(2, 3, device="cuda")).shape == (2, 3)
            torch.ops.simulated_test.turn(torch.empty(6, device="cuda"), torch.empty(6, device="cuda"))
        assert (counts.kernels, counts.bytes) == (2, 24 + 24 + 3 * 24)
        with pytest.raises(RuntimeError, match="at least two devices"):
            torch.ops.simulated_test.turn(x, torch.zeros(10))
    library._destroy()


def _turn(x: Tensor, angles: Tensor) -> None:
    x.mul_(angles.cos() + 1)


def test_a_copy_that_was_not_waited_for_holds_nan(gpu: SimulatedGPU) -> None:
    copies = torch.cuda.Stream()
    x = torch.ones(4, device="cuda")
    copies.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copies):
        host = x.to("cpu", non_blocking=True)
        done = copies.record_event()
    assert host.is_pinned() and host.isnan().all()
    torch.cuda.current_stream().synchronize()  # another one
    assert host.isnan().all()
    done.synchronize()
    assert host.tolist() == [1.0] * 4


def test_waiting_for_a_stream_includes_the_streams_that_it_waited_for(gpu: SimulatedGPU) -> None:
    copies = torch.cuda.Stream()
    with torch.cuda.stream(copies):
        host = torch.ones(4, device="cuda").to("cpu", non_blocking=True)
    torch.cuda.current_stream().wait_stream(copies)
    torch.cuda.current_stream().synchronize()
    assert host.tolist() == [1.0] * 4


@needs_no_gpu
@pytest.mark.parametrize("wait", ["stream", "event", "host", "none"])
def test_using_a_tensor_of_another_stream_too_early_is_recorded_as_a_race(wait: str) -> None:
    with simulated_gpu() as gpu:
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        with torch.cuda.stream(side):
            x = torch.zeros(4, device="cuda").copy_(torch.ones(4).pin_memory(), non_blocking=True)
            done = side.record_event()
        if wait == "stream":
            main.wait_stream(side)
        elif wait == "event":
            main.wait_event(done)
        elif wait == "host":
            done.synchronize()
        assert (x + 1).sum().item() == 8
    assert len(gpu.races) == (wait == "none") and all(Path(__file__).name in race for race in gpu.races)


@needs_no_gpu
def test_writing_to_page_locked_memory_too_early_is_recorded_as_a_race() -> None:
    with simulated_gpu() as gpu:
        host = torch.ones(4).pin_memory()
        for wait in (True, False):
            torch.empty(4, device="cuda").copy_(host, non_blocking=True)
            if wait:
                torch.cuda.synchronize()
            host.zero_()
            assert not gpu.races
    assert len(gpu.races) == 0  # zeros over zeros are no change
    with simulated_gpu() as gpu:
        host = torch.ones(4).pin_memory()
        torch.empty(4, device="cuda").copy_(host, non_blocking=True)
        host.zero_()
    assert len(gpu.races) == 1 and Path(__file__).name in gpu.races[0]


def test_memory_counts_as_allocated_until_its_last_view_is_gone(gpu: SimulatedGPU) -> None:
    before = torch.cuda.memory_allocated()
    x = torch.empty(1000, device="cuda")
    view = x[10:].view(2, -1)
    del x
    assert torch.cuda.memory_allocated() - before == 4000
    del view
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() >= before + 4000
    gpu.total_bytes = 8000
    torch.empty(1000, device="cuda")
    torch.cuda.set_per_process_memory_fraction(0.25)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1000, device="cuda")
    torch.empty(100, device="cuda")


def test_the_copy_of_a_model_can_be_cast(gpu: SimulatedGPU) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LSTM(4, 2)).half().to("cuda").requires_grad_(False)
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    assert {(weight.dtype, weight.device) for weight in other.parameters()} == {(torch.bfloat16, DEVICE)}
    with torch.inference_mode():
        x = torch.ones(3, 1, 4, device="cuda")
        assert (other(x.bfloat16())[0].float() - model(x.half())[0]).abs().max() < 0.02


def test_a_replay_computes_on_the_current_contents_of_its_inputs(gpu: SimulatedGPU) -> None:
    weights = torch.full((4,), 2.0, device="cuda")
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.graph(graph):
            total = torch.zeros(4, device="cuda")
            total.view(2, 2).add_((x * weights).view(2, 2))
            y = total.t() + 1
        assert y.cpu().isnan().all()
        for value in (1.0, 3.0):
            x.fill_(value)
            graph.replay()
            assert y.tolist() == [2 * value + 1] * 4
        for forbidden in (lambda: x.tolist(), lambda: torch.ones(4).to("cuda"), torch.cuda.synchronize):
            with (
                pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
                torch.cuda.graph(torch.cuda.CUDAGraph()),
            ):
                forbidden()
    assert not torch.cuda.is_current_stream_capturing()


@needs_no_gpu
def test_every_thread_sees_the_gpu_and_removing_it_leaves_nothing_behind() -> None:
    with ThreadPoolExecutor(1) as pool:
        before = vars(torch.cuda).copy()
        with simulated_gpu():
            devices: list[torch.device] = []
            thread = threading.Thread(target=lambda: devices.append(torch.zeros(1, device="cuda").device))
            thread.start()
            thread.join()
            assert pool.submit(lambda: torch.zeros(1, device="cuda").device).result() == DEVICE == devices[0]
            kept = torch.zeros(1, device="cuda")
        assert vars(torch.cuda) == before and not torch.cuda.is_available()
        assert type(pool.submit(torch.zeros, 1).result()) is Tensor
        with pytest.raises(RuntimeError, match="after the GPU was removed"):
            kept + 1


# Models

WAITS = {"demucs": "the host makes the resampling filter at each call"}


def failing(reasons: dict[str, str], slow: Iterable[str] = ()) -> list[Any]:
    """All architectures; those with a reason are expected to fail, and those in `slow` are slow tests."""
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in SMALL}
    for name, reason in reasons.items():
        marks[name].append(pytest.mark.xfail(reason=reason, strict=True))
    return [pytest.param(name, marks=marks[name]) for name in SMALL]


@pytest.fixture(scope="module")
def forward(small: Callable[[str], tuple[Path, Path]], clip: Tensor) -> Callable[[str], tuple[Counts, Tensor, Tensor]]:
    """For an architecture: the counts of a forward of two chunks in fp16, its estimates, and the CPU's in float32."""

    @cache
    def run(architecture: str) -> tuple[Counts, Tensor, Tensor]:
        path, weights = small(architecture)
        with simulated_gpu() as gpu, torch.inference_mode():
            model = load_model(path, checkpoint=weights, device="cuda", precision="fp16")
            assert {type(tensor) for tensor in model.state_dict().values()} == {SimulatedTensor}
            samples = model.input_samples(model.chunk_samples) or model.chunk_samples
            chunks = torch.stack([clip[:, start : start + samples] for start in (0, 40_000)])
            on_gpu, compute = chunks.to("cuda"), on_stereo(model)
            compute(on_gpu)  # creates windows and tables, which stay
            with gpu.counted() as counts:
                estimates = compute(on_gpu)
            assert estimates.device == DEVICE and estimates.dtype == torch.float32
            return counts, estimates.cpu(), on_stereo(load_model(path, checkpoint=weights))(chunks)

    return run


def test_the_table_of_small_models_has_every_architecture() -> None:
    assert set(SMALL) == set(ARCHITECTURES)


@needs_no_gpu
@pytest.mark.parametrize("architecture", [name if name in QUICK else slow(name) for name in SMALL])
def test_estimates_in_fp16_equal_the_cpus(forward: Forward, architecture: str) -> None:
    _, got, expected = forward(architecture)
    for chunk, own in zip(got, expected, strict=True):
        assert sdr(own.flatten(0, 1), chunk.flatten(0, 1)) > NEAR[architecture]


@needs_no_gpu
@pytest.mark.parametrize("architecture", failing(WAITS, slow=set(SMALL) - {*QUICK, "demucs"}))
def test_a_forward_neither_waits_nor_copies_from_the_host(forward: Forward, architecture: str) -> None:
    counts, *_ = forward(architecture)
    assert counts.kernels and not counts.waits and not counts.uploads


@needs_no_gpu
@pytest.mark.parametrize("architecture", [name if name in QUICK else slow(name) for name in SMALL])
def test_a_forward_uses_no_operation_that_gpus_compute_differently(forward: Forward, architecture: str) -> None:
    counts, *_ = forward(architecture)
    assert counts.kernels and not counts.hazards


@pytest.mark.parametrize("architecture", failing(WAITS, slow=set(SMALL) - {"bs_roformer"}))
def test_a_graph_of_a_forward_gives_the_same_estimates(
    gpu: SimulatedGPU, small: Callable[[str], tuple[Path, Path]], clip: Tensor, architecture: str
) -> None:
    path, weights = small(architecture)
    model = load_model(path, checkpoint=weights, device="cuda", precision="fp16")
    samples = model.input_samples(model.chunk_samples) or model.chunk_samples
    compute = on_stereo(model)
    with torch.inference_mode():
        chunks = torch.zeros(1, 2, samples, device="cuda")
        compute(chunks)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            estimates = compute(chunks)
        assert estimates.isnan().all()
        chunks.copy_(clip[None, :, 20_000 : 20_000 + samples])
        graph.replay()
        assert torch.equal(estimates, compute(chunks)) and estimates.abs().max() > 0


# The engine


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Separator]:
    """A separator with a random network of two stems, on the device of that name."""
    folder = tmp_path_factory.mktemp("quick")
    sizes = {"freqs_per_bands": [205] * 5, "stft_n_fft": 2048, "stft_win_length": 2048, "stft_hop_length": 1024}
    path = write_yaml(folder, model=HYPER_PARAMETERS | sizes)
    save_file(random_weights(path), folder / "weights.safetensors")

    def make(name: str, **options: Any) -> Separator:
        model = load_model(path, checkpoint=folder / "weights.safetensors", device=name)
        return Separator.from_model(model, options=EngineOptions(chunk_seconds=4, overlap_seconds=3, **options))

    return make


@pytest.fixture(scope="module")
def expected(quick: Callable[..., Separator], clip: Tensor) -> dict[str, Tensor]:
    """The CPU's stems."""
    return quick("cpu").separate(clip)


@pytest.fixture
def song(clip: Tensor, tmp_path: Path) -> Path:
    path = tmp_path / "song.wav"
    soundfile.write(path, clip.T.numpy(), 44100, subtype="FLOAT")
    return path


def assert_near(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], decibels: float = 90.0) -> None:
    assert list(got) == list(expected)
    for stem, samples in expected.items():
        assert sdr(samples, got[stem]) > decibels


@pytest.mark.slow
@pytest.mark.parametrize("precision, decibels", [("fp32", 90.0), ("fp16", 45.0), ("auto", 30.0)])
def test_the_demo_gives_the_cpus_stems(gpu: SimulatedGPU, clip: Tensor, precision: str, decibels: float) -> None:
    stems = {
        name: Separator(
            "demo",
            "all_6",
            options=EngineOptions(
                device=name, precision=asked, attention="sdpa", batch_size=2, chunk_seconds=4, overlap_seconds=1
            ),
        ).separate(clip)
        for name, asked in (("cpu", "fp32"), ("cuda", precision))
    }
    assert_near(stems["cuda"], stems["cpu"], decibels)


@pytest.mark.parametrize("batch_size", [slow("auto"), 1, slow(4)])
def test_a_song_in_memory_gives_the_cpus_stems(
    gpu: SimulatedGPU, quick: Callable[..., Separator], clip: Tensor, expected: dict[str, Tensor], batch_size: Any
) -> None:
    engine = quick("cuda", batch_size=batch_size)
    first, again = engine.separate(clip), engine.separate(clip)
    assert_near(first, expected)
    assert all(torch.equal(first[stem], again[stem]) for stem in first)


@pytest.mark.slow
def test_a_longer_song_makes_no_more_copies_from_memory_that_is_not_page_locked(
    gpu: SimulatedGPU, quick: Callable[..., Separator], clip: Tensor
) -> None:
    engine = quick("cuda", batch_size=2)
    engine.separate(clip)
    found = []
    for song in (clip[:, :44_100], clip):
        with gpu.counted() as counts:
            engine.separate(song)
        found.append(len(counts.uploads))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_file_gives_the_cpus_stems_and_frees_its_memory(
    gpu: SimulatedGPU, quick: Callable[..., Separator], song: Path, expected: dict[str, Tensor]
) -> None:
    engine = quick("cuda")
    files = engine.separate_file(song, song.parent / "first")
    assert_near({stem: torch.from_numpy(read(path).T) for stem, path in files.items()}, expected)
    allocated = gpu.allocated_bytes
    engine.separate_file(song, song.parent / "second")
    assert gpu.allocated_bytes == allocated > 0


class StopError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("end", ["an error", "given up"])
def test_a_song_that_ends_early_leaves_the_engine_usable(
    gpu: SimulatedGPU,
    quick: Callable[..., Separator],
    song: Path,
    clip: Tensor,
    expected: dict[str, Tensor],
    end: str,
) -> None:
    def stop(share: float, stage: str) -> None:
        if end == "given up" and share > 0.5:
            raise StopError

    engine = quick("cuda", batch_size=2)
    engine.separate(clip)
    allocated = gpu.allocated_bytes
    (model,) = engine.models.values()
    weight = next(parameter for parameter in model.parameters() if parameter.ndim == 2)
    kept = weight.cpu()
    if end == "an error":
        weight.fill_(math.nan)
    with pytest.raises(EstimateError if end == "an error" else StopError):
        engine.separate_file(song, song.parent / "stems", progress=stop)
    weight.copy_(kept)
    assert not below(song.parent / "stems", "*")
    assert gpu.allocated_bytes == allocated
    assert_near(engine.separate(clip), expected)


# How PyTorch and CUDA's libraries report that memory ran out; most of these are not an OutOfMemoryError.


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 MiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=["PyTorch", "cuBLAS", "cuFFT", "cuDNN"],
)
def test_a_batch_that_does_not_fit_is_halved(gpu: SimulatedGPU, failure: Exception) -> None:
    gpu.out_of_memory = failure
    mixture, unit_bytes = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)), 2**24
    sizes: list[int] = []

    def model(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        torch.empty(len(batch), unit_bytes, dtype=torch.uint8, device=batch.device)
        return torch.stack([batch * 0.5, batch.flip(-1)], dim=1)

    def run(name: str) -> Tensor:
        ready = ReadyModel(model, n_stems=2, batch_size=8, device=torch.device(name))
        return torch.cat(list(separate(ready, Samples.of(mixture), ChunkPlan(4000, 1000))), dim=-1)

    expected = run("cpu")
    sizes.clear()
    gpu.total_bytes = gpu.allocated_bytes + int(2.9 * unit_bytes)
    assert (run("cuda") - expected).abs().max() <= 1e-6
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) <= {1, 2}
    gpu.total_bytes = gpu.allocated_bytes + int(0.9 * unit_bytes)
    with pytest.raises(EstimateError, match=r"does not hold one chunk of 4000 samples"):
        run("cuda")


# What a chunk costs

COUNTED = [slow("bs_roformer_viperx_1297"), "htdemucs", slow("mdx23c_instvoc_hq_2"), slow("scnet")]
COUNTED += [slow(name) for name in ("mel_band_roformer_kim", "bs_roformer_sw", "hdemucs_mmi", "drumsep")]
COUNTED += [slow(name) for name in ("scnet_xl_ihf", "htdemucs_6s", "demo")]


def empty_weights(name: str, folder: Path) -> Path:
    """A file of this model's weights in half precision, all zeros, that takes no space."""
    model = build(read_config(name))
    prefix, header, end = type(model).key_prefix("0"), {}, 0
    for key, tensor in model.state_dict().items():
        if key.startswith(prefix):
            start, end = end, end + 2 * tensor.numel()
            header[key.removeprefix(prefix)] = {
                "dtype": "F16",
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(header).encode()
    path = folder / f"{name}.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize("name", COUNTED)
def test_the_cost_of_a_chunk_matches_the_table(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    weights = empty_weights(name, tmp_path)
    with simulated_gpu() as gpu:
        model = load_model(name, checkpoint=weights, device="cuda", precision="fp16")
        samples = model.chunk_samples if model.fixed_chunk else 8 * model.sample_rate
        samples = model.input_samples(samples) or samples
        with gpu.shapes_alone(), torch.inference_mode():
            chunks = torch.empty(1, model.channels, samples, device="cuda")
            model(chunks)  # creates windows and tables, which stay
            with gpu.counted() as counts:
                model(chunks)
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    if request.config.getoption("--update-gpu-counts"):
        table[name] = {"samples": samples, "kernels": counts.kernels, "bytes": counts.bytes}
        TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=2) + "\n", encoding="utf-8")
        return
    most = " ".join(f"{kernel} {n}," for kernel, n in counts.names.most_common(8))
    found = f"{counts.kernels} kernels, {counts.bytes / 1e9:.2f} GB for {samples} samples ({most} …)"
    entry = table[name]
    told = f"{entry['kernels']} kernels and {entry['bytes'] / 1e9:.2f} GB"
    assert entry["samples"] == samples
    assert counts.kernels <= entry["kernels"], f"{found} instead of {told}"
    assert counts.bytes <= MOST_MORE_BYTES * entry["bytes"], f"{found} instead of {told}"
    if counts.kernels < entry["kernels"] or counts.bytes * MOST_MORE_BYTES < entry["bytes"]:
        pytest.fail(f"{found}, less than {told}: keep it by {UPDATE}")
