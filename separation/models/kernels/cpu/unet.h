// Convolutions of 3 x 3 in float32 by Winograd's F(4 x 4, 3 x 3): a quarter of the multiplications. Features come last.
//
// A tile of 6 x 6 positions gives 4 x 4 results. Its transform has 36 values for each feature, and for each of the 36
// there is a matrix product over features. The points are 0, +-1/sqrt(2), +-sqrt(2) and infinity, whose rounding error
// is about four times that of a direct sum; that of whole numbers is twice as large again.
//
// Then what is between the convolutions. All results are independent of the number of threads.
#pragma once

#include <cmath>
#include <vector>

#include "memory.h"
#include "vectors.h"

namespace unet {
namespace {

constexpr long TILE = 4, WINDOW = TILE + 2, POINTS = WINDOW * WINDOW;
constexpr long WIDTH = 2 * LANES;  // features of a result that a product computes at once
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr long HEIGHT = 12;  // rows of a result that a product computes at once, with 32 registers
#else
constexpr long HEIGHT = 6;  // with 16
#endif
constexpr long MOST_TILES = 48;                         // of a block, whose transforms a thread keeps in its caches
constexpr float NEAR = 0.70710678f, FAR = 1.41421356f;  // the points
constexpr long STATISTIC_ROWS = 64;                     // of a block, which is read twice

inline void transform_input(const Floats* d, long stride, Floats* v, long v_stride) {
    const auto in = [&](long i) { return d[i * stride]; };
    const Floats even_near = in(4) - 2.0f * in(2), odd_near = NEAR * (in(3) - 2.0f * in(1));
    const Floats even_far = in(4) - 0.5f * in(2), odd_far = FAR * (in(3) - 0.5f * in(1));
    v[0] = in(0) - 2.5f * in(2) + in(4);
    v[v_stride] = even_near + odd_near;
    v[2 * v_stride] = even_near - odd_near;
    v[3 * v_stride] = even_far + odd_far;
    v[4 * v_stride] = even_far - odd_far;
    v[5 * v_stride] = in(1) - 2.5f * in(3) + in(5);
}

inline void transform_output(const Floats* m, long stride, Floats* y, long y_stride) {
    const auto in = [&](long i) { return m[i * stride]; };
    const Floats near_sum = in(1) + in(2), near_difference = NEAR * (in(1) - in(2));
    const Floats far_sum = in(3) + in(4), far_difference = FAR * (in(3) - in(4));
    y[0] = in(0) + near_sum + far_sum;
    y[y_stride] = near_difference + far_difference;
    y[2 * y_stride] = 0.5f * near_sum + 2.0f * far_sum;
    y[3 * y_stride] = 0.5f * near_difference + 2.0f * far_difference + in(5);
}

// The kernel g [3] at each point.
inline void transform_kernel(const double* g, long stride, double* u, long u_stride) {
    const double root = std::sqrt(0.5), near = -2.0 / 3, far = 1.0 / 6;  // 1 / the product of the points' distances
    const double even_near = g[0] + 0.5 * g[2 * stride], odd_near = root * g[stride];
    const double even_far = g[0] + 2.0 * g[2 * stride], odd_far = 2.0 * root * g[stride];
    u[0] = g[0];
    u[u_stride] = near * (even_near + odd_near);
    u[2 * u_stride] = near * (even_near - odd_near);
    u[3 * u_stride] = far * (even_far + odd_far);
    u[4 * u_stride] = far * (even_far - odd_far);
    u[5 * u_stride] = g[2 * stride];
}

struct Image {
    long height, width, features_in, features_out;
    long padded_in() const { return multiple_of(LANES, features_in); }
    long padded_out() const { return multiple_of(WIDTH, features_out); }
    long across() const { return (width + TILE - 1) / TILE; }
    long tiles() const { return (height + TILE - 1) / TILE * across(); }
};

// The transform of the tile whose first result is at (row, column), of x [height, width, features_in].
inline void read_tile(const float* x, const Image& image, long row, long column, float* to, long stride) {
    const long features = image.features_in;
    for (long c = 0; c < features; c += LANES) {
        Floats d[POINTS], half[POINTS], v[POINTS];
        for (long i = 0; i < WINDOW; i++)
            for (long j = 0; j < WINDOW; j++) {
                const long r = row + i - 1, s = column + j - 1;
                const bool inside = r >= 0 && r < image.height && s >= 0 && s < image.width;
                d[i * WINDOW + j] = inside ? first(x + (r * image.width + s) * features + c, features - c) : Floats{};
            }
        for (long j = 0; j < WINDOW; j++) transform_input(d + j, WINDOW, half + j, WINDOW);
        for (long i = 0; i < WINDOW; i++) transform_input(half + i * WINDOW, 1, v + i * WINDOW, 1);
        for (long p = 0; p < POINTS; p++) store(v[p], to + p * stride + c);
    }
}

inline Floats activated(Floats x, long activation, float alpha) {
    if (activation == 1) return gelu<float>(x);
    if (activation == 2) return at_least(0.0f, x);
    if (activation == 3) return x > 0.0f ? x : alpha * (exp2_of(x * LOG2_E) - 1.0f);
    return x;
}

// The results of that tile, plus the biases, to y or added to it, then an activation without a parameter.
inline void write_tile(const float* from, long stride, const Image& image, long row, long column, const float* bias,
                       bool adds, long activation, float* y) {
    const long features = image.features_out;
    const long rows = std::min(TILE, image.height - row), columns = std::min(TILE, image.width - column);
    for (long k = 0; k < features; k += LANES) {
        Floats m[POINTS], half[TILE * WINDOW], out[TILE * TILE];
        for (long p = 0; p < POINTS; p++) m[p] = at(from + p * stride + k);
        for (long j = 0; j < WINDOW; j++) transform_output(m + j, WINDOW, half + j, WINDOW);
        for (long i = 0; i < TILE; i++) transform_output(half + i * WINDOW, 1, out + i * TILE, 1);
        const Floats start = bias ? first(bias + k, features - k) : Floats{};
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < columns; j++) {
                float* to = y + ((row + i) * image.width + column + j) * features + k;
                Floats value = out[i * TILE + j] + start;
                if (adds) value += first(to, features - k);
                store_first(activated(value, activation, 0), to, features - k);
            }
    }
}

// The product of a [HEIGHT, depth] and b [depth, WIDTH], to `to` [HEIGHT, WIDTH].
inline void multiply(const float* a, long a_stride, const float* b, long depth, float* to, long to_stride) {
    Floats sums[HEIGHT][2] = {};
    for (long k = 0; k < depth; k++) {
        const Floats low = at(b + k * WIDTH), high = at(b + k * WIDTH + LANES);
#pragma GCC unroll 12
        for (long r = 0; r < HEIGHT; r++) {
            const Floats value = all(a[r * a_stride + k]);
            sums[r][0] += value * low;
            sums[r][1] += value * high;
        }
    }
    for (long r = 0; r < HEIGHT; r++) {
        store(sums[r][0], to + r * to_stride);
        store(sums[r][1], to + r * to_stride + LANES);
    }
}

}  // namespace
}  // namespace unet

