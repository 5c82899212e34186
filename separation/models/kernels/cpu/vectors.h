// Vectors of floats as wide as the target's registers, and functions of them.
//
// They use the vector extensions of g++ and clang++, so that the same source serves every CPU. Intrinsics replace only
// what these compilers do not find by themselves.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

using bf16 = uint16_t;

#if defined(__AVX512F__)
constexpr long LANES = 16;
#elif defined(__AVX2__)
constexpr long LANES = 8;
#else
constexpr long LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr float LOG2_E = 1.44269504f;

inline Floats all(float value) { return value - Floats{}; }
inline Ints all(int32_t value) { return value - Ints{}; }

template <class Vector>
inline Vector load(const void* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline Floats at(const float* from) { return load<Floats>(from); }
inline Floats at(const bf16* from) { return (Floats)(__builtin_convertvector(load<Halves>(from), Bits) << 16); }

inline float widened(bf16 half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class Vector>
inline void store(Vector vector, void* to) {
    std::memcpy(to, &vector, sizeof vector);
}

// The first `count` values; the others are zero.
template <class Number>
inline Floats first(const Number* from, long count) {
    if (count >= LANES) return at(from);
    Number values[LANES] = {};
    if (count > 0) std::memcpy(values, from, count * sizeof(Number));
    return at(values);
}

// Rounds to the nearest even number.
inline Halves rounded_to_bf16(Floats x) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    const Bits bits = (Bits)x;
    const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40), Halves);
#endif
}

inline void store_as(Floats vector, float* to) { store(vector, to); }
inline void store_as(Floats vector, bf16* to) { store(rounded_to_bf16(vector), to); }

// Stores the first `count` values.
template <class Number>
inline void store_first(Floats vector, Number* to, long count) {
    if (count >= LANES) return store_as(vector, to);
    Number values[LANES];
    store_as(vector, values);
    if (count > 0) std::memcpy(to, values, count * sizeof(Number));
}

// The larger and the smaller one; `value` if that is NaN.
inline Floats at_least(float limit, Floats value) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)all(limit), (__m512)value);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)all(limit), (__m256)value);
#else
    return value < limit ? all(limit) : value;
#endif
}

inline Floats at_most(float limit, Floats value) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)all(limit), (__m512)value);
#elif defined(__AVX2__)
    return (Floats)_mm256_min_ps((__m256)all(limit), (__m256)value);
#else
    return value > limit ? all(limit) : value;
#endif
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float sum_of(Floats x) {
    float values[LANES];
    store(x, values);
    for (long width = LANES / 2; width; width /= 2)
        for (long i = 0; i < width; i++) values[i] += values[i + width];
    return values[0];
}

template <class Number, class Vector>
inline Number highest_of(Vector x) {
    Number values[LANES];
    store(x, values);
    for (long width = LANES / 2; width; width /= 2)
        for (long i = 0; i < width; i++) values[i] = std::max(values[i], values[i + width]);
    return values[0];
}

// The nearest whole number of values below 2 ** 22, as a float. Adding ROUNDS drops the fraction.
constexpr float ROUNDS = 12582912.0f;  // 1.5 * 2 ** 23
inline Floats whole_part(Floats x) { return (x + ROUNDS) - ROUNDS; }

// Exchanges the values of each pair.
inline Floats swapped(Floats x) { return (Floats)((Pairs)x << 32 | (Pairs)x >> 32); }

// 2 ** x with a relative error of 2e-7. Values beyond -limit and limit count as these.
inline Floats exp2_of(Floats x, float limit = 126.0f) {
    x = at_most(limit, at_least(-limit, x));
    const Floats whole = whole_part(x);
    const Floats rest = x - whole;
    Floats p = all(1.535336e-4f);
    p = p * rest + 1.339888e-3f;
    p = p * rest + 9.618437e-3f;
    p = p * rest + 5.550332e-2f;
    p = p * rest + 2.4022648e-1f;
    p = p * rest + 6.9314720e-1f;
    p = p * rest + 1.0f;
    return (Floats)((Ints)p + (__builtin_convertvector(whole, Ints) << 23));
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp2_of(x * -LOG2_E)); }

inline Floats tanh_of(Floats x) { return 2.0f * sigmoid(x + x) - 1.0f; }

// x times the normal distribution function. The latter has an error of 1e-5 for `bf16`, of 2e-7 for `float`.
template <class Number>
Floats gelu(Floats x);

// The function is 1/2 plus an odd polynomial on [-4.5, 4.5].
template <>
inline Floats gelu<bf16>(Floats x) {
    constexpr float c[] = {3.988837946e-01f, -6.633705688e-02f, 9.833185280e-03f, -1.122678607e-03f,
                           9.787138340e-05f, -6.365258343e-06f, 2.958900163e-07f, -9.193755619e-09f,
                           1.697305335e-10f, -1.400068910e-12f};
    const Floats near = at_least(-4.5f, at_most(4.5f, x));
    const Floats square = near * near;
    Floats p = all(c[9]);
    for (int i = 8; i >= 0; i--) p = p * square + c[i];
    return x * (near * p + 0.5f);
}

// Its error function: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
template <>
inline Floats gelu<float>(Floats x) {
    const Floats magnitude = (Floats)((Bits)x & 0x7FFFFFFF);
    const Floats t = 1.0f / (1.0f + 0.2316418882f * magnitude);  // 0.3275911 / sqrt(2)
    Floats p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Floats tail = 0.5f * p * t * exp2_of(x * x * (-0.5f * LOG2_E));  // beyond the magnitude
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

}  // namespace
