// The operations of demucs_ops.py for CPUs. Their definitions are there, and so are the names of the axes.
//
// Values are float32 or bfloat16; everything is computed in float32. The code uses GCC's vector types, so it compiles
// for any CPU. Statistics over many tokens are merged in the order of fixed blocks, so neither the batch size nor the
// number of threads changes a result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "vectors.h"

namespace demucs {
namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int SUMS = 12;  // vectors of sums in a product, of 16 registers
#else
constexpr int SUMS = 24;  // of 32
#endif
constexpr long TOKENS = 48;       // of a block: a multiple of the rows of each product
constexpr long VALUES = 1 << 14;  // that a thread takes at a time
constexpr float EPS = 1e-5f;

// Calls `work(item, thread)` for each of `count` items on `threads` threads. Throws std::bad_alloc if one of them does.
template <class Work>
void each_item(long count, long threads, Work work) {
    std::atomic<long> started{0};
    const Outcome outcome = parallel(count, threads, [&](auto next) {
        const long thread = started++;
        for (long item; (item = next()) < count;) work(item, thread);
    });
    if (outcome == OUT_OF_MEMORY) throw std::bad_alloc();
}

// Calls `work(first, stop)` for ranges of rows of `size` values.
template <class Work>
void parallel_rows(long rows, long size, long threads, Work work) {
    const long step = std::max(1L, VALUES / std::max(1L, size));
    each_item((rows + step - 1) / step, threads,
              [&](long item, long) { work(item * step, std::min(rows, (item + 1) * step)); });
}

// ---- vectors --------------------------------------------------------------------------------------------------------

template <class Number>
Floats load(const Number* from) {
    return at(from);
}

template <class Number>
Floats load(const Number* from, long count) {
    return first(from, count);
}

template <class Number>
void store(Number* to, Floats v) {
    store_as(v, to);
}

template <class Number>
void store(Number* to, Floats v, long count) {
    store_first(v, to, count);
}

// The value after a store and a load.
template <class Number>
Floats as(Floats v) {
    if constexpr (std::is_same_v<Number, float>) return v;
    return (Floats)(__builtin_convertvector(rounded_to_bf16(v), Bits) << 16);
}

Floats first_lanes(Floats v, long count) {  // the others become zero
    if (count >= LANES) return v;
    for (long i = std::max(0L, count); i < LANES; i++) v[i] = 0;
    return v;
}

float number_of(float value) { return value; }

float number_of(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// ---- statistics -----------------------------------------------------------------------------------------------------

struct Moments {
    double count = 0, mean = 0, squares = 0;  // `squares` is the sum of the squared distances from the mean

    void merge(const Moments& other) {
        const double sum = count + other.count, distance = other.mean - mean;
        mean += distance * other.count / sum;
        squares += other.squares + distance * distance * count * other.count / sum;
        count = sum;
    }
    float factor() const { return static_cast<float>(1 / std::sqrt(squares / count + EPS)); }
};

// Of `rows` rows of `columns` values, `stride` apart.
Moments moments_of(const float* x, long rows, long columns, long stride) {
    Floats sums{};
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < columns; c += LANES) sums += load(x + r * stride + c, columns - c);
    const float mean = sum_of(sums) / static_cast<float>(rows * columns);
    Floats squares{};
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < columns; c += LANES) {
            const Floats distance = first_lanes(load(x + r * stride + c, columns - c) - mean, columns - c);
            squares += distance * distance;
        }
    return {static_cast<double>(rows * columns), mean, sum_of(squares)};
}

Moments merged(const Moments* blocks, long count) {
    Moments whole = blocks[0];
    for (long i = 1; i < count; i++) whole.merge(blocks[i]);
    return whole;
}

// ---- products -------------------------------------------------------------------------------------------------------

// A matrix [depth, columns], split into panels of `vectors` vectors: [panel][depth][vectors * LANES].
struct Panels {
    long depth, columns, vectors, width;
    std::vector<float> values;

    template <class Number>
    Panels(const Number* matrix, long depth, long columns, long stride)
        : depth(depth), columns(columns), vectors(std::min(3L, (columns + LANES - 1) / LANES)) {
        const long panel = vectors * LANES;
        width = (columns + panel - 1) / panel * panel;
        values.resize(depth * width);
        for (long k = 0; k < depth; k++)
            for (long c = 0; c < columns; c++)
                values[(c / panel * depth + k) * panel + c % panel] = number_of(matrix[k * stride + c]);
    }
};

// Rows of `depth` values at `taps` places, `tap` apart.
struct Rows {
    const float* values;
    long stride, taps, tap;
};

