"""Reading YAML, fetching files from a server on 127.0.0.1, and loading weights of small models."""

import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from separation import checkpoints
from separation.checkpoints import WeightFile, available, fetch, load_model, read_config, verify
from separation.errors import CheckpointError, DownloadError, InputError, OutputError, RecipeError
from separation.models import ARCHITECTURES
from separation.models.base import SeparationModel
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig

CONTENT = bytes(range(256)) * 4096  # 1 MiB
HYPER_PARAMETERS: dict[str, Any] = {
    "dim": 16,
    "depth": 1,
    "stereo": True,
    "num_stems": 2,
    "freqs_per_bands": [3] * 11,
    "dim_head": 8,
    "heads": 2,
    "stft_n_fft": 64,
    "stft_hop_length": 16,
    "stft_win_length": 64,
}
DOCUMENT: dict[str, Any] = {
    "architecture": "bs_roformer",
    "stems": ["vocals", "drums"],
    "files": [{"name": "small.ckpt"}],
    "audio": {"sample_rate": 44100, "chunk_size": 4096, "dim_f": 1024},
    "model": HYPER_PARAMETERS,
}
SMALL_HTDEMUCS = {
    "sources": ["drums", "bass"],
    "channels": 8,
    "bottom_channels": 0,
    "t_layers": 1,
    "t_heads": 2,
    "nfft": 2048,
    "segment": "1/4",
    "samplerate": 44100,
}


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path, with the faults that a test asks for; `ranges` logs the Range headers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.knows_ranges = True
        self.break_after: list[int] = []  # of each answer in turn, the bytes after which the connection closes
        self.statuses: list[int] = []  # of each answer in turn, an error to give instead
        self.delay_seconds = 0.0
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/weights.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        time.sleep(server.delay_seconds)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.knows_ranges else 0
        if asked and start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if asked and server.knows_ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.break_after:
            body = body[: server.break_after.pop(0)]
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(folder))
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time to more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weight_file(url: str | None, content: bytes = CONTENT, **other: Any) -> WeightFile:
    known = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "stem": None}
    return WeightFile(**{"name": "sub/weights.bin", "url": url, "checkpoint": "some_model", **known, **other})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def write_yaml(folder: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    path = folder / "small.yaml"
    document = {key: value for key, value in {**DOCUMENT, **changes}.items() if key not in drop}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.fixture
def state() -> dict[str, Tensor]:
    return small_model().state_dict()


def small_model() -> BSRoFormer:
    torch.manual_seed(0)
    hyper_parameters = HYPER_PARAMETERS | {"freqs_per_bands": tuple(HYPER_PARAMETERS["freqs_per_bands"])}
    return BSRoFormer(BSRoFormerConfig(**hyper_parameters)).eval()


def chunks(samples: int = 256) -> Tensor:
    return torch.randn(1, 2, samples, generator=torch.Generator().manual_seed(1))


# Fetching


def test_a_missing_file_is_downloaded_verified_and_left_alone_in_its_folder(server: Server, weights: Path) -> None:
    path = fetch(weight_file(server.url), quiet=True)
    assert path == weights / "sub" / "weights.bin" and path.read_bytes() == CONTENT
    assert names_in(weights) == ["weights.bin", "weights.bin.verified"]
    assert fetch(weight_file(server.url), quiet=True) == path
    assert server.ranges == [None]


def test_a_broken_connection_is_resumed_where_it_broke(server: Server, weights: Path) -> None:
    server.break_after = [300_000, 200_000]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_a_part_that_an_earlier_process_left_is_resumed(server: Server, weights: Path) -> None:
    part = weights / "sub" / "weights.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1000])
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"] and not part.exists()


def test_a_part_that_was_complete_is_taken(server: Server, weights: Path) -> None:
    part = weights / "sub" / "weights.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT


def test_a_server_without_ranges_makes_it_start_from_zero(server: Server, weights: Path) -> None:
    server.knows_ranges, server.break_after = False, [300_000]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def test_a_connection_that_breaks_every_time_is_given_up(server: Server, weights: Path) -> None:
    server.break_after = [0] * 20
    with pytest.raises(DownloadError, match="the connection broke after 0 of 1,048,576 bytes"):
        fetch(weight_file(server.url), quiet=True)
    assert len(server.ranges) == 1 + len(checkpoints.RETRY_SECONDS)


def test_a_busy_server_is_asked_again_and_a_missing_page_is_not(server: Server, weights: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DownloadError, match=r"weights\.bin is not in .*sub and .*the server answers 404"):
        fetch(weight_file(server.url), quiet=True)
    assert len(server.ranges) == 1
    server.statuses = [503, 429]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT


def test_wrong_content_from_the_server_is_refused_and_removed(server: Server, weights: Path) -> None:
    server.content = b"x" * len(CONTENT)
    with pytest.raises(CheckpointError, match=r"gave a file that has the sha256 .* instead of"):
        fetch(weight_file(server.url), quiet=True)
    server.content = b"<html>please log in</html>"
    with pytest.raises(CheckpointError, match="has 26 bytes instead of 1,048,576"):
        fetch(weight_file(server.url), quiet=True)
    assert not any(name.startswith("weights.bin") for name in names_in(weights) if not name.endswith(".lock"))


def test_no_network_names_the_file_the_url_the_folder_and_the_command(server: Server, weights: Path) -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(DownloadError) as caught:
        fetch(weight_file(url), quiet=True)
    for part in ("weights.bin", url, str(weights / "sub"), "python -m separation models download some_model"):
        assert part in str(caught.value)


def test_a_missing_file_without_url_is_named(weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no_such\.bin is missing and has no url"):
        fetch(weight_file(None, name="no_such.bin"))


def test_a_file_without_url_is_also_found_beside_the_project(weights: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoints, "PROJECT", tmp_path / "project")
    shipped = tmp_path / "project" / "weights" / "shipped.bin"
    shipped.parent.mkdir(parents=True)
    shipped.write_bytes(CONTENT)
    assert fetch(weight_file(None, name="shipped.bin")) == shipped


@pytest.mark.parametrize(
    "content, fault", [(b"short", "has 5 bytes instead of"), (b"x" * len(CONTENT), "has the sha256")]
)
def test_an_altered_file_is_named_with_what_to_do(weights: Path, content: bytes, fault: str) -> None:
    path = weights / "sub" / "weights.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{fault}.*delete it, then run .*models download some_model"):
        fetch(weight_file("http://127.0.0.1/"))
    with pytest.raises(CheckpointError, match=fault):
        verify(path, weight_file("http://127.0.0.1/"))
    assert path.read_bytes() == content


def test_a_verified_file_is_hashed_again_only_after_a_change(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights / "sub" / "weights.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    file = weight_file("http://127.0.0.1/")
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: hashed.append(1) or digest(*args))
    for _ in range(3):
        fetch(file)
    assert len(hashed) == 1
    path.write_bytes(b"x" * len(CONTENT))
    with pytest.raises(CheckpointError, match="sha256"):
        fetch(file)


def test_a_folder_that_takes_no_stamp_costs_a_hash_and_no_error(weights: Path) -> None:
    path = weights / "sub" / "weights.bin"
    (weights / "sub" / "weights.bin.verified").mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch(weight_file("http://127.0.0.1/")) == path


def test_progress_goes_to_stderr_unless_quiet(
    server: Server, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(weight_file(server.url, name="a.bin"))
    shown = capsys.readouterr()
    assert "a.bin: 100%" in shown.err and shown.out == ""
    fetch(weight_file(server.url, name="b.bin"), quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_output_error(server: Server, weights: Path) -> None:
    weights.mkdir()
    (weights / "full.bin.part").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"full\.bin\.part cannot be written \(No space left on device\)"):
        fetch(weight_file(server.url, name="full.bin"), quiet=True)


def test_an_unwritable_folder_is_an_output_error(server: Server, weights: Path) -> None:
    weights.write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="SEPARATION_WEIGHTS"):
        fetch(weight_file(server.url), quiet=True)


def test_two_processes_that_want_one_file_download_it_once(server: Server, weights: Path) -> None:
    server.delay_seconds = 0.5
    script = (
        "import sys; from separation.checkpoints import WeightFile, fetch; print('ready', flush=True); input();"
        f"print(fetch({weight_file(server.url)!r}, quiet=True))"
    )
    command = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(checkpoints.PROJECT), "SEPARATION_WEIGHTS": str(weights)}
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:  # both at once, as soon as both are ready
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0] for process in processes]
    assert answers == [f"{weights / 'sub' / 'weights.bin'}\n"] * 2
    assert server.ranges == [None]
    assert names_in(weights) == ["weights.bin", "weights.bin.verified"]


