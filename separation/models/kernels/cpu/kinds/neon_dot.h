// Armv8.2 with dot products of bytes, such as Graviton2 and Apple M1.
#pragma once

#include "../instructions.h"

namespace {

struct Kind {
    using Fp32 = VectorKernel<FloatInstructions, 6, 16 / LANES>;
    using Bf16 = void;
    using Int8 = VectorKernel<SignedByteInstructions, 6, 16 / LANES>;
    static bool usable() { return true; }
};

}  // namespace