template <int VECTORS>
__attribute__((noinline)) void multiply(Rows a, const float* panel, long depth, float* results, long width) {
    constexpr int COUNT = SUMS / VECTORS;
    Floats sums[COUNT][VECTORS];
#pragma GCC unroll 24
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sums[r][v] = Floats{};
    for (long tap = 0; tap < a.taps; tap++) {
        const float* from = a.values + tap * a.tap;
        for (long k = 0; k < depth; k++, panel += VECTORS * LANES) {
            Floats weights[VECTORS];
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) weights[v] = load(panel + v * LANES);
#pragma GCC unroll 24
            for (int r = 0; r < COUNT; r++) {
                const Floats value = all(from[r * a.stride + k]);
#pragma GCC unroll 3
                for (int v = 0; v < VECTORS; v++) sums[r][v] += value * weights[v];
            }
        }
    }
#pragma GCC unroll 24
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) store(results + r * width + v * LANES, sums[r][v]);
}

// TOKENS rows times a matrix, to [TOKENS, weights.width].
void product(Rows a, const Panels& weights, float* results) {
    const long rows = SUMS / weights.vectors, panel = weights.vectors * LANES;
    auto* kernel = weights.vectors == 1 ? multiply<1> : weights.vectors == 2 ? multiply<2> : multiply<3>;
    for (long column = 0; column < weights.width; column += panel)
        for (long row = 0; row < TOKENS; row += rows)
            kernel({a.values + row * a.stride, a.stride, a.taps, a.tap}, weights.values.data() + column * weights.depth,
                   weights.depth / a.taps, results + row * weights.width + column, weights.width);
}

// ---- gated convolutions ---------------------------------------------------------------------------------------------

// A convolution of 1 or 3 taps along L and along N, then a bias and a GLU. Three taps are computed by Winograd's
// minimal filtering: two outputs from four products instead of six (arXiv:1509.09308). So a tile has one output or two
// along each axis, and 1, 4 or 16 products of a transformed input and transformed weights.
struct Gated {
    long batch, lines, positions, channels, taps[2];  // along L and N
    const float *weights, *bias, *table;              // `table` [L, C] may be null

    long outputs(int axis) const { return taps[axis] == 3 ? 2 : 1; }
    long inputs(int axis) const { return taps[axis] == 3 ? 4 : 1; }
    long products() const { return inputs(0) * inputs(1); }
};

// The vectors of a panel that need the least padding.
long panel_vectors(long channels) {
    long best = 1;
    for (long vectors = 2; vectors <= 3; vectors++) {
        const auto width = [&](long count) { return (channels + count * LANES - 1) / (count * LANES) * count; };
        if (width(vectors) <= width(best)) best = vectors;
    }
    return best;
}

long padded_channels(long channels) {
    const long panel = panel_vectors(channels) * LANES;
    return (channels + panel - 1) / panel * panel;
}

// Transformed weights [products, C, 2 C] to [panel][product][2][C][panel width]: a panel's values, then its gates.
void pack_gated(const float* weights, long products, long channels, float* packed) {
    const long panel = panel_vectors(channels) * LANES, width = padded_channels(channels);
    for (long first = 0; first < width; first += panel)
        for (long product = 0; product < products; product++)
            for (long half = 0; half < 2; half++)
                for (long k = 0; k < channels; k++)
                    for (long c = first; c < first + panel; c++)
                        *packed++ = c < channels ? weights[((product * channels + k) * 2 + half) * channels + c] : 0.0f;
}

// Four neighbours' contributions to two outputs, `step` apart.
void transform_input(Floats* d, long step) {
    const Floats first = d[0] - d[2 * step], second = d[step] + d[2 * step];
    const Floats third = d[2 * step] - d[step], fourth = d[step] - d[3 * step];
    d[0] = first, d[step] = second, d[2 * step] = third, d[3 * step] = fourth;
}

void transform_output(Floats* m, long step) {
    const Floats first = m[0] + m[step] + m[2 * step], second = m[step] - m[2 * step] - m[3 * step];
    m[0] = first, m[step] = second;
}

// Some tiles of a line of tiles.
template <long LINES, long COLUMNS>  // inputs of a tile
class Tiles {
 public:
    static constexpr long PRODUCTS = LINES * COLUMNS;
    Tiles(const Gated& s, long most, float* scratch)
        : s_(s),
          vectors_(panel_vectors(s.channels)),
          values_(scratch),
          results_(scratch + PRODUCTS * most * s.channels),
          most_(most) {}

    void compute(const float* x, long line, long first, long count, float* out) const {
        transform(x, line, first, count);
        const long panel = vectors_ * LANES, rows = SUMS / vectors_, channels = s_.channels;
        auto* kernel = vectors_ == 1 ? multiply<1> : vectors_ == 2 ? multiply<2> : multiply<3>;
        const float* weights = s_.weights;
        for (long column = 0; column < channels; column += panel) {
            for (long product = 0; product < PRODUCTS; product++)
                for (long half = 0; half < 2; half++, weights += channels * panel)
                    for (long row = 0; row < count; row += rows)
                        kernel({values_ + (product * most_ + row) * channels, channels, 1, 0}, weights, channels,
                               results_ + ((product * most_ + row) * 2 + half) * panel, 2 * panel);
            finish(line, first, count, column, out);
        }
    }

