// Bidirectional LSTMs, and linear layers that are added to a residual stream.
//
// A step of some sequences is one product: of rows that hold the inputs and the hidden state before the step, with the
// weights of all gates. The gates of a few features are computed together, so that they become a new state while they
// are in the caches.
#pragma once

#include "rows.h"

namespace {

constexpr long MOST_SEQUENCES = 64;  // that a thread computes at a time
constexpr long GATES = 4;            // i, f, g and o

// A layer. The weights and biases of a direction are in panels: for each PANEL of hidden features, those of gate i,
// then those of f, g and o. Weights have a depth of inputs + hidden.
struct Lstm {
    long inputs, hidden;
    const void* weights[2];
    const float* biases[2];
};

// Sequences in an array of positions, such as [outer, steps, inner]. Strides are in positions.
struct Sequences {
    long outer, inner, steps, outer_stride, inner_stride, step_stride;
    long count() const { return outer * inner; }
    long position(long sequence, long step) const {
        return sequence / inner * outer_stride + sequence % inner * inner_stride + step * step_stride;
    }
};

// e ** -x, limited so that a product of three such values is finite.
inline Floats decay(Floats x) { return exp2_of(x * -LOG2_E, 40.0f); }

// The next cell: sigmoid(f) * cell + sigmoid(i) * tanh(g), with one division.
inline Floats next_cell(Floats i, Floats f, Floats g, Floats cell) {
    const Floats input = decay(i) + 1.0f, forget = decay(f) + 1.0f, value = decay(g + g), both = input * (value + 1.0f);
    return (cell * both + (1.0f - value) * forget) / (forget * both);
}

// The next hidden state: sigmoid(o) * tanh(cell).
inline Floats next_state(Floats o, Floats cell) {
    const Floats value = decay(cell + cell);
    return (1.0f - value) / ((decay(o) + 1.0f) * (value + 1.0f));
}

// Writes an input [size] to a row. Unless `norm` [3, size] is null, it holds the mean, the scale and the bias of each
// value.
template <class Number, class Row>
void copy_input(const Number* from, long size, const float* norm, Row* to) {
    for (long c = 0; c < size; c += LANES) {
        const long left = size - c;
        Floats value = first(from + c, left);
        if (norm)
            value = (value - first(norm + c, left)) * first(norm + size + c, left) + first(norm + 2 * size + c, left);
        store_first(value, to + c, left);
    }
}

// Both directions of x [positions, inputs], to `out` [positions, 2 * hidden]. `norms` [outer, 3, inputs] may be null.
template <class Kernel, class Number>
Outcome compute_lstm(const Number* x, const float* norms, const Lstm& lstm, const Sequences& sequences,
                     typename Kernel::Row* out, long threads) {
    using Row = typename Kernel::Row;
    constexpr long MOST = MOST_SEQUENCES / Kernel::ROWS * Kernel::ROWS;
    const long inputs = lstm.inputs, hidden = lstm.hidden, depth = inputs + hidden, all = sequences.count();
    const long columns = GATES * multiple_of(PANEL, hidden);
    const long stride = multiple_of(64, depth) + PANEL;  // rows 4 KiB apart would share one set of the L1 cache
    const long wanted = std::clamp(multiple_of(Kernel::ROWS, (2 * all + threads - 1) / threads), Kernel::ROWS, MOST);
    const long groups = (all + wanted - 1) / wanted;
    const long size = multiple_of(Kernel::ROWS, (all + groups - 1) / groups);  // groups of about the same size

    return parallel(2 * groups, threads, [&](auto next) {
        [[maybe_unused]] typename Kernel::Session session;
        Buffer<float> gates(size * GATES * PANEL), cells(size * columns / GATES);
        for (long task; (task = next()) < 2 * groups;) {
            const long direction = task % 2, start = task / 2 * size, count = std::min(size, all - start);
            if (count <= 0) continue;
            const float* biases = lstm.biases[direction];
            const Weights<Kernel> weights{static_cast<const typename Kernel::Weight*>(lstm.weights[direction])};
            Buffer<Row> even(size * stride), odd(size * stride);
            std::memset(cells, 0, size * columns / GATES * sizeof(float));
            for (long i = 0; i < sequences.steps; i++) {
                const long step = direction ? sequences.steps - 1 - i : i;
                Row *rows = i % 2 ? odd : even, *next_rows = i % 2 ? even : odd;
                for (long r = 0; r < count; r++)
                    copy_input(x + sequences.position(start + r, step) * inputs, inputs,
                               norms ? norms + (start + r) / sequences.inner * 3 * inputs : nullptr, rows + r * stride);
                product<Kernel>(Rows<Kernel>{rows, stride}, count, weights, depth, columns,
                                [&](long row, long column, auto sums) {
                                    const long gate = column / PANEL % GATES, lane = column % PANEL;
                                    const long feature = column / (GATES * PANEL) * PANEL + lane;
                                    float* values = gates + row * GATES * PANEL + lane;
                                    sums = sums.plus(sums.at(biases + column));
                                    if (gate < GATES - 1) return sums.store(values + gate * PANEL);
                                    Row* to = out + (sequences.position(start + row, step) * 2 + direction) * hidden;
                                    for (long v = 0; v < sums.COUNT; v++, values += LANES) {
                                        const long at_feature = feature + v * LANES, left = hidden - at_feature;
                                        float* cell = cells + row * columns / GATES + at_feature;
                                        const Floats now =
                                            next_cell(at(values), at(values + PANEL), at(values + 2 * PANEL), at(cell));
                                        const Floats state = next_state(sums.vectors[v], now);
                                        store(now, cell);
                                        store_first(state, next_rows + row * stride + inputs + at_feature, left);
                                        store_first(state, to + at_feature, left);
                                    }
                                });
            }
        }
    });
}

// x [rows, columns] += y [rows, depth] times weights [columns, depth], plus biases padded to whole panels.
template <class Kernel>
Outcome add_product(float* x, const typename Kernel::Row* y, const void* packed, const float* biases, const long* sizes,
                    long threads) {
    using Row = typename Kernel::Row;
    const long rows = sizes[0], columns = sizes[1], depth = sizes[2], stride = multiple_of(64, depth) + PANEL;
    const Weights<Kernel> weights{static_cast<const typename Kernel::Weight*>(packed)};
    const long blocks = (rows + BLOCK - 1) / BLOCK;
    return parallel(blocks, threads, [&](auto next) {
        [[maybe_unused]] typename Kernel::Session session;
        Buffer<Row> operands(BLOCK * stride);
        for (long block; (block = next()) < blocks;) {
            const long start = block * BLOCK, count = std::min(BLOCK, rows - start);
            for (long r = 0; r < count; r++)
                std::copy(y + (start + r) * depth, y + (start + r + 1) * depth, operands + r * stride);
            product<Kernel>(Rows<Kernel>{operands, stride}, count, weights, depth, columns,
                            [&](long row, long column, auto sums) {
                                float* to = x + (start + row) * columns + column;
                                const long left = columns - column;
                                sums.plus(sums.at(biases + column)).plus(sums.first(to, left)).store_first(to, left);
                            });
        }
    });
}

}  // namespace
