// The networks of the bands, before and after the transformers.
#pragma once

#include "rows.h"

namespace {

// The network of a band: a norm and `layers` linear layers, sizes[0] -> sizes[1] -> ...
struct BandNetwork {
    long layers;
    const long* sizes;
    const void* const* weights;
    const float* const* biases;
    long first;  // the index of the band's first value in a row of the spectrogram or the mask
};

template <class Kernel>
Weights<Kernel> weights_of(const BandNetwork& network, long layer) {
    return {static_cast<const typename Kernel::Weight*>(network.weights[layer])};
}

// Applies the norm and linear layer of each band to x, rows of `stride` floats. Writes features [frames, bands, dim].
template <class Kernel>
Outcome compute_features(const float* x, long stride, long frames, long bands, const BandNetwork* networks,
                         float* features, long threads) {
    long widest = 0;
    for (long band = 0; band < bands; band++) widest = std::max(widest, multiple_of(64, networks[band].sizes[0]));

    return parallel(bands, threads, [&](auto next) {
        [[maybe_unused]] typename Kernel::Session session;
        Buffer<typename Kernel::Row> normed(BLOCK * widest);
        for (long band; (band = next()) < bands;) {
            const BandNetwork& network = networks[band];
            const long width = network.sizes[0], dim = network.sizes[1];
            const float* biases = network.biases[0];
            for (long start = 0; start < frames; start += BLOCK) {
                const long block = std::min(BLOCK, frames - start);
                for (long row = 0; row < block; row++) {
                    const float* from = x + (start + row) * stride + network.first;
                    round_row(from, width, norm_factor(from, width), normed + row * widest);
                }
                product<Kernel>(Rows<Kernel>{normed, widest}, block, weights_of<Kernel>(network, 0), width, dim,
                                [&](long row, long column, auto sums) {
                                    float* to = features + ((start + row) * bands + band) * dim + column;
                                    sums.plus(sums.at(biases + column)).store_first(to, dim - column);
                                });
            }
        }
    });
}

// Applies the network of each band to x [frames, bands, dim], with tanh between layers and a gated linear unit at the
// end. Writes masks, rows of `stride` floats. If `normed` is zero, the networks have no norm.
template <class Kernel>
Outcome compute_masks(const float* x, long frames, long bands, const BandNetwork* networks, long normed, float* masks,
                      long stride, long threads) {
    using Row = typename Kernel::Row;
    long widest = 0;
    for (long band = 0; band < bands; band++)
        for (long layer = 0; layer <= networks[band].layers; layer++)
            widest = std::max(widest, multiple_of(64, networks[band].sizes[layer]));
    const long row_stride = widest + PANEL, blocks = (frames + BLOCK - 1) / BLOCK;

    return parallel(bands * blocks, threads, [&](auto next) {
        [[maybe_unused]] typename Kernel::Session session;
        Buffer<Row> even(BLOCK * row_stride), odd(BLOCK * row_stride);
        Buffer<float> last(BLOCK * row_stride);
        for (long item; (item = next()) < bands * blocks;) {
            const long band = item / blocks, start = item % blocks * BLOCK, block = std::min(BLOCK, frames - start);
            const BandNetwork& network = networks[band];
            const long dim = network.sizes[0], width = network.sizes[network.layers] / 2;
            for (long row = 0; row < block; row++) {
                const float* from = x + ((start + row) * bands + band) * dim;
                round_row(from, dim, normed ? norm_factor(from, dim) : 1.0f, even + row * row_stride);
            }
            for (long layer = 0; layer < network.layers; layer++) {
                const Row* from = layer % 2 ? odd : even;
                Row* to = layer % 2 ? even : odd;
                const float* biases = network.biases[layer];
                const bool is_last = layer + 1 == network.layers;
                product<Kernel>(Rows<Kernel>{from, row_stride}, block, weights_of<Kernel>(network, layer),
                                network.sizes[layer], network.sizes[layer + 1], [&](long row, long column, auto sums) {
                                    sums = sums.plus(sums.at(biases + column));
                                    if (is_last)
                                        sums.store(last + row * row_stride + column);
                                    else
                                        sums.through(tanh_of).store(to + row * row_stride + column);
                                });
            }
            for (long row = 0; row < block; row++)
                for (long column = 0; column < width; column += LANES) {
                    const float* value = last + row * row_stride + column;
                    const Floats gated = first(value, width - column) * sigmoid(first(value + width, width - column));
                    store_first(gated, masks + (start + row) * stride + network.first + column, width - column);
                }
        }
    });
}

}  // namespace
