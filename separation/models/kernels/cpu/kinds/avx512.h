// x86-64 with AVX-512 but without VNNI, such as Skylake servers: 32 registers of 16 floats.
#pragma once

#include "../instructions.h"

namespace {

struct Kind {
    using Fp32 = VectorKernel<FloatInstructions, 12, 32 / LANES>;
    using Bf16 = void;
    using Int8 = VectorKernel<ShortInstructions, 12, 32 / LANES>;
    static bool usable() { return true; }
};

}  // namespace
