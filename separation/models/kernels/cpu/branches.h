// SCNet's residual branches along time, in float32. A bin's frames stay in the L2 cache through all its branches.
#pragma once

#include "rows.h"
#include "unet.h"

namespace {

// A branch: a norm; a convolution to values and gates; a GLU; a depthwise convolution; a norm; SiLU; a linear layer.
// Both norms are over all frames and features. Tables and weights are padded with zeros.
struct TimeBranch {
    const float* norm;        // [3, features]: gains, biases and ones
    const void* convolution;  // packed [2 * hidden, taps * features]
    const float* gates;       // [2 * hidden], biases
    const float* depthwise;   // [taps, hidden]
    const float* table;       // [4, hidden]: the norm's gains and biases, ones, and the depthwise convolution's biases
    const void* expansion;    // packed [features, hidden]
    const float* biases;      // [features], padded to whole panels
};

// The padded numbers of features are multiples of LANES.
struct TimeSizes {
    long bins, frames, width, features, narrow, hidden, taps;  // `width` and `narrow` are without padding
};

// Normalises x [rows, columns] in place, through `finish`. `table` [3, columns] holds gains, biases, and one for each
// column but zero for padding.
template <class Finish>
void normalise_all(float* x, long rows, long columns, long count, const float* table, Finish finish) {
    const float* ones = table + 2 * columns;
    Floats sums = {}, squares = {};
    for (long i = 0; i < rows * columns; i += LANES) sums += at(x + i);
    const float mean = sum_of(sums) / static_cast<float>(count);
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < columns; c += LANES) {
            const Floats distance = (at(x + r * columns + c) - mean) * at(ones + c);
            squares += distance * distance;
        }
    const float factor = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(count) + 1e-5f);
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < columns; c += LANES) {
            float* to = x + r * columns + c;
            store(finish((at(to) - mean) * (factor * at(table + c)) + at(table + columns + c)), to);
        }
}

// What a thread needs for the frames of a bin.
template <class Kernel>
class TimeBranches {
 public:
    explicit TimeBranches(const TimeSizes& sizes)
        : s_(sizes),
          pad_(sizes.taps / 2),
          stream_(s_.frames * s_.features),
          normed_((s_.frames + 2 * pad_) * s_.features + AFTER),
          gates_(s_.frames * 2 * s_.hidden),
          gated_((s_.frames + 2 * pad_) * s_.hidden),
          mixed_(s_.frames * s_.hidden + AFTER) {}

    void read(const float* x) {
        for (long n = 0; n < s_.frames; n++)
            for (long c = 0; c < s_.features; c += LANES)
                store(first(x + n * s_.width + c, s_.width - c), stream_ + n * s_.features + c);
    }

    void add(const TimeBranch& branch) {
        float* normed = normed_ + pad_ * s_.features;
        std::memcpy(normed, stream_, s_.frames * s_.features * sizeof(float));
        normalise_all(normed, s_.frames, s_.features, s_.frames * s_.width, branch.norm, [](Floats x) { return x; });
        const long taps = s_.taps, hidden = s_.hidden;
        product<Kernel>(Rows<Kernel>{normed_, s_.features}, s_.frames, weights(branch.convolution), taps * s_.features,
                        2 * hidden, [&](long row, long column, auto sums) {
                            sums.plus(sums.at(branch.gates + column))
                                .store_first(gates_ + row * 2 * hidden + column, 2 * hidden - column);
                        });
        for (long n = 0; n < s_.frames; n++)
            for (long c = 0; c < hidden; c += LANES) {
                const float* values = gates_ + n * 2 * hidden + c;
                store(at(values) * sigmoid(at(values + hidden)), gated_ + (pad_ + n) * hidden + c);
            }
        for (long n = 0; n < s_.frames; n++)
            for (long c = 0; c < hidden; c += LANES) {
                Floats sum = at(branch.table + 3 * hidden + c);
                for (long tap = 0; tap < taps; tap++)
                    sum += at(gated_ + (n + tap) * hidden + c) * at(branch.depthwise + tap * hidden + c);
                store(sum, mixed_ + n * hidden + c);
            }
        normalise_all(mixed_, s_.frames, hidden, s_.frames * s_.narrow, branch.table,
                      [](Floats x) { return x * sigmoid(x); });
        product<Kernel>(Rows<Kernel>{mixed_, hidden}, s_.frames, weights(branch.expansion), hidden, s_.features,
                        [&](long row, long column, auto sums) {
                            float* to = stream_ + row * s_.features + column;
                            const long left = s_.features - column;
                            sums.plus(sums.at(branch.biases + column)).plus(sums.first(to, left)).store_first(to, left);
                        });
    }

    void write(float* out, long activation) const {
        for (long n = 0; n < s_.frames; n++)
            for (long c = 0; c < s_.features; c += LANES)
                store_first(unet::activated(at(stream_ + n * s_.features + c), activation, 0.0f),
                            out + n * s_.width + c, s_.width - c);
    }

 private:
    static constexpr long AFTER = 64;  // values after the last row that a kernel may read

    static Weights<Kernel> weights(const void* packed) { return {static_cast<const typename Kernel::Weight*>(packed)}; }

    const TimeSizes s_;
    const long pad_;
    Buffer<float> stream_, normed_, gates_, gated_, mixed_;
};

// Applies `count` branches to each of `rows` bins of x [rows, frames, width], then an activation (see unet_ops.py).
// Batch items of `out` are `stride` bins apart.
template <class Kernel>
Outcome add_branches(const float* x, long rows, const TimeBranch* branches, long count, const TimeSizes& sizes,
                     float* out, long stride, long activation, long threads) {
    const long size = sizes.frames * sizes.width;
    return parallel(rows, threads, [&](auto next) {
        TimeBranches<Kernel> bin(sizes);
        for (long row; (row = next()) < rows;) {
            bin.read(x + row * size);
            for (long i = 0; i < count; i++) bin.add(branches[i]);
            bin.write(out + (row / sizes.bins * stride + row % sizes.bins) * size, activation);
        }
    });
}

}  // namespace
