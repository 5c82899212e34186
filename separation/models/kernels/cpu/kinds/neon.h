// Armv8 with NEON: 32 registers of 4 floats.
#pragma once

#include "../instructions.h"

namespace {

struct Kind {
    using Fp32 = VectorKernel<FloatInstructions, 6, 16 / LANES>;
    using Bf16 = void;
    using Int8 = void;
    static bool usable() { return true; }
};

}  // namespace
