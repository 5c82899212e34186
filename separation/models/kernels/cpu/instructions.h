// Instructions that multiply and add, each with an emulation for CPUs that lack it. See VectorKernel.
#pragma once

#include "products.h"

namespace {

template <class Number>
inline Ints four_bytes(const Number* from) {  // the same four bytes in each lane
    int32_t bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return all(bytes);
}

// Two bfloat16 products a lane.
struct Bf16Instructions {
    using Row = bf16;
    using Weight = bf16;
    using Sum = float;
    using Sums = Floats;
    using Vector = Ints;
    static constexpr long UNIT = 2;
    static Vector broadcast(const Row* values) { return four_bytes(values); }
    static void add(Sums& sums, Vector a, Vector b) {
#if defined(__AVX512BF16__)
        sums = (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
        const Ints high = all(int32_t(0xFFFF0000));
        sums += (Floats)(a << 16) * (Floats)(b << 16) + (Floats)(a & high) * (Floats)(b & high);
#endif
    }
};

// Four products of unsigned and signed bytes a lane.
struct ByteInstructions {
    using Row = uint8_t;
    using Weight = int8_t;
    using Sum = int32_t;
    using Sums = Ints;
    using Vector = Ints;
    static constexpr long UNIT = 4;
    static constexpr int ZERO = 128, LIMIT = 127;
    static Vector broadcast(const Row* values) { return four_bytes(values); }
    static void add(Sums& sums, Vector a, Vector b) {
        // Assembly, because with the intrinsic g++ 12 keeps the sums of VectorKernel in memory.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
#elif defined(__AVXVNNI__)
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b));
#else
        for (int shift = 0; shift < 32; shift += 8) sums += (a >> shift & 255) * (b << (24 - shift) >> 24);
#endif
    }
};

// Four products of signed bytes a lane.
struct SignedByteInstructions {
    using Row = int8_t;
    using Weight = int8_t;
    using Sum = int32_t;
    using Sums = Ints;
    using Vector = Ints;
    static constexpr long UNIT = 4;
    static constexpr int ZERO = 0, LIMIT = 127;
    static Vector broadcast(const Row* values) { return four_bytes(values); }
    static void add(Sums& sums, Vector a, Vector b) {
#if defined(__ARM_FEATURE_DOTPROD)
        sums = (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)a, (int8x16_t)b);
#else
        for (int shift = 0; shift < 32; shift += 8) sums += (a << (24 - shift) >> 24) * (b << (24 - shift) >> 24);
#endif
    }
};

// Two products of signed 16-bit integers a lane. They hold ten bits, so that sums of a depth of 8192 cannot overflow.
struct ShortInstructions {
    using Row = int16_t;
    using Weight = int16_t;
    using Sum = int32_t;
    using Sums = Ints;
    using Vector = Ints;
    static constexpr long UNIT = 2;
    static constexpr int ZERO = 0, LIMIT = 511;
    static Vector broadcast(const Row* values) { return four_bytes(values); }
    static void add(Sums& sums, Vector a, Vector b) {
#if defined(__AVX512BW__)
        sums += (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
        sums += (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
        sums += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
    }
};

}  // namespace
