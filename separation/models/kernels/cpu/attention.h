// The attention of one head.
#pragma once

#include "products.h"

namespace {

// Attention over `keys` rows of k and v, each of `size` values.
template <class Kernel>
class Head {
 public:
    using Row = typename Kernel::Row;

    Head(long keys, long size)
        : keys_(keys),
          size_(size),
          width_(multiple_of(PANEL, keys)),
          packed_k_(width_ * packed_depth<Kernel>(size)),
          packed_v_(multiple_of(PANEL, size) * packed_depth<Kernel>(width_)),
          scores_(QUERIES * width_),
          weights_(QUERIES * width_ + 64) {}

    // Packs k and v, whose rows are `stride` values apart, as weights of a product.
    void set_keys(const Row* k, const Row* v, long stride) {
        constexpr long COLUMNS = Kernel::COLUMNS, UNIT = Kernel::UNIT;
        const long depth = packed_depth<Kernel>(width_);
        for (long t = 0; t < keys_; t++) {  // k has keys_ columns and a depth of size_
            Row* to = packed_k_ + t / COLUMNS * COLUMNS * packed_depth<Kernel>(size_) + t % COLUMNS * UNIT;
            for (long d = 0; d < size_; d += UNIT)
                std::memcpy(to + d * COLUMNS, k + t * stride + d, UNIT * sizeof(Row));
        }
        for (long d = 0; d < size_; d += COLUMNS)  // v has size_ columns and a depth of width_
            for (long t = 0; t < keys_; t++) {
                Row* to = packed_v_ + d * depth + t / UNIT * UNIT * COLUMNS + t % UNIT;
                const Row* from = v + t * stride + d;
#pragma GCC unroll 8
                for (long c = 0; c < COLUMNS; c++) to[c * UNIT] = from[c];
            }
    }

    // Computes the rows of out, each multiplied by its gate. The strides are the distances between rows and gates.
    void attend(const Row* q, long stride, long queries, const float* gates, long gate_stride, Row* out,
                long out_stride) {
        for (long start = 0; start < queries; start += QUERIES) {
            const long rows = std::min<long>(QUERIES, queries - start);
            product<Kernel>(Rows<Kernel>{q + start * stride, stride}, rows, Weights<Kernel>{packed_k_}, size_, width_,
                            [&](long row, long column, auto sums) { sums.store(scores_ + row * width_ + column); });
            float factors[QUERIES];
            for (long row = 0; row < rows; row++) factors[row] = gates[(start + row) * gate_stride] / exponentials(row);
            product<Kernel>(Rows<Kernel>{weights_, width_}, rows, Weights<Kernel>{packed_v_}, width_, size_,
                            [&](long row, long column, auto sums) {
                                sums.through([&](Floats x) { return x * factors[row]; })
                                    .store(out + (start + row) * out_stride + column);
                            });
        }
    }

 private:
    static constexpr long QUERIES = multiple_of(Kernel::ROWS, 12);  // rows that are computed at once

    // Writes the exponentials of a row of scores to the weights and returns their sum, by which the softmax divides.
    float exponentials(long row) {
        float* scores = scores_ + row * width_;
        for (long t = keys_; t < width_; t++) scores[t] = -INFINITY;
        Floats top = at(scores);
        for (long t = LANES; t < width_; t += LANES) top = larger(top, at(scores + t));
        const float scale = LOG2_E / std::sqrt(static_cast<float>(size_));
        const float offset = -scale * highest_of<float>(top);
        Floats sum = {};
        for (long t = 0; t < width_; t += LANES) {
            const Floats weights = exp2_of(at(scores + t) * scale + offset);
            sum += weights;
            store_as(weights, weights_ + row * width_ + t);
        }
        return sum_of(sum);
    }

    const long keys_, size_, width_;  // width_ is keys_, padded to whole panels
    Buffer<Row> packed_k_, packed_v_;
    Buffer<float> scores_;
    Buffer<Row> weights_;
};

}  // namespace