 private:
    void transform(const float* x, long line, long first, long count) const {
        const long channels = s_.channels;
        for (long tile = 0; tile < count; tile++)
            for (long c = 0; c < channels; c += LANES) {
                Floats d[PRODUCTS];
                for (long i = 0; i < LINES; i++)
                    for (long j = 0; j < COLUMNS; j++) {
                        const long l = LINES == 4 ? 2 * line + i - 1 : line;
                        const long n = COLUMNS == 4 ? 2 * (first + tile) + j - 1 : first + tile;
                        const bool inside = l >= 0 && l < s_.lines && n >= 0 && n < s_.positions;
                        d[i * COLUMNS + j] =
                            inside ? load(x + (l * s_.positions + n) * channels + c, channels - c) : Floats{};
                    }
                if constexpr (COLUMNS == 4)
                    for (long i = 0; i < LINES; i++) transform_input(d + i * COLUMNS, 1);
                if constexpr (LINES == 4)
                    for (long j = 0; j < COLUMNS; j++) transform_input(d + j, COLUMNS);
                for (long product = 0; product < PRODUCTS; product++)
                    store(values_ + (product * most_ + tile) * channels + c, d[product], channels - c);
            }
    }

    void finish(long line, long first, long count, long column, float* out) const {
        const long panel = vectors_ * LANES, channels = s_.channels;
        for (long tile = 0; tile < count; tile++)
            for (long c = column; c < std::min(channels, column + panel); c += LANES) {
                Floats m[2][PRODUCTS];
                const long left = channels - c;
                for (long half = 0; half < 2; half++) {
                    for (long product = 0; product < PRODUCTS; product++)
                        m[half][product] = load(results_ + ((product * most_ + tile) * 2 + half) * panel + c - column);
                    if constexpr (LINES == 4)
                        for (long j = 0; j < COLUMNS; j++) transform_output(m[half] + j, COLUMNS);
                    if constexpr (COLUMNS == 4)
                        for (long i = 0; i < LINES / 2 + LINES % 2; i++) transform_output(m[half] + i * COLUMNS, 1);
                }
                const Floats bias = load(s_.bias + c, left), gate_bias = load(s_.bias + channels + c, left);
                for (long i = 0; i < (LINES + 1) / 2; i++)
                    for (long j = 0; j < (COLUMNS + 1) / 2; j++) {
                        const long l = line * s_.outputs(0) + i, n = (first + tile) * s_.outputs(1) + j;
                        if (l >= s_.lines || n >= s_.positions) continue;
                        Floats y = (m[0][i * COLUMNS + j] + bias) * sigmoid(m[1][i * COLUMNS + j] + gate_bias);
                        if (s_.table) y += load(s_.table + l * channels + c, left);
                        store(out + (l * s_.positions + n) * channels + c, y, left);
                    }
            }
    }

    const Gated& s_;
    const long vectors_;
    float *values_, *results_;
    const long most_;
};

constexpr long MOST_TILES = 64;        // that are computed at a time
constexpr long INPUT_VALUES = 200000;  // of them: they and the results stay in the L2 cache

template <long LINES, long COLUMNS>
void convolve_gated(const Gated& s, const float* x, float* out, long threads) {
    const long vectors = panel_vectors(s.channels), rows = SUMS / vectors;
    const long lines = (s.lines + s.outputs(0) - 1) / s.outputs(0);
    const long tiles = (s.positions + s.outputs(1) - 1) / s.outputs(1);
    const long fitting = std::max(1L, std::min(MOST_TILES, INPUT_VALUES / (s.products() * s.channels)));
    const long runs = (tiles + fitting - 1) / fitting;
    const long most = ((tiles + runs - 1) / runs + rows - 1) / rows * rows;  // all runs have about the same length
    const long parts = (tiles + most - 1) / most;
    const long space = s.products() * most * (s.channels + 2 * vectors * LANES);
    std::vector<float> scratch(threads * space);
    each_item(s.batch * lines * parts, threads, [&](long item, long thread) {
        const long first = item % parts * most, line = item / parts % lines, image = item / parts / lines;
        const long size = s.lines * s.positions * s.channels;
        const Tiles<LINES, COLUMNS> some(s, most, scratch.data() + thread * space);
        some.compute(x + image * size, line, first, std::min(most, tiles - first), out + image * size);
    });
}

// ---- DConv ----------------------------------------------------------------------------------------------------------

