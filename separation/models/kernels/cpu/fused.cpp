// The RoFormers' transformers, band splits and mask estimators for CPUs with AVX-512 BF16. See native.py.
//
// Matrix products take bfloat16 and accumulate in float32. Those of a transformer's linear layers can take bytes
// instead and accumulate in int32. Everything else is float32, and the intermediate results of a layer stay in the
// caches. Each row of an output is computed independently of the others, so neither the batch size nor the number of
// threads changes the result.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "demucs.h"

namespace {

using bf16 = uint16_t;

constexpr long PANEL = 32;   // output columns that are computed at once: two vectors
constexpr long ROWS = 12;    // rows that are computed at once: 12 x 2 accumulators use 24 of the 32 registers
constexpr long BLOCK = 96;   // rows whose operands stay in the L2 cache during a product
constexpr long GROUP = 512;  // rows that a thread processes at a time, if there are so many
constexpr float LOG2_E = 1.44269504f;

long padded(long columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

// Zeroed memory, aligned to cache lines. Padding that is never written stays zero.
template <class T>
class Buffer {
 public:
    explicit Buffer(long count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (!data_) throw std::bad_alloc();
        std::memset(data_, 0, bytes);
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    operator T*() const { return data_; }

 private:
    T* data_;
};

// Runs `work(next)` on `threads` threads. `next()` returns the index of the next item; work stops at `count`. Returns
// whether there was enough memory.
template <class Work>
bool parallel(long count, long threads, Work work) {
    std::atomic<long> taken{0};
    std::atomic<bool> enough{true};
    auto run = [&] {
        try {
            work([&] { return taken++; });
        } catch (const std::bad_alloc&) {
            enough = false;
        }
    };
    std::vector<std::thread> others;
    try {
        for (long t = 1; t < std::min(threads, count); t++) others.emplace_back(run);
    } catch (const std::exception&) {  // no memory for another thread
        enough = false;
    }
    run();
    for (auto& other : others) other.join();
    return enough;
}

// ---- vectors --------------------------------------------------------------------------------------------------------

__m512 all(float value) { return _mm512_set1_ps(value); }

__mmask16 columns_from(long column, long count) {  // selects those of 16 columns that are less than `count`
    return column + 16 <= count ? 0xFFFF : column >= count ? 0 : (1u << (count - column)) - 1;
}

// PANEL floats.
struct Values {
    __m512 low, high;
    static Values at(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }
    Values plus(Values other) const { return {_mm512_add_ps(low, other.low), _mm512_add_ps(high, other.high)}; }
    Values times(__m512 factor) const { return {_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor)}; }
    template <class Function>
    Values through(Function function) const {
        return {function(low), function(high)};
    }
    void store(float* to) const {
        _mm512_storeu_ps(to, low);
        _mm512_storeu_ps(to + 16, high);
    }
    void store_below(float* to, long column, long count) const {  // to to[column ...], but not beyond to[count - 1]
        _mm512_mask_storeu_ps(to + column, columns_from(column, count), low);
        _mm512_mask_storeu_ps(to + column + 16, columns_from(column + 16, count), high);
    }
    void store(bf16* to) const { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }
};

Values values_below(const float* from, long column, long count) {  // from[column ...]; from[count ...] counts as zero
    return {_mm512_maskz_loadu_ps(columns_from(column, count), from + column),
            _mm512_maskz_loadu_ps(columns_from(column + 16, count), from + column + 16)};
}

// 2 ** x with a relative error of 2e-6. Values below -126 count as -126.
__m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(all(-126.0f), x);  // keeps NaN: min and max return their second operand if either is NaN
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 p = all(1.33988e-3f);
    p = _mm512_fmadd_ps(p, rest, all(9.61813e-3f));
    p = _mm512_fmadd_ps(p, rest, all(5.550327e-2f));
    p = _mm512_fmadd_ps(p, rest, all(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, rest, all(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, rest, all(1.0f));
    return _mm512_scalef_ps(p, whole);
}

__m512 sigmoid(__m512 x) {
    return _mm512_div_ps(all(1.0f), _mm512_add_ps(all(1.0f), exp2_of(_mm512_mul_ps(x, all(-LOG2_E)))));
}

__m512 tanh_of(__m512 x) { return _mm512_fmsub_ps(all(2.0f), sigmoid(_mm512_add_ps(x, x)), all(1.0f)); }

// x times the normal distribution function, which is 1/2 plus an odd polynomial on [-4.5, 4.5]. The error is 1e-5 |x|.
__m512 gelu(__m512 x) {
    constexpr float c[] = {3.988837946e-01f, -6.633705688e-02f, 9.833185280e-03f, -1.122678607e-03f,
                           9.787138340e-05f, -6.365258343e-06f, 2.958900163e-07f, -9.193755619e-09f,
                           1.697305335e-10f, -1.400068910e-12f};
    const __m512 near = _mm512_max_ps(all(-4.5f), _mm512_min_ps(all(4.5f), x));
    const __m512 square = _mm512_mul_ps(near, near);
    __m512 p = all(c[9]);
    for (int i = 8; i >= 0; i--) p = _mm512_fmadd_ps(p, square, all(c[i]));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(near, p, all(0.5f)));
}

// ---- matrix products ------------------------------------------------------------------------------------------------

struct Bf16Weights {
    const bf16* packed;  // [panel][depth / 2][PANEL][2]
    Bf16Weights from(long column, long depth) const { return {packed + column * depth}; }
};

struct Bf16Rows {
    const bf16* values;
    long stride;
    Bf16Rows from(long row) const { return {values + row * stride, stride}; }
};

// The weights of column c are bytes times scales[c]. starts[c], -128 times the sum of the bytes, initialises the sums:
// it cancels the offset of 128 in the rows.
struct Int8Weights {
    const int8_t* packed;  // [panel][depth / 4][PANEL][4]
    const float* scales;
    const int32_t* starts;
    Int8Weights from(long column, long depth) const {
        return {packed + column * depth, scales + column, starts + column};
    }
};

// The values of row r are (bytes - 128) times scales[r], because the instruction multiplies unsigned by signed bytes.
struct Int8Rows {
    const uint8_t* values;
    long stride;
    const float* scales;
    Int8Rows from(long row) const { return {values + row * stride, stride, scales + row}; }
};

__m512i four_bytes(const void* from) {  // the same four bytes in each lane
    int32_t bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

// results[r] = row r of `a` [R, depth] times a panel of weights. Not inlined, because the accumulators would then
// compete with the caller's values for registers.
template <int R>
__attribute__((noinline)) void multiply(Bf16Rows a, Bf16Weights panel, long depth, float* results) {
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (long k = 0; k < depth; k += 2) {
        const __m512bh low = (__m512bh)_mm512_load_si512(panel.packed + k * PANEL);
        const __m512bh high = (__m512bh)_mm512_load_si512(panel.packed + k * PANEL + PANEL);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const __m512bh both = (__m512bh)four_bytes(a.values + r * a.stride + k);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, low);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, high);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        _mm512_store_ps(results + r * PANEL, sums[r][0]);
        _mm512_store_ps(results + r * PANEL + 16, sums[r][1]);
    }
}

// sum += the products of four unsigned and four signed bytes in each lane. This is assembly because with the intrinsic,
// g++ 12 keeps the sums of `multiply` in memory.
void add_products(__m512i& sum, __m512i bytes, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(weights));
}