# Reading YAML


def test_a_python_tuple_loads_and_no_other_python_tag_does(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    text = "architecture: bs_roformer\nstems: [vocals]\naudio: {sample_rate: 44100, chunk_size: 8}\nmodel:\n"
    path.write_text(text + "  freqs_per_bands: !!python/tuple\n    - 2\n    - [3, 4]\n")
    assert read_config(path).hyper_parameters == {"freqs_per_bands": (2, [3, 4])}
    ran = tmp_path / "ran"
    for tag in (
        f"!!python/object/apply:os.mkdir ['{ran}']",
        "!!python/object:os.PathLike {}",
        "!!python/name:os.system",
    ):
        path.write_text(text + f"  dim: {tag}\n")
        with pytest.raises(CheckpointError, match=rf"model\.yaml line 5 .*{tag.split()[0].removeprefix('!!')}"):
            read_config(path)
    assert not ran.exists()


def test_an_unknown_model_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="unknown model 'nonsense': use one of bs_roformer_viperx_1297, demo, htdemucs"
    ):
        read_config("nonsense")
    with pytest.raises(RecipeError, match="unknown model"):
        read_config("../models/demo")
    with pytest.raises(RecipeError, match="there is no file"):
        read_config(tmp_path / "nonsense.yaml")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"architecture": "perceptron"}, "unknown architecture 'perceptron', use one of bs_roformer"),
        ({"stems": "vocals"}, "stems must be a list, not 'vocals'"),
        ({"stems": ["vocals", "vocals"]}, "stems must name each stem once"),
        ({"audio": {"chunk_size": 8}}, "sample_rate must be a whole number above 0, and is missing"),
        ({"audio": {"chunk_size": -8, "sample_rate": 44100}}, "chunk_size must be a whole number above 0, not -8"),
        ({"files": ["x.ckpt"]}, "each of files must be a section"),
        ({"files": [{"name": "x", "md5": "0"}]}, "unknown key 'md5'"),
        ({"files": [{"name": "../x"}]}, "leads out of the weights folder"),
        ({"files": [{"name": "x", "sha256": "12"}]}, "sha256 must be 64 digits"),
        ({"files": [{"name": "x", "url": "file:///etc/passwd"}]}, "url must begin with https"),
        ({"files": [{"name": "x"}, {"name": "y"}]}, "the files must name one stem each"),
    ],
)
def test_a_yaml_that_does_not_make_sense_is_named_with_its_key(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"small\.yaml: .*{message}"):
        read_config(write_yaml(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"- a list", b"a: [1", b"\xff\xfe\x00", b"a: \x07"])
