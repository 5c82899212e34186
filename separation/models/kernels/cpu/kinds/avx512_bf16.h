// x86-64 with AVX-512, VNNI and BF16, such as Zen 4 and Zen 5.
#pragma once

#include "../instructions.h"

namespace {

struct Kind {
    using Fp32 = VectorKernel<FloatInstructions, 12, 32 / LANES>;
    using Bf16 = VectorKernel<Bf16Instructions, 12, 32 / LANES>;
    using Int8 = VectorKernel<ByteInstructions, 12, 32 / LANES>;
    static bool usable() { return true; }
};

}  // namespace