template <int R>
__attribute__((noinline)) void multiply(Int8Rows a, Int8Weights panel, long depth, float* results) {
    __m512i sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        sums[r][0] = _mm512_loadu_si512(panel.starts);
        sums[r][1] = _mm512_loadu_si512(panel.starts + 16);
    }
    for (long k = 0; k < depth; k += 4) {
        const __m512i low = _mm512_load_si512(panel.packed + k * PANEL);
        const __m512i high = _mm512_load_si512(panel.packed + k * PANEL + 64);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const __m512i bytes = four_bytes(a.values + r * a.stride + k);
            add_products(sums[r][0], bytes, low);
            add_products(sums[r][1], bytes, high);
        }
    }
    const Values scales = Values::at(panel.scales);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
        Values{_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][0]), scales.low),
               _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][1]), scales.high)}
            .times(all(a.scales[r]))
            .store(results + r * PANEL);
}

template <class Rows, class Weights>
constexpr void (*MULTIPLY[ROWS + 1])(Rows, Weights, long, float*) = {
    nullptr,     multiply<1>, multiply<2>, multiply<3>,  multiply<4>,  multiply<5>, multiply<6>,
    multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>};

// a [rows, depth] times packed weights. Calls `take(row, column, values)` for each row and panel; `values` are the
// results from `column` on.
template <class Rows, class Weights, class Take>
void product(Rows a, long rows, Weights weights, long depth, long columns, Take take) {
    alignas(64) float results[ROWS * PANEL];
    for (long column = 0; column < columns; column += PANEL)
        for (long row = 0; row < rows; row += ROWS) {
            const long count = std::min(ROWS, rows - row);
            MULTIPLY<Rows, Weights>[count](a.from(row), weights.from(column, depth), depth, results);
            for (long r = 0; r < count; r++) take(row + r, column, Values::at(results + r * PANEL));
        }
}