// One residual branch on rows of `tokens` tokens. Three passes over the blocks of a row, each of TOKENS tokens; a norm
// needs the whole row. The last pass computes the second product again, since its result is the largest tensor.
template <class Number>
class Branch {
 public:
    Branch(long tokens, long channels, long hidden, long dilation, const void* const* weights, long stored)
        : blocks((tokens + TOKENS - 1) / TOKENS),
          tokens_(tokens),
          channels_(channels),
          hidden_(hidden),
          dilation_(dilation),
          in_(static_cast<const Number*>(weights[0]), 3 * channels, hidden, stored),
          out_(static_cast<const Number*>(weights[2]), hidden, 2 * channels, 2 * channels),
          in_table_(padded_table(static_cast<const float*>(weights[1]), hidden, stored, in_.width)),
          out_table_(padded_table(static_cast<const float*>(weights[3]), 2 * channels, 2 * channels, out_.width)) {}

    const long blocks;
    long hidden_values() const { return blocks * TOKENS * in_.width; }  // of a row
    long scratch_values() const { return (TOKENS + 2 * dilation_) * channels_ + TOKENS * out_.width + 2 * out_.width; }

    // The first product, to `hidden` [blocks * TOKENS, in_.width].
    Moments convolve(const Number* x, long block, float* hidden, float* scratch) const {
        const long start = block * TOKENS, count = std::min(TOKENS, tokens_ - start);
        for (long t = -dilation_; t < TOKENS + dilation_; t++) {
            float* to = scratch + (t + dilation_) * channels_;
            const long token = start + t;
            const bool inside = token >= 0 && token < tokens_;
            if (!inside) std::memset(to, 0, channels_ * sizeof(float));
            for (long c = 0; inside && c < channels_; c += LANES)
                store(to + c, load(x + token * channels_ + c, channels_ - c), channels_ - c);
        }
        hidden += start * in_.width;
        product({scratch, channels_, 3, dilation_ * channels_}, in_, hidden);
        for (long t = 0; t < count; t++)
            for (long c = 0; c < in_.width; c += LANES) {
                float* at = hidden + t * in_.width + c;
                store(at, as<Number>(load(at) + load(in_table_.data() + c)));
            }
        return moments_of(hidden, count, hidden_, in_.width);
    }

    // The first norm and GELU, in place, and the statistics of the second product.
    Moments activate(long block, const Moments& norm, float* hidden, float* scratch) const {
        const long start = block * TOKENS, count = std::min(TOKENS, tokens_ - start);
        const float mean = static_cast<float>(norm.mean), factor = norm.factor();
        const float *gain = in_table_.data() + in_.width, *shift = gain + in_.width;
        hidden += start * in_.width;
        for (long t = 0; t < count; t++)
            for (long c = 0; c < in_.width; c += LANES) {
                float* at = hidden + t * in_.width + c;
                store(at, as<Number>(gelu<float>((load(at) - mean) * factor * load(gain + c) + load(shift + c))));
            }
        product({hidden, in_.width, 1, 0}, out_, scratch);
        for (long t = 0; t < count; t++)
            for (long c = 0; c < out_.width; c += LANES) {
                float* at = scratch + t * out_.width + c;
                store(at, load(at) + load(out_table_.data() + c));
            }
        return moments_of(scratch, count, 2 * channels_, out_.width);
    }

    // The second product, its norm and the GLU, added to x.
    void add(Number* x, long block, const Moments& norm, const float* hidden, float* scratch) const {
        const long start = block * TOKENS, count = std::min(TOKENS, tokens_ - start), width = out_.width;
        const float mean = static_cast<float>(norm.mean), factor = norm.factor();
        float *gain = scratch + TOKENS * width, *shift = gain + width;
        for (long c = 0; c < width; c += LANES) {
            const Floats scale = load(out_table_.data() + width + c) * factor;
            store(gain + c, scale);
            store(shift + c, (load(out_table_.data() + c) - mean) * scale + load(out_table_.data() + 2 * width + c));
        }
        product({hidden + start * in_.width, in_.width, 1, 0}, out_, scratch);
        for (long t = 0; t < count; t++) {
            const float* z = scratch + t * width;
            Number* at = x + (start + t) * channels_;
            for (long c = 0; c < channels_; c += LANES) {
                const long left = channels_ - c, gate = channels_ + c;
                const Floats values = load(z + c, left) * load(gain + c, left) + load(shift + c, left);
                const Floats gates = load(z + gate, left) * load(gain + gate, left) + load(shift + gate, left);
                store(at + c, load(at + c, left) + values * sigmoid(gates), left);
            }
        }
    }

 private:
    // Three rows of `columns` values, `stride` apart, padded with zeros to `width`.
    static std::vector<float> padded_table(const float* rows, long columns, long stride, long width) {
        std::vector<float> table(3 * width);
        for (long r = 0; r < 3; r++) std::copy_n(rows + r * stride, columns, table.data() + r * width);
        return table;
    }

