// Armv8.6 with products of small matrices, such as Graviton3 and Apple M2. A register holds two rows of four bfloat16
// values or of eight bytes; one instruction adds the four products of the rows in two registers to 2 x 2 sums.
#pragma once

#include "../instructions.h"

namespace {

typedef float FourFloats __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint64_t TwoRows __attribute__((vector_size(16)));

struct Bf16Matrices {
    using Row = bf16;
    using Weight = bf16;
    using Sum = float;
    using Sums = FourFloats;
    static constexpr long UNIT = 4;
    static void add(Sums& sums, TwoRows a, TwoRows b) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
        sums = (Sums)vbfmmlaq_f32((float32x4_t)sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
        bf16 left[8], right[8];
        std::memcpy(left, &a, sizeof a);
        std::memcpy(right, &b, sizeof b);
        for (int i = 0; i < 4; i++)
            for (int u = 0; u < UNIT; u++)
                sums[i] += widened(left[i / 2 * UNIT + u]) * widened(right[i % 2 * UNIT + u]);
#endif
    }
};

struct ByteMatrices {
    using Row = uint8_t;
    using Weight = int8_t;
    using Sum = int32_t;
    using Sums = FourInts;
    static constexpr long UNIT = 8;
    static constexpr int ZERO = 128, LIMIT = 127;
    static void add(Sums& sums, TwoRows a, TwoRows b) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        sums = (Sums)vusmmlaq_s32((int32x4_t)sums, (uint8x16_t)a, (int8x16_t)b);
#else
        uint8_t left[16];
        int8_t right[16];
        std::memcpy(left, &a, sizeof a);
        std::memcpy(right, &b, sizeof b);
        for (int i = 0; i < 4; i++)
            for (int u = 0; u < UNIT; u++) sums[i] += left[i / 2 * UNIT + u] * right[i % 2 * UNIT + u];
#endif
    }
};

// A kernel of eight rows and eight columns.
template <class Matrices>
struct MatrixKernel : Matrices {
    using typename Matrices::Row;
    using typename Matrices::Sum;
    using typename Matrices::Sums;
    using typename Matrices::Weight;
    using Session = NoSession;
    static constexpr long ROWS = 8, COLUMNS = 8, UNIT = Matrices::UNIT, DEPTH = UNIT;

    static void multiply(const Row* a, long stride, long rows, const Weight* weights, long depth, Sum* sums) {
        const auto compute = rows > 6   ? multiply_pairs<4>
                             : rows > 4 ? multiply_pairs<3>
                             : rows > 2 ? multiply_pairs<2>
                                        : multiply_pairs<1>;
        compute(a, stride, rows, weights, depth, sums);
    }

    static long operations(long rounds) {
        Sums start = {}, sums[4][4];
        TwoRows a[4] = {}, b[4] = {};
        hide(start);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) sums[r][c] = start += 1;  // different, since equal ones are computed once
        for (long round = 0; round < rounds; round++) {
            hide(a), hide(b);
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++)
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) Matrices::add(sums[p][c], a[p], b[c]);
        }
        Sums total = {};
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) total += sums[r][c];
        hide(total);
        return rounds * 16 * 4 * UNIT * 2;
    }

 private:
    static uint64_t eight_bytes(const void* from) {
        uint64_t bytes;
        std::memcpy(&bytes, from, sizeof bytes);
        return bytes;
    }

    // If the number of rows is odd, the last one is computed twice.
    template <int PAIRS>
    static __attribute__((noinline)) void multiply_pairs(const Row* a, long stride, long rows, const Weight* weights,
                                                         long depth, Sum* results) {
        Sums sums[PAIRS][4] = {};
        const Row* last = a + (rows - 1) * stride;
        for (long k = 0; k < depth; k += UNIT) {
            TwoRows b[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) b[c] = load<TwoRows>(weights + k * COLUMNS + c * 2 * UNIT);
#pragma GCC unroll 4
            for (int p = 0; p < PAIRS; p++) {
                const Row* even = a + 2 * p * stride;
                const TwoRows pair = {eight_bytes(even + k), eight_bytes(std::min(even + stride, last) + k)};
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) Matrices::add(sums[p][c], pair, b[c]);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; p++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                const TwoRows rows_of_two = (TwoRows)sums[p][c];
                for (int r = 0; r < 2; r++) {
                    const uint64_t two = rows_of_two[r];
                    std::memcpy(results + (2 * p + r) * COLUMNS + 2 * c, &two, sizeof two);
                }
            }
    }
};

struct Kind {
    using Fp32 = VectorKernel<FloatInstructions, 6, 16 / LANES>;
    using Bf16 = MatrixKernel<Bf16Matrices>;
    using Int8 = MatrixKernel<ByteMatrices>;
    static bool usable() { return true; }
};

}  // namespace