void round_to_bf16(const float* x, long dim, __m512 factor, bf16* to) {
    for (long d = 0; d < dim; d += PANEL) values_below(x, d, dim).times(factor).store(to + d);
}

__m512 load_16(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

__m512 load_16(const bf16* from, __mmask16 mask) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
}

// Rounds x [dim] to bytes: zero becomes 128, the largest magnitude 128 - 127 or 128 + 127. Returns the value of one
// step, which is NaN if x contains NaN.
template <class Number>
float round_to_bytes(const Number* x, long dim, uint8_t* to) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i top = _mm512_setzero_si512();  // without signs, floats' bits are ordered by magnitude, and NaN comes last
    for (long d = 0; d < dim; d += 16)
        top = _mm512_max_epi32(top, _mm512_and_si512(magnitude, (__m512i)load_16(x + d, columns_from(d, dim))));
    const int32_t bits = _mm512_reduce_max_epi32(top);
    float highest;
    std::memcpy(&highest, &bits, sizeof highest);
    const __m512 factor = all(127.0f / std::max(highest, 1e-30f));
    for (long d = 0; d < dim; d += 16) {
        const __mmask16 mask = columns_from(d, dim);
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load_16(x + d, mask), factor));
        _mm512_mask_cvtepi32_storeu_epi8(to + d, mask, _mm512_add_epi32(whole, _mm512_set1_epi32(128)));
    }
    return highest / 127.0f;
}

// The factor that scales x [dim] to the length sqrt(dim).
__m512 norm_factor(const float* x, long dim) {
    __m512 squares = _mm512_setzero_ps();
    for (long d = 0; d < dim; d += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(columns_from(d, dim), x + d);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float length = std::sqrt(_mm512_reduce_add_ps(squares));
    return all(std::sqrt(static_cast<float>(dim)) / std::max(length, 1e-12f));
}

// Scales x [dim] to the length sqrt(dim), in bfloat16. The norm's gain is part of the weights that follow.
void normalise(const float* x, long dim, bf16* to) { round_to_bf16(x, dim, norm_factor(x, dim), to); }

// Scales x [dim] to the length sqrt(dim) and multiplies it by gains [dim], in place.
void normalise(float* x, long dim, const float* gains) {
    const __m512 norm = norm_factor(x, dim);
    for (long d = 0; d < dim; d += 16) {
        const __mmask16 mask = columns_from(d, dim);
        const __m512 gain = _mm512_mul_ps(norm, _mm512_maskz_loadu_ps(mask, gains + d));
        _mm512_mask_storeu_ps(x + d, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + d), gain));
    }
}

// The operands of a product: up to BLOCK rows of `dim` normalised values, or of up to `widest` rounded values.
class Bf16Block {
 public:
    using Weights = Bf16Weights;
    Bf16Block(long dim, long) : stride_(padded(dim)), values_(BLOCK * stride_) {}
    void normalise(long row, const float* x, long dim) { ::normalise(x, dim, values_ + row * stride_); }
    Bf16Rows rows() const { return {values_, stride_}; }
    Bf16Rows rounded(const bf16* from, long stride, long, long) const { return {from, stride}; }

 private:
    const long stride_;
    Buffer<bf16> values_;
};

