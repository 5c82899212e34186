"""Files that PyTorch wrote are read as PyTorch reads them; hostile ones are refused before they take memory or time.

One process opens all hostile files, with a GiB of memory and some seconds for each.
"""

import io
import json
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.limited import load_all
from helpers.small_model import small_model, write_weights, write_yaml
from separation.checkpoints.state_dict import open_weights, read_weights
from separation.errors import CheckpointError

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limits on memory")

HUGE = 2**40


def number(value: int) -> bytes:
    """An integer in a pickle."""
    n_bytes = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([n_bytes]) + value.to_bytes(n_bytes, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(n_items: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    """A persistent id."""
    return (
        b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(n_items) + b"tQ"
    )


def tensor(
    offset: int = 0, shape: bytes = numbers(4), strides: bytes = numbers(1), stored: bytes = storage(4)
) -> bytes:
    rest = number(offset) + shape + strides + b"\x89}t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + rest + b"R"


def saved(value: bytes) -> bytes:
    """A pickle of a dictionary with this value."""
    return b"\x80\x02}" + text("weight") + value + b"s."


def call(name: str, arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + arguments + b"R"


def archive(content: bytes, members: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """A PyTorch file with this pickle and a storage of four numbers."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        for name, data in ({"data.pkl": content, "data/0": bytes(16), "version": b"3\n"} | (members or {})).items():
            opened.writestr(f"x/{name}", data, method if name == "data.pkl" else zipfile.ZIP_STORED)
    return stream.getvalue()


def with_sizes(content: bytes, name: bytes, n_bytes: int, packed: int | None = None) -> bytes:
    """The archive, with another size for a member in its central directory."""
    data = bytearray(content)
    at = data.rindex(name) - 46
    assert data[at : at + 4] == b"PK\1\2"
    struct.pack_into("<LL", data, at + 20, n_bytes if packed is None else packed, n_bytes)
    return bytes(data)


def older(value: bytes, storages: bytes = b"", keys: bytes = b"](" + text("0") + b"e") -> bytes:
    """A file of PyTorch's older format."""
    stored = b"\x80\x02" + number(0x1950A86A20F9469CFC6C) + b".", b"\x80\x02" + number(1001) + b"."
    info = b"\x80\x02}" + text("little_endian") + b"\x88s."
    return b"".join(stored) + info + saved(value) + b"\x80\x02" + keys + b"." + storages


def older_tensor(n_items: int, **options: Any) -> bytes:
    return tensor(stored=storage(n_items)[:-2] + b"NtQ", **options)


def safetensors(header: Any, data: bytes = bytes(16)) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + data


def entry(*offsets: int, dtype: str = "F32", shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DOUBLING = b"(]q\x00" + b"(h\x00h\x00tq\x00" * 100 + b"t"  # each tuple has the one before twice
CRAFTED: dict[str, tuple[bytes, str]] = {
    # Harmless files, which show that the others are refused for their fault
    "harmless.ckpt": (archive(saved(tensor())), "is of another architecture"),
    "harmless.th": (older(older_tensor(4), struct.pack("<q", 4) + bytes(16)), "is of another architecture"),
    "harmless.safetensors": (safetensors({"weight": entry(0, 16)}), "is of another architecture"),
    # Archives
    "compressed.ckpt": (
        archive(saved(text("x" * 2**26)), method=zipfile.ZIP_DEFLATED),
        r"a compressed member, which could be of any size",
    ),
    "packed_in_fewer_bytes.ckpt": (
        with_sizes(archive(saved(tensor())), b"x/data/0", 16, packed=8),
        "a compressed member",
    ),
    "announces_gigabytes.ckpt": (with_sizes(archive(saved(tensor())), b"x/data.pkl", 2**32 - 2), "is damaged"),
    "storage_beyond_the_end.ckpt": (with_sizes(archive(saved(tensor())), b"x/data/0", 2**31), "is damaged"),
    "too_large_a_pickle.ckpt": (archive(saved(text("x" * 2**25))), r"a pickle of 33,55[\d,]+ bytes"),
    "many_members.ckpt": (
        archive(saved(tensor())).replace(struct.pack("<HHL", 3, 3, 0)[:4], struct.pack("<HH", 65534, 65534)),
        "is damaged",
    ),
    "leads_out.ckpt": (archive(saved(tensor()), {"../../evil": b"x", "/evil": b"x"}), "another architecture"),
    "torchscript.ckpt": (archive(saved(tensor()), {"constants.pkl": b""}), "it is TorchScript, which contains code"),
    "big_endian.ckpt": (archive(saved(tensor()), {"byteorder": b"big"}), "its numbers have another byte order"),
    "no_pickle.ckpt": (archive(saved(tensor())).replace(b"data.pkl", b"data.txt"), "is damaged"),
    # Calls that take memory
    "bytearray.ckpt": (archive(saved(call("builtins.bytearray", numbers(2**31)))), "has no state dict"),
    "bytearray_py2.ckpt": (archive(saved(call("__builtin__.bytearray", numbers(2**31)))), "has no state dict"),
    "tensor_class.ckpt": (
        archive(saved(call("torch.FloatTensor", numbers(2**31)))),
        r"run code \(torch\.FloatTensor\)",
    ),
    "tensor.ckpt": (archive(saved(call("torch.Tensor", numbers(2**31)))), "has no state dict"),
    "untyped_storage.ckpt": (
        archive(saved(call("torch.storage.UntypedStorage", numbers(2**31)))),
        r"run code \(torch\.",
    ),
    "storage_called.ckpt": (archive(saved(call("torch.FloatStorage", numbers(2**31)))), r"run code \(torch\.Float"),
    "storage_made.ckpt": (archive(saved(b"ctorch\nFloatStorage\n" + numbers(2**31) + b"\x81")), r"run code \(torch\."),
    "quantised.ckpt": (archive(saved(call("torch._utils._rebuild_qtensor", b"(t"))), r"run code \(torch\._utils"),
    "sparse.ckpt": (archive(saved(call("torch._utils._rebuild_sparse_tensor", b"(t"))), r"run code \(torch\._utils"),
    "meta.ckpt": (
        archive(saved(call("torch._utils._rebuild_meta_tensor_no_storage", b"(t"))),
        r"run code \(torch\._utils",
    ),
    "nested.ckpt": (archive(saved(call("torch._utils._rebuild_nested_tensor", b"(t"))), r"run code \(torch\._utils"),
    "of_a_type.ckpt": (
        archive(
            saved(call("torch._tensor._rebuild_from_type_v2", b"(cbuiltins\nbytearray\nN" + numbers(2**31) + b"Nt"))
        ),
        "has no state dict",
    ),
    "of_a_type_in_itself.ckpt": (
        archive(
            saved(
                b"(ctorch._tensor\n_rebuild_from_type_v2\nq\x00)q\x01" + b"(h\x00Nh\x01Ntq\x01" * 5000 + b"h\x00h\x01Rt"
            )
        ),
        "is damaged",
    ),
    "of_a_class.ckpt": (
        archive(
            saved(call("torch._tensor._rebuild_from_type_v2", b"(ctorch\nFloatStorage\nN" + numbers(2**31) + b"Nt"))
        ),
        "an unsupported kind of tensor",
    ),
    "encode.ckpt": (archive(saved(call("_codecs.encode", b"(" + text("x") + text("utf-16") + b"t"))), "no state dict"),
    "complex_text.ckpt": (archive(saved(call("fractions.Fraction", b"(" + DOUBLING + b"t"))), "run code .fractions"),
    # Storages and tensors
    "huge_storage.ckpt": (archive(saved(tensor(stored=storage(HUGE)))), "a storage has two types or sizes"),
    "huge_storage.th": (older(older_tensor(HUGE), struct.pack("<q", HUGE)), "is damaged"),
    "other_size.th": (older(older_tensor(4), struct.pack("<q", 8) + bytes(32)), "is damaged"),
    "missing_storage.th": (older(older_tensor(4), b"", b"]"), "is damaged"),
    "negative_storage.th": (older(older_tensor(-4), struct.pack("<q", -4)), "is damaged|larger than its storage"),
    "unknown_storage.ckpt": (archive(saved(tensor(stored=storage(4, "QInt8Storage")))), r"run code \(torch\.QInt8"),
    "two_types.ckpt": (
        archive(saved(b"(" + tensor() + tensor(stored=storage(4, "LongStorage")) + b"t")),
        "a storage has two types or sizes",
    ),
    "expanded.ckpt": (archive(saved(tensor(shape=numbers(HUGE), strides=numbers(0)))), "larger than the file"),
    "expanded_in_all_axes.ckpt": (
        archive(saved(tensor(shape=numbers(*[2**60] * 8), strides=numbers(*[0] * 8)))),
        "its tensors are larger than the file",
    ),
    "overlapping.ckpt": (archive(saved(tensor(shape=numbers(4, 4), strides=numbers(1, 1)))), "larger than its storage"),
    "beyond_its_storage.ckpt": (archive(saved(tensor(offset=1))), "a tensor is larger than its storage"),
    "far_beyond.ckpt": (archive(saved(tensor(offset=2**200))), "a tensor is larger than its storage"),
    "negative_stride.ckpt": (archive(saved(tensor(strides=numbers(-1)))), "a tensor has a negative size"),
    "many_axes.ckpt": (
        archive(saved(tensor(shape=numbers(*[1] * 999), strides=numbers(*[1] * 999)))),
        "unsupported kind",
    ),
    "no_numbers.ckpt": (archive(saved(tensor(shape=b"(" + text("4") + b"t"))), "a tensor has a negative size"),
    "shared_by_many.ckpt": (
        archive(
            b"\x80\x02}"
            + text("a")
            + tensor(stored=storage(2**18), shape=numbers(2**18))
            + b"q\x00s("
            + b"".join(text(f"a{n}") + b"h\x00" for n in range(10_000))
            + b"u.",
            {"data/0": bytes(2**20)},
        ),
        "its tensors are larger than the file",
    ),
    # Pickles
    "long_text.ckpt": (archive(saved(b"X\xff\xff\xff\xff")), "is damaged"),
    "memo.ckpt": (archive(saved(b"Nr\xff\xff\xff\xff")), "has no state dict|is damaged"),
    "no_memo.ckpt": (archive(saved(b"j\xff\xff\xff\xff")), "is damaged"),
    "frame.ckpt": (archive(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"."), "not a pickle of protocol 2"),
    "many_bytes.ckpt": (archive(saved(b"\x8e" + struct.pack("<Q", 2**62))), "opcode 142"),
    "long_number.ckpt": (archive(saved(b"\x8b" + struct.pack("<I", 2**30))), "opcode 139"),
    "extension.ckpt": (archive(saved(b"\x82\x01")), "opcode 130"),
    "old_call.ckpt": (archive(saved(b"(cos\nsystem\n" + text("true") + b"o")), r"run code \(os\.system\)"),
    "old_class.ckpt": (archive(saved(b"(" + text("true") + b"ios\nsystem\n")), "opcode 105"),
    "deep.ckpt": (archive(saved(b"N" + b"\x85" * 200_000)), "has no state dict"),
    "deep_key.ckpt": (archive(b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns."), "a tuple as a key"),
    "deep_lists.ckpt": (archive(saved(b"]" * 100_000 + b"a" * 99_999)), "has no state dict"),
    "doubling.ckpt": (archive(saved(DOUBLING)), "more than 1,000,000 values"),
    "a_circle.ckpt": (archive(b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s."), "more than 1,000,000 values"),
    "many_steps.ckpt": (archive(saved(b"](" + b"N" * 2_000_000 + b"e")), "more than 2,000,000 steps"),
    "copies.ckpt": (
        archive(
            b"\x80\x02ccollections\nOrderedDict\nq\x00]("
            + b"".join(b"(" + number(n) + b"Nt" for n in range(50_000))
            + b"e\x85q\x01("
            + b"h\x00h\x01R" * 100
            + b"t."
        ),
        "more than 2,000,000 steps",
    ),
    "no_end_of_a_name.ckpt": (archive(saved(b"c" + b"x" * 2**20)), "is damaged"),
    "many_names.ckpt": (
        archive(saved(b"(" + b"".join(f"ctyping\nx{n}\n".encode() for n in range(2000)) + b"t")),
        "more than 1,000 names",
    ),
    "terminal_escape.ckpt": (archive(saved(b"cos\n\x1b[31mred\n")), "an unprintable name"),
    "terminal_escape_as_weight.ckpt": (
        archive(b"\x80\x02}" + text("\x1b[31m") + tensor() + b"s."),
        "has a weight with the name",
    ),
    "long_name_of_a_weight.ckpt": (
        archive(b"\x80\x02}" + text("x" * 10**6) + tensor() + b"s."),
        "has a weight with the name",
    ),
    "no_storage_id.ckpt": (archive(saved(b"NQ")), "a NoneType in place of a tuple"),
    "set_state_of_a_name.ckpt": (archive(saved(b"ctyping\nAny\n}b")), r"run code \(typing\.Any\)"),
    "no_pickle.th": (b"\x80\x02.", "is damaged"),
    "empty.ckpt": (b"", "is damaged"),
    "circle_of_arguments.th": (
        archive(
            b"\x80\x02}("
            + text("klass")
            + b"cdemucs.hdemucs\nHDemucs\n"
            + text("args")
            + b"]q\x00h\x00a"
            + text("kwargs")
            + b"}"
            + text("state")
            + b"}u."
        ),
        "more than 1,000,000 values",
    ),
    "many_arguments.th": (
        archive(
            b"\x80\x02}("
            + text("klass")
            + b"cdemucs.hdemucs\nHDemucs\n"
            + text("args")
            + b"(]("
            + b"N" * 20_000
            + b"et"
            + text("kwargs")
            + b"}"
            + text("state")
            + b"}u."
        ),
        "more than 10,000 values",
    ),
    # safetensors
    "header_of_100_mb.safetensors": (safetensors(b'{"a": ' + b" " * 2**23 + b"1}"), "announces a header of 8,388,6"),
    "huge_header.safetensors": (b"\xff" * 8 + b"{}", "announces a header of 18,446,744,073,709,551,615 bytes"),
    "overlapping.safetensors": (safetensors({"a": entry(0, 16), "b": entry(0, 16)}), "is damaged"),
    "overflowing.safetensors": (safetensors({"a": entry(0, 2**64 - 1)}), "is damaged"),
    "overflowing_shape.safetensors": (safetensors({"a": entry(0, 16, shape=(2**32, 2**32))}), "is damaged"),
    "negative.safetensors": (safetensors({"a": entry(-16, 0)}), "is damaged"),
    "twice.safetensors": (
        safetensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":1}'),
        "the key 'a' appears twice",
    ),
    "deep.safetensors": (safetensors(b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "is damaged"),
    "hole.safetensors": (safetensors({"a": entry(16, 32)}, bytes(32)), "is damaged"),
    "a_list.safetensors": (safetensors([1]), "not a JSON object"),
    "escape.safetensors": (safetensors({"\x1b[31m": entry(0, 16)}), "has a weight with the name"),
    "hostile_class.safetensors": (
        safetensors({"__metadata__": {"klass": "\x1b[31m" * 1000, "args": "[]", "kwargs": "{}"}, "a": entry(0, 16)}),
        "it describes a|a damaged description|another architecture",
    ),
}


def special(folder: Path) -> dict[Path, str]:
    """Checkpoints that are not regular files, with the error for each."""
    os.mkfifo(folder / "pipe.ckpt")
    (folder / "device.ckpt").symlink_to("/dev/zero")
    (folder / "loop.ckpt").symlink_to("loop.ckpt")
    (folder / "folder.ckpt").mkdir()
    return dict.fromkeys((folder / f"{name}.ckpt" for name in ("pipe", "device", "loop", "folder")), "there is no file")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """For each hostile file, the result of loading it, and by how many MiB the process had grown by then."""
    folder = tmp_path_factory.mktemp("hostile")
    config = write_yaml(folder, drop=("files",))
    whole = write_weights(small_model().state_dict(), folder / "whole.ckpt")
    paths = [whole]
    for name, (content, _) in CRAFTED.items():
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    paths += special(folder)
    for path in paths:
        config.with_name(f"{path.name}.yaml").write_bytes(config.read_bytes())
    config.unlink()
    return {path.name: answer for path, answer in load_all(paths).items()}


@pytest.mark.slow
def test_a_whole_checkpoint_loads_within_the_limits(answers: dict[str, tuple[str, int]]) -> None:
    assert answers["whole.ckpt"][0] == "loaded"


@pytest.mark.slow
@pytest.mark.parametrize("name", CRAFTED)
def test_a_hostile_file_is_refused_before_it_takes_memory(name: str, answers: dict[str, tuple[str, int]]) -> None:
    answer, grown_mib = answers[name]
    assert answer.startswith("refused: ")
    assert "\n" not in answer and answer.isprintable() and len(answer) < 600
    assert re.search(CRAFTED[name][1], answer), answer
    assert grown_mib < 300


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pipe.ckpt", "device.ckpt", "loop.ckpt", "folder.ckpt"])
def test_only_regular_files_are_opened(name: str, answers: dict[str, tuple[str, int]]) -> None:
    assert "there is no file" in answers[name][0]


def test_a_path_that_no_file_can_have_is_an_error(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b", "x" * 5000):
        with pytest.raises(CheckpointError, match=r"there is no file|cannot be read") as caught:
            open_weights(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(caught.value)


def test_files_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 10, generator=generator)
    state = {
        "plain": base,
        "transposed": base.T,
        "a part": base[1:3, ::2],
        "one": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "bytes": torch.arange(200, dtype=torch.uint8),
        "truth": base > 0,
        "long": torch.arange(-5, 5),
        "parameter": torch.nn.Parameter(base),
        "expanded": base[:1].expand(4, 10),
        "with an attribute": base.clone(),
    }
    state["with an attribute"].note = "of its author"  # type: ignore[attr-defined]
    for suffix in (".ckpt", ".th"):
        path = write_weights(state, tmp_path / f"x{suffix}")
        read, expected = read_weights(open_weights(path), {}), torch.load(path, weights_only=True)
        assert list(read) == list(state)
        for key, value in expected.items():
            assert read[key].dtype == value.dtype and torch.equal(read[key], value), key


def test_an_archive_of_more_than_four_gigabytes_is_read(tmp_path: Path) -> None:
    """Its offsets have 64 bits. The file is sparse and takes no space."""
    content = archive(saved(tensor(stored=storage(4, key="1"))))
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as opened:
        opened.writestr("x/data.pkl", saved(tensor(stored=storage(4, key="1"))))
        opened.writestr("x/data/0", b"")
        opened.fp.seek(2**32 + 100)  # type: ignore[union-attr]
        opened.start_dir = 2**32 + 100
        opened.writestr("x/data/1", struct.pack("<4f", 1, 2, 3, 4))
    assert (tmp_path / "x.ckpt").stat().st_size > 2**32 > len(content)
    (read,) = open_weights(tmp_path / "x.ckpt").tensors.values()
    assert read().tolist() == [1, 2, 3, 4]


def test_tensors_may_share_storage_but_not_stand_for_far_more_than_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(100_000)}, tmp_path / "x.ckpt")
    assert len(open_weights(tmp_path / "x.ckpt").tensors) == 1
    torch.save({"a": torch.zeros(1).expand(1_000_000)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="its tensors are larger than the file"):
        open_weights(tmp_path / "x.ckpt")
