"""Reads PyTorch's files, the zip archive and the older format. In place of each tensor is a function that reads it.

Every tensor's place is compared with the file's size first, so that a file cannot ask for more memory than it has
bytes. Compressed members of an archive are refused; PyTorch never writes them.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

from separation.checkpoints import pickles
from separation.checkpoints.pickles import Name, Reader, check_plain

MOST_VALUES = 1_000_000  # in a file; a value counts each time that it is referred to
MOST_DIRECTORY_BYTES = 2**25  # an archive's central directory
MOST_AXES = 8
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "ComplexFloatStorage": torch.complex64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_OWN = {*DTYPES, *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the older format's


@dataclass(eq=False)
class Storage:
    """A piece of the file with the items of one or more tensors."""

    dtype: torch.dtype
    n_items: int
    start: int | None = None  # the offset of its first byte; None until it is known

    @property
    def n_bytes(self) -> int:
        return self.n_items * self.dtype.itemsize


def read_torch_file(path: Path, find: Callable[[str], Name]) -> Any:
    """The saved value, with a function without arguments in place of each tensor, which reads it.

    `find` gives the stand-in for a class or a function outside PyTorch, or raises UnpicklingError.

    Raises UnpicklingError for a file with anything that is not allowed. A damaged file leads to other exceptions too.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        is_zip = file.read(4) == b"PK\x03\x04"
        saved = (_read_zip if is_zip else _read_older)(file, size, partial(_find, path, find))
    check_plain(saved, MOST_VALUES)
    return saved


def _read_zip(file: IO[bytes], size: int, find: Callable[[str], Name]) -> Any:
    members = _members(file, size)
    top = next(
        name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1
    )
    if f"{top}/constants.pkl" in members:
        raise UnpicklingError("it is TorchScript, which contains code")
    if f"{top}/byteorder" in members and _content(file, members[f"{top}/byteorder"], size) != b"little":
        raise UnpicklingError("its numbers have another byte order")
    storages: dict[str, Storage] = {}

    def load_storage(saved_id: tuple[Any, ...]) -> Storage:
        _, kind, key, _, n_items = saved_id
        dtype = _dtype_of(kind)
        if key not in storages:
            start, n_bytes = _place(file, members[f"{top}/data/{key}"], size)
            storages[key] = Storage(dtype, n_bytes // dtype.itemsize, start)
        if storages[key].dtype != dtype or n_items > storages[key].n_items:
            raise UnpicklingError("a storage has two types or sizes")
        return storages[key]

    return Reader(_content(file, members[f"{top}/data.pkl"], size), find, load_storage).load()


def _read_older(file: IO[bytes], size: int, find: Callable[[str], Name]) -> Any:
    """Four pickles, a pickle of the storages' keys, and the storages, each after its number of items."""
    storages: dict[str, Storage] = {}

    def load_storage(saved_id: tuple[Any, ...]) -> Storage:
        _, kind, key, _, n_items, view = saved_id
        dtype = _dtype_of(kind)
        storage = storages.setdefault(key, Storage(dtype, n_items))
        if (storage.dtype, storage.n_items, view) != (dtype, n_items, None):
            raise UnpicklingError("a storage has two types or sizes")
        return storage

    file.seek(0)
    reader = Reader(file.read(pickles.MOST_BYTES), find, load_storage)
    if (reader.load(), reader.load()) != (_MAGIC, _PROTOCOL):
        raise UnpicklingError("it is not a PyTorch file")
    if not reader.load()["little_endian"]:
        raise UnpicklingError("its numbers have another byte order")
    saved, keys = reader.load(), reader.load()
    position = reader.position
    for key in keys:
        file.seek(position)
        (n_items,) = struct.unpack("<q", file.read(8))
        storage = storages.pop(key)
        storage.start = position + 8
        position = storage.start + storage.n_bytes
        if n_items != storage.n_items or not 0 <= storage.n_items <= size or position > size:
            raise EOFError
    if storages:
        raise EOFError
    return saved


def _dtype_of(kind: Any) -> torch.dtype:
    return DTYPES[kind.name.removeprefix("torch.")]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def _find(path: Path, find: Callable[[str], Name], name: str) -> Name:
    """The stand-in for a class or a function; `find` gives those outside PyTorch."""
    if name.removeprefix("torch.") in _OWN:
        return Name(name)
    calls: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": _dictionary,
        "torch.Size": lambda sizes: sizes,
        "torch._utils._rebuild_tensor": partial(_tensor, path),
        "torch._utils._rebuild_tensor_v2": partial(_tensor, path),
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch.nn.parameter.Parameter": lambda data, *_: data,
        "torch._tensor._rebuild_from_type_v2": _with_attributes,
    }
    return Name(name, calls[name]) if name in calls else find(name)


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    pickles.put(made, items)
    return made