class Int8Block {
 public:
    using Weights = Int8Weights;
    Int8Block(long, long widest) : stride_(padded(widest) + 64), values_(BLOCK * stride_), scales_(BLOCK) {}
    void normalise(long row, const float* x, long dim) {
        scales_[row] = _mm512_cvtss_f32(norm_factor(x, dim)) * round_to_bytes(x, dim, values_ + row * stride_);
    }
    Int8Rows rows() const { return {values_, stride_, scales_}; }
    Int8Rows rounded(const bf16* from, long stride, long rows, long dim) const {
        for (long row = 0; row < rows; row++)
            scales_[row] = round_to_bytes(from + row * stride, dim, values_ + row * stride_);
        return this->rows();
    }

 private:
    const long stride_;
    Buffer<uint8_t> values_;
    Buffer<float> scales_;
};

// ---- attention ------------------------------------------------------------------------------------------------------

// The attention of one head over `keys` rows of k and v, each of `size` values.
class Head {
 public:
    Head(long keys, long size)
        : keys_(keys),
          size_(size),
          width_(padded(keys)),
          packed_k_(width_ * size),
          packed_v_(width_ * size),
          scores_(ROWS * width_),
          weights_(ROWS * width_) {}

    // Packs k and v, whose rows are `stride` values apart, as weights of a product.
    void set_keys(const bf16* k, const bf16* v, long stride) {
        for (long t = 0; t < keys_; t++)  // k has keys_ columns and a depth of size_
            for (long d = 0; d < size_; d += 2)
                std::memcpy(packed_k_ + t / PANEL * PANEL * size_ + d * PANEL + t % PANEL * 2, k + t * stride + d, 4);
        for (long t = 0; t < keys_; t += 2)  // v has size_ columns and a depth of width_
            for (long d = 0; d < size_; d += 16) {
                const bf16* row = v + t * stride + d;
                const __m512i even = widened(row);
                const __m512i odd = t + 1 < keys_ ? widened(row + stride) : _mm512_setzero_si512();
                _mm512_store_si512(packed_v_ + d / PANEL * PANEL * width_ + t * PANEL + d % PANEL * 2,
                                   _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
    }

    // Computes the rows of out, each multiplied by its gate. The strides are the distances between rows and gates.
    void attend(const bf16* q, long stride, long queries, const float* gates, long gate_stride, bf16* out,
                long out_stride) {
        for (long start = 0; start < queries; start += ROWS) {
            const long rows = std::min(ROWS, queries - start);
            product(Bf16Rows{q + start * stride, stride}, rows, Bf16Weights{packed_k_}, size_, width_,
                    [&](long row, long column, Values sums) { sums.store(scores_ + row * width_ + column); });
            float factors[ROWS];
            for (long row = 0; row < rows; row++) factors[row] = gates[(start + row) * gate_stride] / exponentials(row);
            product(Bf16Rows{weights_, width_}, rows, Bf16Weights{packed_v_}, width_, size_,
                    [&](long row, long column, Values sums) {
                        sums.times(all(factors[row])).store(out + (start + row) * out_stride + column);
                    });
        }
    }

 private:
    static __m512i widened(const bf16* row) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)row)); }

    // Writes the exponentials of a row of scores to the weights and returns their sum, by which the softmax divides.
    float exponentials(long row) {
        float* scores = scores_ + row * width_;
        for (long t = keys_; t < width_; t++) scores[t] = -INFINITY;
        __m512 top = _mm512_load_ps(scores);
        for (long t = 16; t < width_; t += 16) top = _mm512_max_ps(top, _mm512_load_ps(scores + t));
        const float scale = LOG2_E / std::sqrt(static_cast<float>(size_));
        const __m512 factor = all(scale), offset = all(-scale * _mm512_reduce_max_ps(top));
        __m512 sum = _mm512_setzero_ps();
        for (long t = 0; t < width_; t += PANEL) {
            const Values weights = Values::at(scores + t).through([&](__m512 score) {
                return exp2_of(_mm512_fmadd_ps(score, factor, offset));
            });
            sum = _mm512_add_ps(sum, _mm512_add_ps(weights.low, weights.high));
            weights.store(weights_ + row * width_ + t);
        }
        return _mm512_reduce_add_ps(sum);
    }

    const long keys_, size_, width_;  // width_ is keys_, padded to whole panels
    Buffer<bf16> packed_k_, packed_v_;
    Buffer<float> scores_;
    Buffer<bf16> weights_;
};