    const long tokens_, channels_, hidden_, dilation_;
    const Panels in_, out_;
    const std::vector<float> in_table_, out_table_;
};

template <class Number>
void add_branch(Number* x, long rows, long tokens, long channels, const Branch<Number>& branch, long threads) {
    const long blocks = branch.blocks, size = branch.hidden_values(), space = branch.scratch_values();
    const bool by_row = rows >= 4 * threads;  // then a row stays in the cache
    std::vector<float> hidden((by_row ? threads : rows) * size), scratch(threads * space);
    std::vector<Moments> moments((by_row ? threads : rows) * blocks);
    if (by_row) {
        each_item(rows, threads, [&](long row, long thread) {
            Number* at = x + row * tokens * channels;
            float *own = hidden.data() + thread * size, *free = scratch.data() + thread * space;
            Moments* each = moments.data() + thread * blocks;
            for (long b = 0; b < blocks; b++) each[b] = branch.convolve(at, b, own, free);
            const Moments first = merged(each, blocks);
            for (long b = 0; b < blocks; b++) each[b] = branch.activate(b, first, own, free);
            const Moments second = merged(each, blocks);
            for (long b = 0; b < blocks; b++) branch.add(at, b, second, own, free);
        });
        return;
    }
    std::vector<Moments> norms(rows);
    auto merge = [&] {
        for (long row = 0; row < rows; row++) norms[row] = merged(moments.data() + row * blocks, blocks);
    };
    each_item(rows * blocks, threads, [&](long item, long thread) {
        const long row = item / blocks;
        moments[item] = branch.convolve(x + row * tokens * channels, item % blocks, hidden.data() + row * size,
                                        scratch.data() + thread * space);
    });
    merge();
    each_item(rows * blocks, threads, [&](long item, long thread) {
        const long row = item / blocks;
        moments[item] =
            branch.activate(item % blocks, norms[row], hidden.data() + row * size, scratch.data() + thread * space);
    });
    merge();
    each_item(rows * blocks, threads, [&](long item, long thread) {
        const long row = item / blocks;
        branch.add(x + row * tokens * channels, item % blocks, norms[row], hidden.data() + row * size,
                   scratch.data() + thread * space);
    });
}

// ---- between the convolutions ---------------------------------------------------------------------------------------

template <class Number>
void add_bias_gelu(Number* x, long rows, long channels, const float* bias, long threads) {
    parallel_rows(rows, channels, threads, [&](long first, long stop) {
        for (Number* at = x + first * channels; at < x + stop * channels; at += channels)
            for (long c = 0; c < channels; c += LANES)
                store(at + c, gelu<float>(load(at + c, channels - c) + load(bias + c, channels - c)), channels - c);
    });
}

// `table` is null, or has a row for each `positions` rows, and starts again after `lines`.
template <class Number>
void gate(const Number* x, long rows, long channels, const float* bias, const float* table, long positions, long lines,
          Number* out, long threads) {
    parallel_rows(rows, 2 * channels, threads, [&](long first, long stop) {
        for (long row = first; row < stop; row++) {
            const Number *values = x + row * 2 * channels, *gates = values + channels;
            const float* line = table ? table + row / positions % lines * channels : nullptr;
            for (long c = 0; c < channels; c += LANES) {
                const long left = channels - c;
                const Floats value = load(values + c, left) + load(bias + c, left);
                Floats gated = value * sigmoid(load(gates + c, left) + load(bias + channels + c, left));
                if (line) gated += load(line + c, left);
                store(out + row * channels + c, gated, left);
            }
        }
    });
}

struct Interleaved {
    long batch, inputs, positions, stride, channels, crop, length;
    long skip_strides[3];  // of an item, a row and a position
};

template <class Number>
void interleave_rows(const Number* x, const float* bias, const Number* skip, Number* out, const Interleaved& s,
                     long threads) {
    parallel_rows(s.batch * s.length, s.positions * s.channels, threads, [&](long first, long stop) {
        for (long line = first; line < stop; line++) {
            const long item = line / s.length, row = line % s.length, place = row + s.crop;
            const Number* from = x + (item * s.inputs + place / s.stride) * s.positions * s.stride * s.channels +
                                 place % s.stride * s.channels;
            const Number* other = skip ? skip + item * s.skip_strides[0] + row * s.skip_strides[1] : nullptr;
            Number* to = out + line * s.positions * s.channels;
            for (long n = 0; n < s.positions; n++, from += s.stride * s.channels, to += s.channels)
                for (long c = 0; c < s.channels; c += LANES) {
                    const long left = s.channels - c;
                    Floats value = gelu<float>(load(from + c, left) + load(bias + c, left));
                    if (other) value += load(other + n * s.skip_strides[2] + c, left);
                    store(to + c, value, left);
                }
        }
    });
}

