// x86-64 with AVX2 and FMA: 16 registers of 8 floats. Integers have 16 bits, since no instruction sums bytes exactly.
#pragma once

#include "../instructions.h"

namespace {

struct Kind {
    using Fp32 = VectorKernel<FloatInstructions, 6, 16 / LANES>;
    using Bf16 = void;
    using Int8 = VectorKernel<ShortInstructions, 6, 16 / LANES>;
    static bool usable() { return true; }
};

}  // namespace
