// x86-64 with AVX-512 and VNNI, such as Cascade Lake and Ice Lake servers.
#pragma once

#include "../instructions.h"

namespace {

struct Kind {
    using Fp32 = VectorKernel<FloatInstructions, 12, 32 / LANES>;
    using Bf16 = void;
    using Int8 = VectorKernel<ByteInstructions, 12, 32 / LANES>;
    static bool usable() { return true; }
};

}  // namespace
