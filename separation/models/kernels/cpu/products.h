// Matrix products of rows with packed weights, and the kernels that most kinds of CPU share.
//
// A kernel is a class with
//   Row, Weight, Sum   the types of a value in a row, of a weight, and of a sum
//   ROWS, COLUMNS      how many rows and columns it computes at once
//   UNIT               how many neighbouring weights of a column are packed side by side
//   DEPTH              the depth of packed weights is padded with zeros to a multiple of it
//   multiply           sums [rows, COLUMNS] = rows times a block of weights [depth / UNIT][COLUMNS][UNIT]
//   operations         runs the bare instructions on registers and returns the number of operations
//   Session            an object that each thread needs while it calls the kernel
#pragma once

#include "memory.h"
#include "vectors.h"

namespace {

constexpr long PANEL = 32;  // columns are padded to a multiple of it; the columns of a panel belong to one head

struct NoSession {};

// Keeps the compiler from knowing the values, and from dropping the code that computes them.
template <class Object>
void hide(Object& object) {
    asm volatile("" : "+m"(object));
}

// ---- kernels of vector instructions ---------------------------------------------------------------------------------

// Instructions that multiply floats.
struct FloatInstructions {
    using Row = float;
    using Weight = float;
    using Sum = float;
    using Sums = Floats;
    using Vector = Floats;
    static constexpr long UNIT = 1;
    static Vector broadcast(const float* value) { return all(*value); }
    static void add(Sums& sums, Vector a, Vector b) { sums += a * b; }
};

// A kernel of R rows and V vectors of columns, whose sums stay in registers.
template <class Instructions, int R, int V>
struct VectorKernel : Instructions {
    using typename Instructions::Row;
    using typename Instructions::Sum;
    using typename Instructions::Sums;
    using typename Instructions::Vector;
    using typename Instructions::Weight;
    using Session = NoSession;
    static constexpr long ROWS = R, COLUMNS = V * LANES, DEPTH = Instructions::UNIT;

    static void multiply(const Row* a, long stride, long rows, const Weight* weights, long depth, Sum* sums) {
        choose<R>(a, stride, rows, weights, depth, sums);
    }