def _with_attributes(called: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """A tensor that was saved with attributes of its own, without them."""
    if not isinstance(called, Name) or called.call is None:
        raise UnpicklingError("it has an unsupported kind of tensor")
    return called.call(*arguments)


def _tensor(path: Path, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Callable[[], Tensor]:
    """A function that reads the tensor of this shape; strides are in items."""
    if not isinstance(storage, Storage) or not len(shape) == len(strides) <= MOST_AXES:
        raise UnpicklingError("it has an unsupported kind of tensor")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)):
        raise UnpicklingError("a tensor has a negative size")
    if offset + _span(shape, strides) > storage.n_items:
        raise UnpicklingError("a tensor is larger than its storage")
    return partial(read_tensor, path, storage, offset, shape, strides)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of items in the storage from the tensor's first to its last, included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0


def read_tensor(path: Path, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The tensor, made contiguous."""
    assert storage.start is not None
    size = storage.dtype.itemsize
    content = read_bytes(path, storage.start + offset * size, _span(shape, strides) * size).view(storage.dtype)
    return content.as_strided(shape, strides).contiguous()


def check_total(value: Any, size: int) -> None:
    """Raise UnpicklingError if the tensors need more memory than a file of this size should: many may share a storage.

    `value` is what `read_torch_file` returns, or a part of it.
    """
    total, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list | tuple):
            waiting.extend(each.values() if isinstance(each, dict) else each)
        elif isinstance(each, partial) and each.func is read_tensor:
            _, storage, _, shape, strides = each.args
            total += max(prod(shape), _span(shape, strides)) * storage.dtype.itemsize
    if total > 4 * size + 2**20:  # more than the file's size, because some networks share weights
        raise UnpicklingError("its tensors are larger than the file")


def read_bytes(path: Path, start: int, n_bytes: int) -> Tensor:
    """Read bytes of a file at once. A memory map would read page by page, which is slow if they are not cached."""
    content = torch.empty(n_bytes, dtype=torch.uint8)
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        missing = content.numpy().data
        while missing:
            n_read = stream.readinto(missing)
            if not n_read:
                raise EOFError(f"{path} became shorter while it was read")
            missing = missing[n_read:]
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Zip archives (sections 4.3 and 4.5.3 of PKWARE's APPNOTE)


@dataclass(frozen=True)
class _Member:
    header: int  # the offset of its local header
    n_bytes: int
    is_stored: bool  # neither compressed nor encrypted


def _members(file: IO[bytes], size: int) -> dict[str, _Member]:
    """An archive's members by name; the last one, if two have the same name."""
    tail_start = max(0, size - 2**16 - 22)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rindex(b"PK\5\6")
    n_members, list_bytes, list_start = struct.unpack_from("<HLL", tail, at + 10)
    if 0xFFFFFFFF in (list_bytes, list_start) or n_members == 0xFFFF:
        _, _, where = struct.unpack_from("<4sLQ", tail, at - 20)
        file.seek(where)
        n_members, list_bytes, list_start = struct.unpack_from("<QQQ", file.read(56), 32)
    if list_bytes > MOST_DIRECTORY_BYTES:
        raise UnpicklingError("it has too many members")
    file.seek(list_start)
    listed, position, members = file.read(list_bytes), 0, {}
    for _ in range(n_members):
        mark, flags, method, packed, n_bytes = struct.unpack_from("<4s4xHH8xLL", listed, position)
        name_bytes, extra_bytes, comment_bytes, header = struct.unpack_from("<HHH8xL", listed, position + 28)
        if mark != b"PK\1\2":
            raise EOFError
        name = listed[position + 46 : position + 46 + name_bytes].decode("utf-8")
        position += 46 + name_bytes
        long = _long_numbers(listed[position : position + extra_bytes])
        n_bytes, packed, header = (next(long) if value == 0xFFFFFFFF else value for value in (n_bytes, packed, header))
        position += extra_bytes + comment_bytes
        members[name] = _Member(header, n_bytes, method == 0 and not flags & 1 and packed == n_bytes)
    return members


def _long_numbers(extra: bytes) -> Any:
    """The 64-bit numbers of the ZIP64 field, in order; they replace the 32-bit ones that have all bits set."""
    position = 0
    while position + 4 <= len(extra):
        kind, n_bytes = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            yield from (number for (number,) in struct.iter_unpack("<Q", extra[position + 4 : position + 4 + n_bytes]))
            return
        position += 4 + n_bytes


def _place(file: IO[bytes], member: _Member, size: int) -> tuple[int, int]:
    """The offset of a member's content, and its size in bytes."""
    if not member.is_stored:
        raise UnpicklingError("it has a compressed member, which could be of any size")
    file.seek(member.header)
    mark, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
    start = member.header + 30 + name_bytes + extra_bytes
    if mark != b"PK\3\4" or start + member.n_bytes > size:
        raise EOFError
    return start, member.n_bytes


def _content(file: IO[bytes], member: _Member, size: int) -> bytes:
    start, n_bytes = _place(file, member, size)
    if n_bytes > pickles.MOST_BYTES:
        raise UnpicklingError(f"it has a pickle of {n_bytes:,} bytes")
    file.seek(start)
    return file.read(n_bytes)