// ---- input and output -----------------------------------------------------------------------------------------------

void store_rounded(float* to, float value) { *to = value; }

void store_rounded(bf16* to, float value) { *to = rounded_to_bf16(all(value))[0]; }

struct Packed {
    long batch, channels, length, positions, parts;
    long strides[5];
    long stride, padding, rows;
};

template <class Number>
void pack_rows(const float* x, const float* means, const float* deviations, Number* out, const Packed& s,
               long threads) {
    const long width = s.stride * s.channels * s.parts;
    parallel_rows(s.batch * s.rows, s.positions * width, threads, [&](long first, long stop) {
        for (long line = first; line < stop; line++) {
            const long item = line / s.rows, start = line % s.rows * s.stride - s.padding;
            const float mean = means[item], scale = 1 / (EPS + deviations[item]);
            for (long n = 0; n < s.positions; n++) {
                Number* to = out + (line * s.positions + n) * width;
                for (long place = start; place < start + s.stride; place++)
                    for (long c = 0; c < s.channels; c++)
                        for (long p = 0; p < s.parts; p++) {
                            const bool inside = place >= 0 && place < s.length;
                            const float* from = x + item * s.strides[0] + c * s.strides[1] + place * s.strides[2] +
                                                n * s.strides[3] + p * s.strides[4];
                            store_rounded(to++, inside ? (*from - mean) * scale : 0.0f);
                        }
            }
        }
    });
}

struct Unpacked {
    long batch, inputs, positions, stride, channels, crop, zero_frames;
};

template <class Number>
void unpack_frames(const Number* x, const float* bias, const float* means, const float* deviations, float* out,
                   const Unpacked& s, long threads) {
    const long frames = s.positions + 2 * s.zero_frames, bins = s.inputs * s.stride - 2 * s.crop + 1;
    const long values = 2 * s.channels;  // of a bin, with real and imaginary parts
    parallel_rows(s.batch * frames, bins * values, threads, [&](long first, long stop) {
        for (long line = first; line < stop; line++) {
            const long item = line / frames, frame = line % frames, n = frame - s.zero_frames;
            auto part = [&](long channel) { return out + ((item * s.channels + channel) * frames + frame) * bins * 2; };
            if (n < 0 || n >= s.positions) {
                for (long c = 0; c < s.channels; c++) std::memset(part(c), 0, bins * 2 * sizeof(float));
                continue;
            }
            const float mean = means[item], scale = deviations[item];
            for (long bin = 0; bin < bins - 1; bin++) {
                const long place = bin + s.crop;
                const Number* from = x + ((item * s.inputs + place / s.stride) * s.positions + n) * s.stride * values +
                                     place % s.stride * values;
                for (long v = 0; v < values; v += LANES) {
                    const Floats y = (load(from + v, values - v) + load(bias + v, values - v)) * scale + mean;
                    for (long i = v; i < std::min(v + LANES, values); i++) part(i / 2)[2 * bin + i % 2] = y[i - v];
                }
            }
            for (long c = 0; c < s.channels; c++) part(c)[1] = part(c)[2 * bins - 2] = part(c)[2 * bins - 1] = 0;
        }
    });
}

// Frames of `n` samples, `hop` apart, to `rows` waveforms. Samples are added in the order of the frames.
void add_frames(const float* frames, const float* window, float* out, const long* sizes, long threads) {
    const long rows = sizes[0], count = sizes[1], n = sizes[2], hop = sizes[3], crop = sizes[4], length = sizes[5];
    const long hops = (length + hop - 1) / hop;
    each_item(rows * hops, threads, [&](long item, long) {
        const long row = item / hops, start = item % hops * hop, stop = std::min(length, start + hop);
        for (long sample = start; sample < stop;) {  // up to where a frame starts or ends
            const long place = sample + crop;
            const long last = std::min(count - 1, place / hop);
            const long first = place < n ? 0 : (place - n) / hop + 1;
            const long end = std::min({stop, (place / hop + 1) * hop - crop, first * hop + n - crop});
            for (; sample < end; sample += LANES) {
                Floats sum{}, squares{};
                for (long f = first; f <= last; f++) {
                    const long at = sample + crop - f * hop;
                    const Floats weights = load(window + at, end - sample);
                    sum += load(frames + (row * count + f) * n + at, end - sample) * weights;
                    squares += weights * weights;
                }
                store(out + row * length + sample, sum / squares, end - sample);
            }
            sample = end;
        }
    });
}

struct Waveform {
    long batch, inputs, stride, channels, crop, length, item_stride, channel_stride;
};

