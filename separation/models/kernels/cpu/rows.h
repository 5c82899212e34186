// Norms and the rounding of rows, and the rows that are operands of a product.
#pragma once

#include "products.h"

namespace {

// The factor that scales x [dim] to the length sqrt(dim).
inline float norm_factor(const float* x, long dim) {
    Floats squares = {};
    for (long d = 0; d < dim; d += LANES) {
        const Floats v = first(x + d, dim - d);
        squares += v * v;
    }
    return std::sqrt(static_cast<float>(dim)) / std::max(std::sqrt(sum_of(squares)), 1e-12f);
}

// Scales x [dim] to the length sqrt(dim) and multiplies it by gains [dim], in place.
inline void normalise(float* x, long dim, const float* gains) {
    const float factor = norm_factor(x, dim);
    for (long d = 0; d < dim; d += LANES)
        store_first(first(x + d, dim - d) * factor * first(gains + d, dim - d), x + d, dim - d);
}

// Writes x [dim] times a factor, and zeros up to whole panels.
template <class Number>
void round_row(const float* x, long dim, float factor, Number* to) {
    for (long d = 0; d < multiple_of(PANEL, dim); d += LANES) store_as(first(x + d, dim - d) * factor, to + d);
}

// Rounds x [dim] to the kernel's integers: zero becomes ZERO, the largest magnitude ZERO - LIMIT or ZERO + LIMIT.
// Returns the value of one step, which is NaN if x contains NaN.
template <class Kernel, class Number>
float round_to_integers(const Number* x, long dim, typename Kernel::Row* to) {
    typedef typename Kernel::Row Integers __attribute__((vector_size(LANES * sizeof(typename Kernel::Row))));
    Ints top = {};  // without signs, floats' bits are ordered by magnitude, and NaN comes last
    for (long d = 0; d < dim; d += LANES) {
        const Ints bits = (Ints)first(x + d, dim - d) & 0x7FFFFFFF;
        top = bits > top ? bits : top;
    }
    const int32_t bits = highest_of<int32_t>(top);
    float highest;
    std::memcpy(&highest, &bits, sizeof highest);
    const float factor = float(Kernel::LIMIT) / std::max(highest, 1e-30f);
    for (long d = 0; d < dim; d += LANES) {
        const Ints whole = (Ints)(first(x + d, dim - d) * factor + ROUNDS) - (int32_t)0x4B400000;  // ROUNDS' own bits
        store(__builtin_convertvector(whole + Kernel::ZERO, Integers), to + d);
    }
    return highest / float(Kernel::LIMIT);
}

constexpr long BLOCK = 96;  // rows whose operands stay in the L2 cache during a product

// The operands of a product: up to BLOCK rows of `dim` normalised values, or of up to `widest` rounded values.
template <class Kernel, bool IS_SCALED>
class Block;

// Operands of a floating-point kernel.
template <class Kernel>
class Block<Kernel, false> {
 public:
    using W = Weights<Kernel>;
    Block(long dim, long) : stride_(multiple_of(64, dim)), values_(BLOCK * stride_) {}
    void normalise(long row, const float* x, long dim) {
        round_row(x, dim, norm_factor(x, dim), values_ + row * stride_);
    }
    Rows<Kernel> rows() const { return {values_, stride_}; }
    Rows<Kernel> rounded(const typename Kernel::Row* from, long stride, long, long) const { return {from, stride}; }

 private:
    const long stride_;
    Buffer<typename Kernel::Row> values_;
};

// Operands of an integer kernel.
template <class Kernel>
class Block<Kernel, true> {
 public:
    using W = ScaledWeights<Kernel>;
    Block(long, long widest) : stride_(multiple_of(64, widest) + 64), values_(BLOCK * stride_), scales_(BLOCK) {}
    void normalise(long row, const float* x, long dim) {
        scales_[row] = norm_factor(x, dim) * round_to_integers<Kernel>(x, dim, values_ + row * stride_);
    }
    ScaledRows<Kernel> rows() const { return {values_, stride_, scales_}; }
    template <class Number>
    ScaledRows<Kernel> rounded(const Number* from, long stride, long rows, long dim) const {
        for (long row = 0; row < rows; row++)
            scales_[row] = round_to_integers<Kernel>(from + row * stride, dim, values_ + row * stride_);
        return this->rows();
    }

 private:
    const long stride_;
    Buffer<typename Kernel::Row> values_;
    Buffer<float> scales_;
};

}  // namespace
