// A layer of a transformer. Its intermediate results stay in the caches.
#pragma once

#include "attention.h"
#include "rows.h"

namespace {

constexpr long GROUP = 512;  // rows that a thread processes at a time, if there are so many

// The packed weights include the gain of the norm before them. Biases are padded to whole panels. Only integers have
// scales and starts; for others these are null.
struct Linear {
    const void* packed;
    const float *bias, *scales;
    const int32_t* starts;
    template <class Kernel>
    void as(Weights<Kernel>& weights) const {
        weights = {static_cast<const typename Kernel::Weight*>(packed)};
    }
    template <class Kernel>
    void as(ScaledWeights<Kernel>& weights) const {
        weights = {static_cast<const typename Kernel::Weight*>(packed), scales, starts};
    }
    template <class W>
    W as() const {
        W weights;
        as(weights);
        return weights;
    }
};

struct Layer {
    long dim, heads, head_size, hidden;
    Linear qkv_gates, out, up, down;
    const float* norm_gains;  // of a norm after the layer; null if there is none
};

// A pre-norm transformer layer on x [sequences, tokens, dim], in place. Strides are in floats. cosines and sines
// [tokens, head_size] contain the angle of each pair twice; the first sine of a pair is negated. The linear layers use
// one kernel, attention another one.
template <class Kernel, class AttentionKernel, bool IS_SCALED>
Outcome compute_layer(float* x, long sequences, long tokens, long sequence_stride, long token_stride,
                      const Layer& layer, const float* cosines, const float* sines, long threads) {
    using Operands = Block<Kernel, IS_SCALED>;
    using W = typename Operands::W;
    using Row = typename AttentionKernel::Row;
    constexpr long AFTER = 64;  // values after the last row that a kernel may read
    const long dim = layer.dim, heads = layer.heads, size = layer.head_size, inner = heads * size,
               hidden = layer.hidden;
    const long up_stride = hidden + PANEL;  // with a stride of 4 KiB, all rows would share one set of the L1 cache
    const long group = std::max(1L, std::min(GROUP / tokens, (sequences + threads - 1) / threads));
    const long most_rows = group * tokens;

    return parallel((sequences + group - 1) / group, threads, [&](auto next) {
        [[maybe_unused]] typename Kernel::Session session;
        [[maybe_unused]] typename AttentionKernel::Session attention_session;
        Operands operands(dim, std::max({dim, inner, hidden}));
        Buffer<Row> q(most_rows * inner + AFTER), k(most_rows * inner), v(most_rows * inner);
        Buffer<Row> attended(most_rows * inner + AFTER), up(BLOCK * up_stride + AFTER);
        Buffer<float> gates(most_rows * PANEL);
        Head<AttentionKernel> head(tokens, size);
        for (long first; (first = group * next()) < sequences;) {
            const long count = std::min(group, sequences - first), rows = count * tokens;
            const auto row_at = [&](long row) {
                return x + (first + row / tokens) * sequence_stride + row % tokens * token_stride;
            };
            const auto linear = [&](auto from, long block, const Linear& weights, long depth, long columns, auto take) {
                product<Kernel>(from, block, weights.as<W>(), depth, columns, [&](long row, long column, auto sums) {
                    take(row, column, sums.plus(sums.at(weights.bias + column)));
                });
            };
            const auto add = [&](auto values, float* row, long column) {
                const long left = dim - column;
                values.plus(values.first(row + column, left)).store_first(row + column, left);
            };
            for (long start = 0; start < rows; start += BLOCK) {
                const long block = std::min(BLOCK, rows - start);
                for (long row = 0; row < block; row++) operands.normalise(row, row_at(start + row), dim);
                linear(operands.rows(), block, layer.qkv_gates, dim, 3 * inner + PANEL,
                       [&](long row, long column, auto sums) {
                           row += start;
                           if (column >= 3 * inner) {
                               sums.through(sigmoid).store(gates + row * PANEL + column - 3 * inner);
                           } else if (column >= 2 * inner) {
                               sums.store(v + row * inner + column - 2 * inner);
                           } else {
                               const long angle = row % tokens * size + column % size;
                               const auto turned = sums.through(swapped).with(
                                   sums.at(sines + angle), [](Floats value, Floats sine) { return value * sine; });
                               sums.with(sums.at(cosines + angle),
                                         [](Floats value, Floats cosine) { return value * cosine; })
                                   .plus(turned)
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
                linear(operands.rounded(static_cast<const Row*>(attended) + start * inner, inner, block, inner), block,
                       layer.out, inner, dim,
                       [&](long row, long column, auto sums) { add(sums, row_at(start + row), column); });
                for (long row = 0; row < block; row++) operands.normalise(row, row_at(start + row), dim);
                linear(operands.rows(), block, layer.up, dim, hidden, [&](long row, long column, auto sums) {
                    sums.through(gelu<Row>).store(up + row * up_stride + column);
                });
                linear(operands.rounded(static_cast<const Row*>(up), up_stride, block, hidden), block, layer.down,
                       hidden, dim, [&](long row, long column, auto sums) { add(sums, row_at(start + row), column); });
                for (long row = 0; layer.norm_gains && row < block; row++)
                    normalise(row_at(start + row), dim, layer.norm_gains);
            }
        }
    });
}

}  // namespace