extern "C" {

// The number of floats that `unet_pack` writes.
long unet_packed_size(long features_in, long features_out) {
    const unet::Image image{0, 0, features_in, features_out};
    return unet::POINTS * features_in * image.padded_out();
}

// weights [features_out, features_in, 3, 3] to packed [POINTS][panel][features_in][WIDTH].
int unet_pack(const float* weights, long features_in, long features_out, float* packed, long threads) {
    using namespace unet;
    const long panels = multiple_of(WIDTH, features_out) / WIDTH;
    return parallel(panels, threads, [&](auto next) {
        for (long panel; (panel = next()) < panels;)
            for (long c = 0; c < features_in; c++)
                for (long lane = 0; lane < WIDTH; lane++) {
                    const long k = panel * WIDTH + lane;
                    double g[9] = {}, half[WINDOW * 3], u[POINTS];
                    for (long i = 0; i < 9 && k < features_out; i++) g[i] = weights[(k * features_in + c) * 9 + i];
                    for (long j = 0; j < 3; j++) transform_kernel(g + j, 3, half + j, 3);
                    for (long i = 0; i < WINDOW; i++) transform_kernel(half + 3 * i, 1, u + i * WINDOW, 1);
                    for (long p = 0; p < POINTS; p++)
                        packed[((p * panels + panel) * features_in + c) * WIDTH + lane] = static_cast<float>(u[p]);
                }
    });
}

// Convolves each of `batch` images x [height, width, features_in] with zeros around it; `sizes` are batch, height,
// width, features_in, features_out, whether to add the result [height, width, features_out] to y, and the activation
// after that, as in `unet_normalise`. `bias` may be null.
int unet_convolve(const float* x, const float* packed, const float* bias, float* y, const long* sizes, long threads) {
    using namespace unet;
    const Image image{sizes[1], sizes[2], sizes[3], sizes[4]};
    const long features = image.features_in, depth = image.padded_in(), columns = image.padded_out();
    const long tiles = image.tiles(), all_tiles = sizes[0] * tiles;
    const long block = std::clamp(multiple_of(HEIGHT, (all_tiles / threads + 3) / 4), HEIGHT, MOST_TILES);
    const long blocks = (all_tiles + block - 1) / block;
    return parallel(blocks, threads, [&](auto next) {
        // One cache line more, because the points of a tile would otherwise share the sets of the L1 cache.
        const long in_stride = block * depth + 16, out_stride = block * columns + 16;
        Buffer<float> in(POINTS * in_stride), out(POINTS * out_stride);
        const auto each_tile = [&](long start, long count, auto run) {
            for (long t = 0; t < count; t++) {
                const long item = (start + t) / tiles, tile = (start + t) % tiles;
                run(t, item, tile / image.across() * TILE, tile % image.across() * TILE);
            }
        };
        for (long number; (number = next()) < blocks;) {
            const long start = number * block, count = std::min(block, all_tiles - start);
            each_tile(start, count, [&](long t, long item, long row, long column) {
                const float* from = x + item * image.height * image.width * features;
                read_tile(from, image, row, column, in + t * depth, in_stride);
            });
            for (long p = 0; p < POINTS; p++)
                for (long k = 0; k < columns; k += WIDTH)
                    for (long t = 0; t < count; t += HEIGHT)
                        multiply(in + p * in_stride + t * depth, depth, packed + (p * columns + k) * features, features,
                                 out + p * out_stride + t * columns + k, columns);
            each_tile(start, count, [&](long t, long item, long row, long column) {
                float* to = y + item * image.height * image.width * image.features_out;
                write_tile(out + t * columns, out_stride, image, row, column, bias, sizes[5], sizes[6], to);
            });
        }
    });
}

// The mean and the variance of each feature of x [rows, features]: moments [2, features].
int unet_moments(const float* x, long rows, long features, float* moments, long threads) try {
    using unet::STATISTIC_ROWS;
    const long blocks = (rows + STATISTIC_ROWS - 1) / STATISTIC_ROWS;
    std::vector<double> sums(2 * features);
    std::vector<float> parts(blocks * 2 * features);
    const Outcome outcome = parallel(blocks, threads, [&](auto next) {
        for (long block; (block = next()) < blocks;) {
            const long start = block * STATISTIC_ROWS, count = std::min(STATISTIC_ROWS, rows - start);
            float* part = parts.data() + block * 2 * features;
            for (long c = 0; c < features; c += LANES) {
                const float* from = x + start * features + c;
                const long lanes = features - c;
                Floats sum{}, squares{};
                for (long r = 0; r < count; r++) sum += first(from + r * features, lanes);
                const Floats mean = sum * (1.0f / count);
                for (long r = 0; r < count; r++) {
                    const Floats distance = first(from + r * features, lanes) - mean;
                    squares += distance * distance;
                }
                store_first(mean, part + c, lanes);
                store_first(squares, part + features + c, lanes);
            }
        }
    });
    // Chan, Golub and LeVeque's sum: squares within the blocks plus squares of the blocks' means.
    for (long block = 0; block < blocks; block++)
        for (long c = 0; c < features; c++)
            sums[c] +=
                double(parts[block * 2 * features + c]) * std::min(STATISTIC_ROWS, rows - block * STATISTIC_ROWS);
    for (long block = 0; block < blocks; block++)
        for (long c = 0; c < features; c++) {
            const double distance = parts[block * 2 * features + c] - sums[c] / rows;
            sums[features + c] += parts[(block * 2 + 1) * features + c] +
                                  distance * distance * std::min(STATISTIC_ROWS, rows - block * STATISTIC_ROWS);
        }
    for (long i = 0; i < 2 * features; i++) moments[i] = static_cast<float>(sums[i] / rows);
    return outcome;
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}

// y = the activation of (x - means) * scales + biases. x and y are [rows, features], the table is [3, features]. The
// activations have the numbers of unet_ops.py; `alpha` is ELU's.
int unet_normalise(const float* x, const float* table, long rows, long features, long activation, float alpha, float* y,
                   long threads) {
    using unet::STATISTIC_ROWS;
    const long blocks = (rows + STATISTIC_ROWS - 1) / STATISTIC_ROWS;
    return parallel(blocks, threads, [&](auto next) {
        for (long block; (block = next()) < blocks;) {
            const long stop = std::min((block + 1) * STATISTIC_ROWS, rows);
            for (long r = block * STATISTIC_ROWS; r < stop; r++)
                for (long c = 0; c < features; c += LANES) {
                    const long lanes = features - c;
                    const auto of = [&](long row) { return first(table + row * features + c, lanes); };
                    const Floats value = (first(x + r * features + c, lanes) - of(0)) * of(1) + of(2);
                    store_first(unet::activated(value, activation, alpha), y + r * features + c, lanes);
                }
        }
    });
}

// y [items, rows, features] = weights [rows, depth] times each of x [items, depth, features], or y plus that. With a
// table [2, features] of scales and biases, the products are first scaled, biased and passed through ReLU.
int unet_over_bins(const float* x, const float* weights, const float* table, float* y, const long* sizes,
                   long threads) {
    using namespace unet;
    const long items = sizes[0], rows = sizes[1], depth = sizes[2], features = sizes[3];
    const bool adds = sizes[4];
    const long panels = multiple_of(WIDTH, features) / WIDTH, last_row = rows / HEIGHT * HEIGHT;
    return parallel(items * panels, threads, [&](auto next) {
        Buffer<float> panel(depth * WIDTH), out(HEIGHT * WIDTH), end(HEIGHT * depth);
        std::copy(weights + last_row * depth, weights + rows * depth, static_cast<float*>(end));
        for (long number; (number = next()) < items * panels;) {
            const long start = number % panels * WIDTH, lanes = features - start;
            const float* from = x + number / panels * depth * features + start;
            for (long k = 0; k < depth; k++)
                for (long lane = 0; lane < WIDTH; lane += LANES)
                    store(first(from + k * features + lane, lanes - lane), panel + k * WIDTH + lane);
            for (long r = 0; r < rows; r += HEIGHT) {
                multiply(r < last_row ? weights + r * depth : end, depth, panel, depth, out, WIDTH);
                for (long i = 0; i < std::min(HEIGHT, rows - r); i++)
                    for (long lane = 0; lane < std::min(WIDTH, lanes); lane += LANES) {
                        float* to = y + (number / panels * rows + r + i) * features + start + lane;
                        Floats value = at(out + i * WIDTH + lane);
                        if (table)
                            value = at_least(0.0f, value * first(table + start + lane, lanes - lane) +
                                                       first(table + features + start + lane, lanes - lane));
                        store_first(adds ? value + first(to, lanes - lane) : value, to, lanes - lane);
                    }
            }
        }
    });
}
}