// The packed weights include the gain of the norm before them. Biases are padded to whole panels. Only weights in bytes
// have scales and starts; for others these are null.
struct Linear {
    const void* packed;
    const float *bias, *scales;
    const int32_t* starts;
    operator Bf16Weights() const { return {static_cast<const bf16*>(packed)}; }
    operator Int8Weights() const { return {static_cast<const int8_t*>(packed), scales, starts}; }
};

struct Layer {
    long dim, heads, head_size, hidden;
    Linear qkv_gates, out, up, down;
    const float* norm_gains;  // of a norm after the layer; null if there is none
};

// A pre-norm transformer layer on x [sequences, tokens, dim], in place. Strides are in floats. cosines and sines
// [tokens, head_size] contain the angle of each pair twice; the first sine of a pair is negated.
template <class Block>
bool compute_layer(float* x, long sequences, long tokens, long sequence_stride, long token_stride, const Layer& layer,
              const float* cosines, const float* sines, long threads) {
    using Weights = typename Block::Weights;
    const long dim = layer.dim, heads = layer.heads, size = layer.head_size, inner = heads * size,
               hidden = layer.hidden;
    const long up_stride = hidden + PANEL;  // with a stride of 4 KiB, all rows would share one set of the L1 cache
    const long group = std::max(1L, std::min(GROUP / tokens, (sequences + threads - 1) / threads));
    const long most_rows = group * tokens;
    const auto add = [&](Values values, float* to, long column) {
        values.plus(values_below(to, column, dim)).store_below(to, column, dim);
    };

    return parallel((sequences + group - 1) / group, threads, [&](auto next) {
        Block operands(dim, std::max({dim, inner, hidden}));
        Buffer<bf16> q(most_rows * inner), k(most_rows * inner), v(most_rows * inner), attended(most_rows * inner);
        Buffer<bf16> up(BLOCK * up_stride);
        Buffer<float> gates(most_rows * PANEL);
        Head head(tokens, size);
        for (long first; (first = group * next()) < sequences;) {
            const long count = std::min(group, sequences - first), rows = count * tokens;
            const auto row_at = [&](long row) {
                return x + (first + row / tokens) * sequence_stride + row % tokens * token_stride;
            };
            for (long start = 0; start < rows; start += BLOCK) {
                const long block = std::min(BLOCK, rows - start);
                for (long row = 0; row < block; row++) operands.normalise(row, row_at(start + row), dim);
                product(
                    operands.rows(), block, Weights(layer.qkv_gates), dim, 3 * inner + PANEL,
                    [&](long row, long column, Values sums) {
                        row += start;
                        sums = sums.plus(Values::at(layer.qkv_gates.bias + column));
                        if (column >= 3 * inner) {
                            sums.through(sigmoid).store(gates + row * PANEL);
                        } else if (column >= 2 * inner) {
                            sums.store(v + row * inner + column - 2 * inner);
                        } else {
                            const long angle = row % tokens * size + column % size;
                            const Values cosine = Values::at(cosines + angle), sine = Values::at(sines + angle);
                            const auto rotated = [](__m512 value, __m512 cosine, __m512 sine) {
                                return _mm512_fmadd_ps(value, cosine,
                                                       _mm512_mul_ps(_mm512_permute_ps(value, 0xB1), sine));
                            };
                            Values{rotated(sums.low, cosine.low, sine.low), rotated(sums.high, cosine.high, sine.high)}
                                .store(column < inner ? q + row * inner + column : k + row * inner + column - inner);
                        }
                    });
            }
            for (long sequence = 0; sequence < count; sequence++)
                for (long h = 0; h < heads; h++) {
                    const long at = sequence * tokens * inner + h * size;
                    head.set_keys(k + at, v + at, inner);
                    head.attend(q + at, inner, tokens, gates + sequence * tokens * PANEL + h, PANEL, attended + at,
                                inner);
                }
            for (long start = 0; start < rows; start += BLOCK) {
                const long block = std::min(BLOCK, rows - start);
                product(operands.rounded(attended + start * inner, inner, block, inner), block, Weights(layer.out),
                        inner, dim, [&](long row, long column, Values sums) {
                            add(sums.plus(Values::at(layer.out.bias + column)), row_at(start + row), column);
                        });
                for (long row = 0; row < block; row++) operands.normalise(row, row_at(start + row), dim);
                product(operands.rows(), block, Weights(layer.up), dim, hidden,
                        [&](long row, long column, Values sums) {
                            const Values values = sums.plus(Values::at(layer.up.bias + column));
                            values.through(gelu).store(up + row * up_stride + column);
                        });
                product(operands.rounded(up, up_stride, block, hidden), block, Weights(layer.down), hidden, dim,
                        [&](long row, long column, Values sums) {
                            add(sums.plus(Values::at(layer.down.bias + column)), row_at(start + row), column);
                        });
                for (long row = 0; layer.norm_gains && row < block; row++)
                    normalise(row_at(start + row), dim, layer.norm_gains);
            }
        }
    });
}

}  // namespace

