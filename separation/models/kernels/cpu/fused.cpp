// The RoFormers' transformers, band splits and mask estimators on the CPU. See native.py.
//
// This file is compiled once for each kind of CPU, with the header of that kind. Matrix products take float32 or
// bfloat16 and accumulate in float32; those of a transformer's linear layers can take integers instead and accumulate
// in int32. Everything else is float32. Each row of an output is computed independently of the others, so neither the
// batch size nor the number of threads changes the result.
#include KIND_HEADER

#include <chrono>
#include <type_traits>

#include "bands.h"
#include "layers.h"
#include "lstm.h"

#include "branches.h"
#include "demucs.h"
#include "unet.h"

namespace {

enum Precision : long { FP32 = 0, BF16 = 1, INT8 = 2 };

constexpr bool HAS_BF16 = !std::is_void_v<Kind::Bf16>, HAS_INT8 = !std::is_void_v<Kind::Int8>;
using Bf16OrFp32 = std::conditional_t<HAS_BF16, Kind::Bf16, Kind::Fp32>;

// Calls `run(kernel, is_scaled)` with an object of the kernel's type.
template <class Run>
auto with_kernel(long precision, Run run) {
    if constexpr (HAS_INT8)
        if (precision == INT8) return run(Kind::Int8(), std::true_type());
    if constexpr (HAS_BF16)
        if (precision == BF16) return run(Kind::Bf16(), std::false_type());
    return run(Kind::Fp32(), std::false_type());
}

// The same for what has no integer kernel: INT8 stands for the precision of everything else then.
template <class Run>
auto with_float_kernel(long precision, Run run) {
    return precision == FP32 ? run(Kind::Fp32()) : run(Bf16OrFp32());
}

// Rounds a column of weights [depth] to integers. Returns their scale.
template <class Kernel>
float round_weights(const float* weights, long depth, typename Kernel::Weight* to, int32_t& start) {
    float highest = 1e-30f;
    for (long k = 0; k < depth; k++) highest = std::max(highest, std::abs(weights[k]));
    const float scale = highest / Kernel::LIMIT;
    long sum = 0;
    for (long k = 0; k < depth; k++) {
        const long whole = std::lrint(weights[k] / scale);
        to[k] = static_cast<typename Kernel::Weight>(whole);
        sum += whole;
    }
    start = static_cast<int32_t>(-Kernel::ZERO * sum);
    return scale;
}

// Runs work that may run out of memory.
template <class Work>
Outcome guarded(Work work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
}

}  // namespace