template <class Number>
void add_samples(float* out, const Number* x, const float* bias, const float* means, const float* deviations,
                 const Waveform& s, long threads) {
    parallel_rows(s.batch * s.length, s.channels, threads, [&](long first, long stop) {
        for (long line = first; line < stop; line++) {
            const long item = line / s.length, sample = line % s.length, place = sample + s.crop;
            const Number* from = x + item * s.inputs * s.stride * s.channels + place * s.channels;
            float* to = out + item * s.item_stride + sample;
            for (long c = 0; c < s.channels; c += LANES) {
                const Floats y =
                    (load(from + c, s.channels - c) + load(bias + c, s.channels - c)) * deviations[item] + means[item];
                for (long i = 0; i < std::min(LANES, s.channels - c); i++) to[(c + i) * s.channel_stride] += y[i];
            }
        }
    });
}

// ---- the transformer ------------------------------------------------------------------------------------------------

// The norm of a token [D], scaled by `gain` and shifted by `shift` unless they are null.
template <class Number>
void normalise(const float* x, long dim, const float* gain, const float* shift, Number* to) {
    const Moments moments = moments_of(x, 1, dim, dim);
    const float mean = static_cast<float>(moments.mean), factor = moments.factor();
    for (long d = 0; d < dim; d += LANES) {
        Floats v = (load(x + d, dim - d) - mean) * factor;
        if (gain) v = v * load(gain + d, dim - d) + load(shift + d, dim - d);
        store(to + d, v, dim - d);
    }
}

template <class Number>
void embed_tokens(const Number* x, const float* gain, const float* shift, const float* table, float* sums, Number* out,
                  const long* sizes, long threads) {
    const long batch = sizes[0], tokens = sizes[1], dim = sizes[2];
    parallel_rows(batch * tokens, dim, threads, [&](long first, long stop) {
        for (long token = first; token < stop; token++) {
            float* y = sums + token * dim;
            for (long d = 0; d < dim; d += LANES) store(y + d, load(x + token * dim + d, dim - d), dim - d);
            normalise(y, dim, gain, shift, y);
            const float* position = table + token % tokens * dim;
            for (long d = 0; d < dim; d += LANES)
                store(y + d, load(y + d, dim - d) + load(position + d, dim - d), dim - d);
            normalise(y, dim, nullptr, nullptr, out + token * dim);
        }
    });
}

template <class Number>
void add_scaled(float* x, const Number* y, long dim, const float* gain) {
    for (long d = 0; d < dim; d += LANES)
        store(x + d, load(x + d, dim - d) + load(y + d, dim - d) * load(gain + d, dim - d), dim - d);
}

template <class Number>
void add_and_normalise(float* x, const Number* y, const float* gain, Number* out, const long* sizes, long threads) {
    const long rows = sizes[0] * sizes[1], dim = sizes[2];
    parallel_rows(rows, dim, threads, [&](long first, long stop) {
        for (long token = first; token < stop; token++) {
            add_scaled(x + token * dim, y + token * dim, dim, gain);
            normalise(x + token * dim, dim, nullptr, nullptr, out + token * dim);
        }
    });
}

template <class Number>
void add_and_normalise_items(float* x, const Number* y, const float* const* tables, Number* out, const long* sizes,
                             long threads) {
    const long batch = sizes[0], tokens = sizes[1], dim = sizes[2], blocks = (tokens + TOKENS - 1) / TOKENS;
    std::vector<Moments> moments(batch * blocks), norms(batch);
    auto each_block = [&](auto work) {
        each_item(batch * blocks, threads, [&](long item, long) {
            const long start = item % blocks * TOKENS, first = item / blocks * tokens + start;
            work(item, first, std::min(TOKENS, tokens - start));
        });
    };
    each_block([&](long item, long first, long count) {
        for (long token = first; token < first + count; token++)
            add_scaled(x + token * dim, y + token * dim, dim, tables[0]);
        moments[item] = moments_of(x + first * dim, count, dim, dim);
    });
    for (long item = 0; item < batch; item++) norms[item] = merged(moments.data() + item * blocks, blocks);
    each_block([&](long item, long first, long count) {
        const Moments& norm = norms[item / blocks];
        const float mean = static_cast<float>(norm.mean), factor = norm.factor();
        for (long token = first; token < first + count; token++) {
            float* at = x + token * dim;
            for (long d = 0; d < dim; d += LANES) {
                const Floats normed = (load(at + d, dim - d) - mean) * factor;
                store(at + d, normed * load(tables[1] + d, dim - d) + load(tables[2] + d, dim - d), dim - d);
            }
            normalise(at, dim, nullptr, nullptr, out + token * dim);
        }
    });
}