extern "C" {

// Whether the system lets this process use the instructions.
int usable() { return 1; }

// The functions below return 0, or 1 if memory ran out.

// The network of a band: a norm and `layers` linear layers, sizes[0] -> sizes[1] -> ...
struct BandNetwork {
    long layers;
    const long* sizes;
    const bf16* const* weights;
    const float* const* biases;
    long first;  // the index of the band's first value in a row of the spectrogram or the mask
};

// Packs weights [columns, depth], multiplied by gains [depth] unless null, to bfloat16 [panel][depth / 2][PANEL][2].
// The last panel is padded with zeros.
int pack(const float* weights, long columns, long depth, const float* gains, bf16* packed, long threads) {
    const long panels = (columns + PANEL - 1) / PANEL;
    return !parallel(panels, threads, [&](auto next) {
        Buffer<int32_t> pairs(16 * 8);  // the next 8 pairs of 16 columns
        alignas(64) int32_t eights[16];
        for (int i = 0; i < 16; i++) eights[i] = 8 * i;
        const __m512i down = _mm512_load_si512(eights);
        for (long panel; (panel = next()) < panels;)
            for (long half = 0; half < PANEL; half += 16)
                for (long k = 0; k < depth; k += 16) {
                    const __mmask16 mask = columns_from(k, depth);
                    const __m512 gain = gains ? _mm512_maskz_loadu_ps(mask, gains + k) : all(1.0f);
                    for (long c = 0; c < 16; c++) {
                        const long column = panel * PANEL + half + c;
                        const float* row = weights + std::min(column, columns - 1) * depth + k;
                        const __m512 values = _mm512_maskz_loadu_ps(column < columns ? mask : 0, row);
                        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(values, gain));
                        _mm256_store_si256((__m256i*)(pairs + c * 8), (__m256i)rounded);
                    }
                    for (long pair = 0; pair < 8 && k + 2 * pair < depth; pair++)
                        _mm512_store_si512(packed + panel * PANEL * depth + (k / 2 + pair) * 2 * PANEL + half * 2,
                                           _mm512_i32gather_epi32(down, pairs + pair, 4));
                }
    });
}

// See `compute_layer`. Weights with scales are in bytes.
int transformer_layer(float* x, long sequences, long tokens, long sequence_stride, long token_stride,
                       const Layer* layer, const float* cosines, const float* sines, long threads) {
    const auto compute = layer->up.scales ? compute_layer<Int8Block> : compute_layer<Bf16Block>;
    return !compute(x, sequences, tokens, sequence_stride, token_stride, *layer, cosines, sines, threads);
}

// Multi-head attention of q [batch, queries, heads * size] over k and v [batch, keys, heads * size]; out has the shape
// of q. The strides, in values, are between batch items and between rows: first those of q, then those of both k and v.
int attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, long batch, long queries, long keys, long heads,
               long size, const long* strides, long threads) {
    const long blocks = (queries + GROUP - 1) / GROUP, count = batch * heads * blocks;
    const float ungated = 1.0f;
    return !parallel(count, threads, [&](auto next) {
        Head head(keys, size);
        for (long item; (item = next()) < count;) {
            const long start = item % blocks * GROUP, h = item / blocks % heads * size, b = item / blocks / heads;
            head.set_keys(k + b * strides[2] + h, v + b * strides[2] + h, strides[3]);
            head.attend(q + b * strides[0] + start * strides[1] + h, strides[1], std::min(GROUP, queries - start),
                        &ungated, 0, out + (b * queries + start) * heads * size + h, heads * size);
        }
    });
}