extern "C" {

// Whether this process may use the instructions. The system or a virtual machine can forbid them.
int usable() { return Kind::usable(); }

// The largest magnitude of a value in INT8, or 0 if the kind has no integer kernel.
int integer_limit() {
    const auto limit = [](auto kind) -> int {  // generic, since otherwise a kind without the kernel does not compile
        if constexpr (HAS_INT8) return decltype(kind)::Int8::LIMIT;
        return 0;
    };
    return limit(Kind{});
}

// The size of packed weights [columns, depth].
long packed_bytes(long columns, long depth, long precision) {
    return with_kernel(precision, [&](auto kernel, auto) -> long {
        using Kernel = decltype(kernel);
        return multiple_of(PANEL, columns) * packed_depth<Kernel>(depth) * sizeof(typename Kernel::Weight);
    });
}

// Packs weights [columns, depth], multiplied by gains [depth] unless null. The last panel is padded with zeros.
// Integers also get scales and starts, both padded to whole panels.
int pack(const float* weights, long columns, long depth, const float* gains, void* packed, float* scales,
         int32_t* starts, long precision, long threads) {
    return guarded([&] {
        return with_kernel(precision, [&](auto kernel, auto is_scaled) {
            using Kernel = decltype(kernel);
            using Weight = typename Kernel::Weight;
            const long blocks = multiple_of(PANEL, columns) / Kernel::COLUMNS, padded = packed_depth<Kernel>(depth);
            const long stride = multiple_of(64, depth);
            return parallel(blocks, threads, [&](auto next) {
                Buffer<Weight> rows(Kernel::COLUMNS * stride);
                Buffer<float> values(stride);
                for (long block; (block = next()) < blocks;) {
                    const long start = block * Kernel::COLUMNS,
                               count = std::clamp<long>(columns - start, 0, Kernel::COLUMNS);
                    for (long c = 0; c < count; c++) {
                        const float* from = weights + (start + c) * depth;
                        for (long k = 0; k < depth; k++) values[k] = gains ? from[k] * gains[k] : from[k];
                        Weight* to = rows + c * stride;
                        if constexpr (is_scaled)
                            scales[start + c] = round_weights<Kernel>(values, depth, to, starts[start + c]);
                        else
                            for (long k = 0; k < stride; k += LANES) store_as(at(values + k), to + k);
                    }
                    for (long c = count; is_scaled && c < Kernel::COLUMNS; c++)
                        scales[start + c] = 0, starts[start + c] = 0;
                    pack_block<Kernel>(rows, stride, count, depth, static_cast<Weight*>(packed) + start * padded);
                }
            });
        });
    });
}

// See `compute_layer`. The linear layers compute in that precision. Attention computes in bfloat16 if the kind does and
// the precision is not FP32.
int transformer_layer(float* x, long sequences, long tokens, long sequence_stride, long token_stride,
                      const Layer* layer, const float* cosines, const float* sines, long precision, long threads) {
    return guarded([&] {
        return with_kernel(precision, [&](auto kernel, auto is_scaled) {
            using Kernel = decltype(kernel);
            using AttentionKernel = std::conditional_t<is_scaled, Bf16OrFp32, Kernel>;
            return compute_layer<Kernel, AttentionKernel, is_scaled>(x, sequences, tokens, sequence_stride,
                                                                     token_stride, *layer, cosines, sines, threads);
        });
    });
}

// Multi-head attention of q [batch, queries, heads * size] over k and v [batch, keys, heads * size], of floats or
// bfloat16 values by the precision; out has the shape of q. The strides, in values, are between batch items and between
// rows: first those of q, then those of both k and v.
int attention(const void* q, const void* k, const void* v, void* out, const long* sizes, const long* strides,
              long precision, long threads) {
    const long batch = sizes[0], queries = sizes[1], keys = sizes[2], heads = sizes[3], size = sizes[4];
    const long blocks = (queries + GROUP - 1) / GROUP, count = batch * heads * blocks;
    const float ungated = 1.0f;
    return guarded([&] {
        return with_float_kernel(precision, [&](auto kernel) {
            using Kernel = decltype(kernel);
            using Row = typename Kernel::Row;
            const auto rows = [](const void* values) { return static_cast<const Row*>(values); };
            return parallel(count, threads, [&](auto next) {
                [[maybe_unused]] typename Kernel::Session session;
                Head<Kernel> head(keys, size);
                for (long item; (item = next()) < count;) {
                    const long start = item % blocks * GROUP, h = item / blocks % heads * size,
                               b = item / blocks / heads;
                    head.set_keys(rows(k) + b * strides[2] + h, rows(v) + b * strides[2] + h, strides[3]);
                    head.attend(rows(q) + b * strides[0] + start * strides[1] + h, strides[1],
                                std::min(GROUP, queries - start), &ungated, 0,
                                static_cast<Row*>(out) + (b * queries + start) * heads * size + h, heads * size);
                }
            });
        });
    });
}

// See `compute_features`.
int split_bands(const float* x, long stride, long frames, long bands, const BandNetwork* networks, float* features,
                long precision, long threads) {
    return guarded([&] {
        return with_float_kernel(precision, [&](auto kernel) {
            return compute_features<decltype(kernel)>(x, stride, frames, bands, networks, features, threads);
        });
    });
}

// See `compute_masks`.
int estimate_masks(const float* x, long frames, long bands, const BandNetwork* networks, long normed, float* masks,
                   long stride, long precision, long threads) {
    return guarded([&] {
        return with_float_kernel(precision, [&](auto kernel) {
            return compute_masks<decltype(kernel)>(x, frames, bands, networks, normed, masks, stride, threads);
        });
    });
}

// See `compute_lstm`. x holds floats if there are norms, else values of the precision, as `out` always does.
int lstm(const void* x, const float* norms, const Lstm* layer, const Sequences* sequences, void* out, long precision,
         long threads) {
    return guarded([&] {
        return with_float_kernel(precision, [&](auto kernel) {
            using Kernel = decltype(kernel);
            using Row = typename Kernel::Row;
            const auto run = [&](auto* from) {
                return compute_lstm<Kernel>(from, norms, *layer, *sequences, static_cast<Row*>(out), threads);
            };
            return norms ? run(static_cast<const float*>(x)) : run(static_cast<const Row*>(x));
        });
    });
}

// See `add_product`. y holds values of the precision.
int add_linear(float* x, const void* y, const void* weights, const float* biases, const long* sizes, long precision,
               long threads) {
    return guarded([&] {
        return with_float_kernel(precision, [&](auto kernel) {
            using Kernel = decltype(kernel);
            return add_product<Kernel>(x, static_cast<const typename Kernel::Row*>(y), weights, biases, sizes, threads);
        });
    });
}

// See `add_branches`; `counts` are rows, branches, the stride of `out` and the activation.
int add_time_branches(const float* x, const TimeBranch* branches, const TimeSizes* sizes, const long* counts,
                      float* out, long threads) {
    return guarded([&] {
        return add_branches<Kind::Fp32>(x, counts[0], branches, counts[1], *sizes, out, counts[2], counts[3], threads);
    });
}

// Operations per second of the bare instructions in that precision, on that many threads for about so long.
double operations_per_second(long precision, long threads, double seconds) {
    return with_kernel(precision, [&](auto kernel, auto) {
        using Clock = std::chrono::steady_clock;
        std::atomic<long> operations{0};
        const auto started = Clock::now();
        const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - started).count(); };
        parallel(threads, threads, [&](auto next) {
            while (next() < threads)
                while (elapsed() < seconds) operations += decltype(kernel)::operations(10000);
        });
        return operations / elapsed();
    });
}
}
