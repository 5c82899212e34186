"""The kernels for Arm on an emulated CPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from separation.cpu import Kind
from separation.models.kernels.native import CODES, PANEL
from separation.models.layers import Transformer

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
_MISSING = [program for program in (COMPILER, EMULATOR) if not shutil.which(program)]

needs_arm = pytest.mark.skipif(bool(_MISSING), reason=f"needs {' and '.join(_MISSING)}")


class ArmKernels:
    """The library of a kind for Arm, compiled as for a wheel, and a program that calls it."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        library = folder / f"lib{kind.name}.so"
        self._program = folder / "call_kernels"
        source = Path(__file__).with_name("call_kernels.cpp")
        subprocess.run(kind.command([COMPILER], library), check=True)
        subprocess.run(
            [
                COMPILER,
                "-std=gnu++17",
                "-Wall",
                "-Werror",
                source,
                library,
                f"-Wl,-rpath,{folder}",
                "-o",
                self._program,
            ],
            check=True,
        )

    def _call(self, name: str, *sizes: int, given: bytes = b"") -> bytes:
        emulator = [EMULATOR, "-cpu", "max", "-L", "/usr/aarch64-linux-gnu"]
        ran = subprocess.run(
            [*emulator, self._program, name, *map(str, sizes)], input=given, capture_output=True, check=False
        )
        assert ran.returncode == 0, ran.stderr.decode()
        return ran.stdout

    def integer_limit(self) -> int:
        return int(self._call("limit"))

    def transformer(self, transformer: Transformer, x: Tensor, precision: torch.dtype) -> Tensor:
        """The output of a transformer with one layer and without a norm at its end. `x` is `[B, N, D]`."""
        ((attention, feed_forward),) = transformer.layers
        norm, up, _, _, down = feed_forward.net
        heads, dim = attention.to_gates.weight.shape
        head_size = attention.to_out[0].weight.shape[1] // heads
        angles = torch.outer(torch.arange(float(x.shape[1])), attention.rotary_embed.freqs).repeat_interleave(2, -1)
        signs = torch.tensor([-1.0, 1.0]).repeat(head_size // 2)
        biases = [torch.cat([attention.to_qkv.bias, attention.to_gates.bias])]
        biases += [attention.to_out[0].bias, up.bias, down.bias]
        qkv_gates, *others = [pad(bias, (0, -len(bias) % PANEL)) for bias in biases]
        arrays = [attention.norm.gamma, attention.to_qkv.weight, attention.to_gates.weight, qkv_gates]
        arrays += [attention.to_out[0].weight, others[0]]
        arrays += [norm.gamma, up.weight, others[1]]
        arrays += [down.weight, others[2]]
        arrays += [angles.cos(), angles.sin() * signs, x]
        sizes = CODES[precision], dim, heads, head_size, len(up.weight), *x.shape[:2]
        written = self._call("layer", *sizes, given=b"".join(map(_bytes, arrays)))
        return torch.frombuffer(bytearray(written), dtype=torch.float32).reshape(x.shape)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the backends in attention.py: `[B, heads, tokens, dim_head]`."""
        batch, heads, queries, size = q.shape
        given = b"".join(_bytes(each.transpose(1, 2)) for each in (q, k, v))
        written = self._call("attention", CODES[q.dtype], batch, queries, k.shape[2], heads, size, given=given)
        return torch.frombuffer(bytearray(written), dtype=q.dtype).reshape(batch, queries, heads, size).transpose(1, 2)


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes()