// Applies the norm and linear layer of each band to x, rows of `stride` floats. Writes features [frames, bands, dim].
int split_bands(const float* x, long stride, long frames, long bands, const BandNetwork* networks, float* features,
                 long threads) {
    long widest = 0;
    for (long band = 0; band < bands; band++) widest = std::max(widest, padded(networks[band].sizes[0]));

    return !parallel(bands, threads, [&](auto next) {
        Buffer<bf16> normed(BLOCK * widest);
        for (long band; (band = next()) < bands;) {
            const BandNetwork& network = networks[band];
            const long width = network.sizes[0], dim = network.sizes[1];
            const float* biases = network.biases[0];
            for (long start = 0; start < frames; start += BLOCK) {
                const long block = std::min(BLOCK, frames - start);
                for (long row = 0; row < block; row++)
                    normalise(x + (start + row) * stride + network.first, width, normed + row * widest);
                product(Bf16Rows{normed, widest}, block, Bf16Weights{network.weights[0]}, width, dim,
                        [&](long row, long column, Values sums) {
                            float* to = features + ((start + row) * bands + band) * dim;
                            sums.plus(Values::at(biases + column)).store_below(to, column, dim);
                        });
            }
        }
    });
}

// Applies the network of each band to x [frames, bands, dim], with tanh between layers and a gated linear unit at the
// end. Writes masks, rows of `stride` floats. If `normed` is zero, the networks have no norm.
int estimate_masks(const float* x, long frames, long bands, const BandNetwork* networks, long normed, float* masks,
                    long stride, long threads) {
    long widest = 0;
    for (long band = 0; band < bands; band++)
        for (long layer = 0; layer <= networks[band].layers; layer++)
            widest = std::max(widest, padded(networks[band].sizes[layer]));
    const long row_stride = widest + PANEL, blocks = (frames + BLOCK - 1) / BLOCK;

    return !parallel(bands * blocks, threads, [&](auto next) {
        Buffer<bf16> even(BLOCK * row_stride), odd(BLOCK * row_stride);
        Buffer<float> last(BLOCK * row_stride);
        for (long item; (item = next()) < bands * blocks;) {
            const long band = item / blocks, start = item % blocks * BLOCK, block = std::min(BLOCK, frames - start);
            const BandNetwork& network = networks[band];
            const long dim = network.sizes[0], width = network.sizes[network.layers] / 2;
            for (long row = 0; row < block; row++) {
                const float* from = x + ((start + row) * bands + band) * dim;
                round_to_bf16(from, dim, normed ? norm_factor(from, dim) : all(1.0f), even + row * row_stride);
            }
            for (long layer = 0; layer < network.layers; layer++) {
                const bf16* from = layer % 2 ? odd : even;
                bf16* to = layer % 2 ? even : odd;
                const float* biases = network.biases[layer];
                const bool is_last = layer + 1 == network.layers;
                product(Bf16Rows{from, row_stride}, block, Bf16Weights{network.weights[layer]}, network.sizes[layer],
                        network.sizes[layer + 1], [&](long row, long column, Values sums) {
                            sums = sums.plus(Values::at(biases + column));
                            if (is_last)
                                sums.store(last + row * row_stride + column);
                            else
                                sums.through(tanh_of).store(to + row * row_stride + column);
                        });
            }
            for (long row = 0; row < block; row++)
                for (long column = 0; column < width; column += 16) {
                    const float* value = last + row * row_stride + column;
                    const __m512 gated = _mm512_mul_ps(_mm512_loadu_ps(value), sigmoid(_mm512_loadu_ps(value + width)));
                    _mm512_mask_storeu_ps(masks + (start + row) * stride + network.first + column,
                                          columns_from(column, width), gated);
                }
        }
    });
}
}