    static long operations(long rounds) {
        Sums start = {}, sums[R][V];
        Vector a[2] = {}, b[V] = {};
        hide(start);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < V; c++) sums[r][c] = start += 1;  // different, since equal ones are computed once
        for (long round = 0; round < rounds; round++) {
            hide(a), hide(b);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) Instructions::add(sums[r][v], a[r % 2], b[v]);
        }
        Sums total = {};
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < V; c++) total += sums[r][c];
        hide(total);
        return rounds * R * V * LANES * Instructions::UNIT * 2;
    }

 private:
    template <int COUNT>
    static void choose(const Row* a, long stride, long rows, const Weight* weights, long depth, Sum* sums) {
        if constexpr (COUNT > 1)
            if (rows < COUNT) return choose<COUNT - 1>(a, stride, rows, weights, depth, sums);
        multiply_rows<COUNT>(a, stride, weights, depth, sums);
    }

    // Not inlined, because the sums would then compete with the caller's values for registers.
    template <int COUNT>
    static __attribute__((noinline)) void multiply_rows(const Row* a, long stride, const Weight* weights, long depth,
                                                        Sum* results) {
        constexpr long UNIT = Instructions::UNIT;
        Sums sums[COUNT][V] = {};
        for (long k = 0; k < depth; k += UNIT) {
            Vector b[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) b[v] = load<Vector>(weights + (k * V + v * UNIT) * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < COUNT; r++) {
                const Vector value = Instructions::broadcast(a + r * stride + k);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) Instructions::add(sums[r][v], value, b[v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) store(sums[r][v], results + r * COLUMNS + v * LANES);
    }
};

// ---- packed weights -------------------------------------------------------------------------------------------------

// The depth of packed weights.
template <class Kernel>
constexpr long packed_depth(long depth) {
    return multiple_of(Kernel::DEPTH, depth);
}

// Packs weights [columns, depth] with a stride between columns; what is beyond is zero.
template <class Kernel>
void pack_block(const typename Kernel::Weight* weights, long stride, long columns, long depth,
                typename Kernel::Weight* packed) {
    for (long k = 0; k < packed_depth<Kernel>(depth); k += Kernel::UNIT)
        for (long c = 0; c < Kernel::COLUMNS; c++)
            for (long u = 0; u < Kernel::UNIT; u++)
                *packed++ = c < columns && k + u < depth ? weights[c * stride + k + u] : typename Kernel::Weight(0);
}

// ---- products -------------------------------------------------------------------------------------------------------

// COLUMNS floats.
template <long COLUMNS>
struct Values {
    static constexpr long COUNT = COLUMNS / LANES;
    static_assert(COUNT * LANES == COLUMNS);
    Floats vectors[COUNT];

    static Values at(const float* from) {
        Values values;
        for (long i = 0; i < COUNT; i++) values.vectors[i] = ::at(from + i * LANES);
        return values;
    }
    static Values first(const float* from, long count) {
        Values values;
        for (long i = 0; i < COUNT; i++) values.vectors[i] = ::first(from + i * LANES, count - i * LANES);
        return values;
    }
    template <class Function>
    Values through(Function function) const {
        Values values;
        for (long i = 0; i < COUNT; i++) values.vectors[i] = function(vectors[i]);
        return values;
    }
    template <class Function>
    Values with(Values other, Function function) const {
        Values values;
        for (long i = 0; i < COUNT; i++) values.vectors[i] = function(vectors[i], other.vectors[i]);
        return values;
    }
    Values plus(Values other) const {
        return with(other, [](Floats a, Floats b) { return a + b; });
    }
    template <class Number>
    void store(Number* to) const {
        for (long i = 0; i < COUNT; i++) store_as(vectors[i], to + i * LANES);
    }
    void store_first(float* to, long count) const {
        for (long i = 0; i < COUNT; i++) ::store_first(vectors[i], to + i * LANES, count - i * LANES);
    }
};

// Rows of floats or bfloat16 values.
template <class Kernel>
struct Rows {
    const typename Kernel::Row* values;
    long stride;
    Rows from(long row) const { return {values + row * stride, stride}; }
};

// Weights of the same type.
template <class Kernel>
struct Weights {
    const typename Kernel::Weight* packed;
    Values<Kernel::COLUMNS> scaled(const Rows<Kernel>&, long, const float* sums, long) const {
        return Values<Kernel::COLUMNS>::at(sums);
    }
};

// Rows of integers: the values of row r are (integers - Kernel::ZERO) times scales[r].
template <class Kernel>
struct ScaledRows {
    const typename Kernel::Row* values;
    long stride;
    const float* scales;
    ScaledRows from(long row) const { return {values + row * stride, stride, scales + row}; }
};

// Weights of integers: those of column c are integers times scales[c]. starts[c] is -Kernel::ZERO times the sum of the
// integers, which cancels the offset in the rows.
template <class Kernel>
struct ScaledWeights {
    const typename Kernel::Weight* packed;
    const float* scales;
    const int32_t* starts;
    Values<Kernel::COLUMNS> scaled(const ScaledRows<Kernel>& rows, long row, const int32_t* sums, long column) const {
        Values<Kernel::COLUMNS> values;
        for (long i = 0; i < values.COUNT; i++) {
            const Ints sum = load<Ints>(sums + i * LANES) + load<Ints>(starts + column + i * LANES);
            values.vectors[i] =
                __builtin_convertvector(sum, Floats) * at(scales + column + i * LANES) * rows.scales[row];
        }
        return values;
    }
};

// a [rows, depth] times packed weights. Calls `take(row, column, values)` for each row and block of columns; `values`
// are the results from `column` on.
template <class Kernel, class A, class W, class Take>
void product(A a, long rows, W weights, long depth, long columns, Take take) {
    alignas(64) typename Kernel::Sum sums[Kernel::ROWS * Kernel::COLUMNS];
    const long padded = packed_depth<Kernel>(depth);
    for (long column = 0; column < columns; column += Kernel::COLUMNS)
        for (long row = 0; row < rows; row += Kernel::ROWS) {
            const long count = std::min<long>(Kernel::ROWS, rows - row);
            const auto block = a.from(row);
            Kernel::multiply(block.values, block.stride, count, weights.packed + column * padded, padded, sums);
            for (long r = 0; r < count; r++)
                take(row + r, column, weights.scaled(block, r, sums + r * Kernel::COLUMNS, column));
        }
}

}  // namespace