def test_a_file_that_is_no_yaml_section_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.yaml"):
        read_config(path)


def test_a_community_yaml_needs_none_of_our_keys(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "x.ckpt")
    relatives = {"linear_transformer_depth": 0, "skip_connection": False, "flash_attn": True}
    path = write_yaml(
        tmp_path,
        drop=("architecture", "stems", "files"),
        model=HYPER_PARAMETERS | relatives,
        training={"instruments": ["vocals", "drums"], "target_instrument": None, "lr": 1e-5},
        inference={"num_overlap": 4},
    )
    assert load_model(path, checkpoint=tmp_path / "x.ckpt").stems == ("vocals", "drums")
    path = write_yaml(tmp_path, drop=("stems",), training={"instruments": ["a", "b"], "target_instrument": "a"})
    assert read_config(path).stems == ("a",)


@pytest.mark.parametrize("name", available())
def test_every_shipped_yaml_reads_and_builds(name: str) -> None:
    description = read_config(name)
    assert description.files and description.licence != "not stated" and description.quality != "not stated"
    for file in description.files:
        assert file.sha256 or file.url is None
    specialists = tuple(file.stem for file in description.files if file.stem)
    model = checkpoints._build(description, specialists)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    sources = description.hyper_parameters.get("sources")
    assert sources is None or tuple(sources) == description.stems


@pytest.mark.parametrize(
    "name, parameters",
    [("bs_roformer_viperx_1297", 159_758_092), ("htdemucs", 41_984_456), ("htdemucs_6s", 27_414_996)],
)
def test_the_published_models_have_their_number_of_parameters(name: str, parameters: int) -> None:
    model = checkpoints._build(read_config(name), ())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# Loading