// Calls `work` with the pointer in the type of its values. Returns 1 if there is not enough memory, else 0.
template <class Work>
int typed(void* x, long is_bf16, Work work) {
    try {
        if (is_bf16)
            work(static_cast<bf16*>(x));
        else
            work(static_cast<float*>(x));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

// Pointers to tensors, their sizes, whether their values are bfloat16, and threads. Tensors are contiguous where no
// strides are given.
extern "C" {

int demucs_gated_values(long products, long channels) { return products * channels * 2 * padded_channels(channels); }

int demucs_pack_gated(const float* weights, float* packed, const long* s, long, long) {
    pack_gated(weights, s[0], s[1], packed);
    return 0;
}

int demucs_gated(float* x, const float* weights, const float* bias, const float* table, float* out, const long* s, long,
                 long threads) {
    const Gated sizes{s[0], s[1], s[2], s[3], {s[4], s[5]}, weights, bias, table};
    auto* convolve = s[4] == 3 ? convolve_gated<4, 4> : s[5] == 3 ? convolve_gated<1, 4> : convolve_gated<1, 1>;
    return typed(x, false, [&](auto*) { convolve(sizes, x, out, threads); });
}

int demucs_bias_gelu(void* x, const float* bias, const long* s, long is_bf16, long threads) {
    return typed(x, is_bf16, [&](auto* at) { add_bias_gelu(at, s[0], s[1], bias, threads); });
}

int demucs_bias_glu(void* x, const float* bias, const float* table, void* out, const long* s, long is_bf16,
                    long threads) {
    return typed(x, is_bf16, [&](auto* at) {
        gate(at, s[0], s[1], bias, table, s[2], s[3], static_cast<decltype(at)>(out), threads);
    });
}

int demucs_dconv(void* x, const void* w_in, const void* in_table, const void* w_out, const void* out_table,
                 const long* s, long is_bf16, long threads) {
    return typed(x, is_bf16, [&](auto* at) {
        const void* weights[] = {w_in, in_table, w_out, out_table};
        const Branch<std::remove_pointer_t<decltype(at)>> branch(s[1], s[2], s[3], s[4], weights, s[5]);
        add_branch(at, s[0], s[1], s[2], branch, threads);
    });
}

int demucs_interleave(void* x, const float* bias, void* skip, void* out, const long* s, long is_bf16, long threads) {
    return typed(x, is_bf16, [&](auto* at) {
        using Pointer = decltype(at);
        const Interleaved sizes{s[0], s[1], s[2], s[3], s[4], s[5], s[6], {s[7], s[8], s[9]}};
        interleave_rows(at, bias, static_cast<Pointer>(skip), static_cast<Pointer>(out), sizes, threads);
    });
}

int demucs_pack(const float* x, const float* means, const float* deviations, void* out, const long* s, long is_bf16,
                long threads) {
    return typed(out, is_bf16, [&](auto* to) {
        const Packed sizes{s[0], s[1], s[2], s[3], s[4], {s[5], s[6], s[7], s[8], s[9]}, s[10], s[11], s[12]};
        pack_rows(x, means, deviations, to, sizes, threads);
    });
}

int demucs_unpack_spectrum(void* x, const float* bias, const float* means, const float* deviations, float* out,
                           const long* s, long is_bf16, long threads) {
    return typed(x, is_bf16, [&](auto* at) {
        const Unpacked sizes{s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
        unpack_frames(at, bias, means, deviations, out, sizes, threads);
    });
}

int demucs_overlap_add(const float* frames, const float* window, float* out, const long* s, long, long threads) {
    add_frames(frames, window, out, s, threads);
    return 0;
}

int demucs_add_waveform(float* out, void* x, const float* bias, const float* means, const float* deviations,
                        const long* s, long is_bf16, long threads) {
    return typed(x, is_bf16, [&](auto* at) {
        const Waveform sizes{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]};
        add_samples(out, at, bias, means, deviations, sizes, threads);
    });
}

int demucs_embed(void* x, const float* gain, const float* shift, const float* table, float* sums, void* out,
                 const long* s, long is_bf16, long threads) {
    return typed(x, is_bf16, [&](auto* at) {
        embed_tokens(at, gain, shift, table, sums, static_cast<decltype(at)>(out), s, threads);
    });
}

int demucs_add_norm(float* x, void* y, const float* gain, void* out, const long* s, long is_bf16, long threads) {
    return typed(y, is_bf16,
                 [&](auto* at) { add_and_normalise(x, at, gain, static_cast<decltype(at)>(out), s, threads); });
}

int demucs_add_group_norm(float* x, void* y, const float* gain, const float* norm_gain, const float* norm_shift,
                          void* out, const long* s, long is_bf16, long threads) {
    return typed(y, is_bf16, [&](auto* at) {
        const float* tables[] = {gain, norm_gain, norm_shift};
        add_and_normalise_items(x, at, tables, static_cast<decltype(at)>(out), s, threads);
    });
}
}  // extern "C"
}  // namespace demucs
