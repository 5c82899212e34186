// x86-64 with AVX2, FMA and AVX-VNNI, such as laptops since Alder Lake.
#pragma once

#include "../instructions.h"

namespace {

struct Kind {
    using Fp32 = VectorKernel<FloatInstructions, 6, 16 / LANES>;
    using Bf16 = void;
    using Int8 = VectorKernel<ByteInstructions, 6, 16 / LANES>;
    static bool usable() { return true; }
};

}  // namespace