def write_weights(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in state.items()}, path)  # it refuses tensors that share memory
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".th")
    return path


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".th", ".safetensors"])
def test_every_format_gives_the_same_model(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    path = write_weights(state, tmp_path / f"x{suffix}")
    model = load_model(write_yaml(tmp_path), checkpoint=path)
    assert torch.equal(model(chunks()), small_model()(chunks()))
    assert (model.name, model.stems, model.sample_rate) == ("small", ("vocals", "drums"), 44100)
    assert (model.chunk_samples, model.channels, model.training) == (4096, 2, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "nesting", [("state_dict",), ("state",), ("model",), ("model_state_dict",), ("state", "model")]
)
def test_nested_state_dicts_load(tmp_path: Path, state: dict[str, Tensor], nesting: tuple[str, ...]) -> None:
    saved: dict[str, Any] = state
    for key in nesting:
        saved = {"epoch": 3, key: saved, "optimizer": {"lr": 0.1}}
    torch.save(saved, tmp_path / "x.ckpt")
    model = load_model(write_yaml(tmp_path), checkpoint=tmp_path / "x.ckpt")
    assert torch.equal(model(chunks()), small_model()(chunks()))


@pytest.mark.parametrize("prefix", ["module.", "model.", "model.module."])
def test_a_prefix_that_all_keys_have_is_dropped(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    path = write_weights({prefix + key: value for key, value in state.items()}, tmp_path / "x.ckpt")
    loaded = load_model(write_yaml(tmp_path), checkpoint=path).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_named_file_is_found_in_the_weights_folder(tmp_path: Path, weights: Path, state: dict[str, Tensor]) -> None:
    weights.mkdir()
    torch.save(state, weights / "small.ckpt")
    assert torch.equal(load_model(write_yaml(tmp_path), stems=["drums"])(chunks()), small_model()(chunks()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights_in_half_precision_are_widened(
    tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype, suffix: str
) -> None:
    half = {key: value.to(dtype) for key, value in state.items()}
    model = load_model(write_yaml(tmp_path), checkpoint=write_weights(half, tmp_path / f"x{suffix}"))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in half.items())
    assert {value.dtype for value in loaded.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", torch.bfloat16])
def test_a_half_precision_casts_the_linear_layers(
    tmp_path: Path, state: dict[str, Tensor], precision: torch.dtype | str
) -> None:
    path = write_weights(state, tmp_path / "x.ckpt")
    model = load_model(write_yaml(tmp_path), checkpoint=path, precision=precision)
    types = {type(m).__name__: {p.dtype for p in m.parameters(recurse=False)} for m in model.modules()}
    assert types["Linear"] == {torch.bfloat16} and types["RMSNorm"] == {torch.float32}


def test_device_and_precision_may_be_auto_and_must_be_known(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = write_weights(state, tmp_path / "x.ckpt")
    config = write_yaml(tmp_path)
    model = load_model(config, checkpoint=path, device="auto", precision="auto")
    assert model(chunks().to(next(model.parameters()).device)).shape == (1, 2, 2, 256)
    with pytest.raises(InputError, match="fp8"):
        load_model(config, checkpoint=path, precision="fp8")
    with pytest.raises(InputError, match="abacus"):
        load_model(config, checkpoint=path, device="abacus")


@pytest.mark.parametrize("suffix", [".ckpt", ".th", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_half_a_checkpoint_is_one_clear_sentence(
    tmp_path: Path, state: dict[str, Tensor], suffix: str, kept: float
) -> None:
    path = write_weights(state, tmp_path / f"x{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(
        CheckpointError, match=r"is damaged, incomplete or no (PyTorch|safetensors) checkpoint"
    ) as caught:
        load_model(write_yaml(tmp_path), checkpoint=path)
    assert "\n" not in str(caught.value)


def test_a_web_page_under_the_name_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for suffix in (".ckpt", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        path.write_text("<!DOCTYPE html><html>Not found</html>" * 20)
        with pytest.raises(CheckpointError, match="is damaged, incomplete or no"):
            load_model(write_yaml(tmp_path), checkpoint=path)


def test_a_checkpoint_of_another_architecture_or_size_is_told_by_its_keys(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    config = write_yaml(tmp_path)
    path = write_weights({"encoder.0.weight": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(
        CheckpointError, match=r"other\.ckpt\) seems to be of another architecture or size: .*missing .*1 of"
    ):
        load_model(config, checkpoint=path)
    key = "final_norm.gamma"
    path = write_weights(state | {key: torch.zeros(24)}, tmp_path / "wide.ckpt")
    with pytest.raises(CheckpointError, match=rf"of another shape \({key}: \[24\] instead of \[16\]\)"):
        load_model(config, checkpoint=path)
    del state[key]
    with pytest.raises(CheckpointError, match=rf"1 of its keys are missing \({key}\)"):
        load_model(config, checkpoint=write_weights(state, tmp_path / "less.ckpt"))


@pytest.mark.parametrize("saved", [[1, 2], {"epoch": 3}, {}, {"state_dict": {"a": torch.zeros(1), "b": "text"}}])
def test_a_pickle_that_holds_no_state_dict_is_an_error(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_model(write_yaml(tmp_path), checkpoint=tmp_path / "x.ckpt")


class Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, state: dict[str, Tensor], form: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / "x.ckpt"
    saved = {"state_dict": state, "extra": Malicious(ran)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(Malicious(ran), protocol=2))
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"is refused: loading it would run code \(\w+\.mkdir\)"):
        load_model(write_yaml(tmp_path), checkpoint=path)
    assert not ran.exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"colour": 1}, "bs_roformer has no hyper-parameter colour"),
        ({"skip_connection": True}, "bs_roformer has no hyper-parameter skip_connection"),
        ({"freqs_per_bands": [3, 4]}, "adds up to 7 bins"),
        ({"dim": "wide"}, "the model section is not usable"),
        ({"depth": 1.5}, "the model section is not usable"),
        ({"num_stems": 3}, "names 2 stems, num_stems is 3"),
    ],
)
def test_wrong_hyper_parameters_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"small\.yaml.*{message}"):
        load_model(write_yaml(tmp_path, model=HYPER_PARAMETERS | changes))


def test_a_checkpoint_path_that_is_not_there_and_a_yaml_without_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*nothing\.ckpt"):
        load_model(write_yaml(tmp_path), checkpoint=tmp_path / "nothing.ckpt")
    with pytest.raises(CheckpointError, match="names no files of weights: give one with checkpoint="):
        load_model(write_yaml(tmp_path, drop=("files",)))


def test_a_stem_that_the_model_does_not_give_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="small gives vocals, drums, not 'kazoo'"):
        load_model(write_yaml(tmp_path), stems=["vocals", "kazoo"])
    with pytest.raises(RecipeError, match="not no stem at all"):
        load_model(write_yaml(tmp_path), stems=[])


# Checkpoints made of specialists


def write_specialists(tmp_path: Path, weights: Path) -> tuple[Path, dict[str, SeparationModel]]:
    """A checkpoint of two small HTDemucs specialists; also each one's whole network, loaded without our loader."""
    architecture: Any = ARCHITECTURES["htdemucs"]
    config = architecture.Config(**SMALL_HTDEMUCS)
    networks = {}
    weights.mkdir()
    for seed, stem in enumerate(("drums", "bass")):
        torch.manual_seed(seed)
        networks[stem] = architecture(config).eval()
        save_file(networks[stem].network.state_dict(), weights / f"{stem}.safetensors")
    files = [{"name": f"{stem}.safetensors", "stem": stem} for stem in networks]
    path = write_yaml(
        tmp_path,
        architecture="htdemucs",
        stems=list(networks),
        files=files,
        model=SMALL_HTDEMUCS,
        audio={"sample_rate": 44100, "chunk_size": 11025},
    )
    return path, networks


@torch.no_grad()
def test_only_the_specialists_that_are_asked_for_are_loaded_in_that_order(tmp_path: Path, weights: Path) -> None:
    path, networks = write_specialists(tmp_path, weights)
    mixture = chunks(11025)
    drums, bass = networks["drums"](mixture)[:, 0], networks["bass"](mixture)[:, 1]
    both = load_model(path, stems=["bass", "drums"])
    assert both.stems == ("bass", "drums")
    assert torch.equal(both(mixture), torch.stack([bass, drums], dim=1))
    (weights / "drums.safetensors").unlink()
    one = load_model(path, stems=["bass"], precision="bf16")  # the architecture has no half precision
    assert one.stems == ("bass",) and torch.equal(one(mixture), bass.unsqueeze(1))
    with pytest.raises(CheckpointError, match=r"drums\.safetensors is missing"):
        load_model(path)


def test_one_file_stands_for_one_specialist_and_not_for_several(tmp_path: Path, weights: Path) -> None:
    path, _ = write_specialists(tmp_path, weights)
    assert load_model(path, checkpoint=weights / "bass.safetensors", stems=["bass"]).stems == ("bass",)
    with pytest.raises(CheckpointError, match="needs 2 files, checkpoint= gives one"):
        load_model(path, checkpoint=weights / "bass.safetensors")


@torch.no_grad()
def test_a_single_network_of_the_same_architecture_loads(tmp_path: Path, weights: Path) -> None:
    path, networks = write_specialists(tmp_path, weights)
    document = yaml.safe_load(path.read_text()) | {"files": [{"name": "drums.safetensors"}]}
    path.write_text(yaml.safe_dump(document))
    mixture = chunks(11025)
    assert torch.equal(load_model(path)(mixture), networks["drums"](mixture))
