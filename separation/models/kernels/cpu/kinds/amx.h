// x86-64 with AMX, such as Xeon servers since Sapphire Rapids. A tile holds 16 rows of 64 bytes; one instruction adds
// the product of two tiles to 16 x 16 sums.
#pragma once

#include "../instructions.h"

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// The numbers of the tiles are part of the instructions, so these must be macros.
#if defined(__AMX_TILE__)

#define TILES_CONFIGURE(config) _tile_loadconfig(&(config))
#define TILES_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_ADD_BF16(sums, a, b) _tile_dpbf16ps(sums, a, b)
#define TILE_ADD_BYTES(sums, a, b) _tile_dpbusd(sums, a, b)

#else

// The same in plain C++.
struct Tile {
    long rows, row_bytes;
    alignas(64) char bytes[16][64];
};
thread_local Tile tiles[8];

inline void configure_tiles(const TileConfig& config) {
    for (int t = 0; t < 8; t++) {
        tiles[t].rows = config.rows[t], tiles[t].row_bytes = config.row_bytes[t];
        std::memset(tiles[t].bytes, 0, sizeof tiles[t].bytes);
    }
}

inline void load_tile(Tile& tile, const void* from, long stride) {
    std::memset(tile.bytes, 0, sizeof tile.bytes);
    for (long r = 0; r < tile.rows; r++)
        std::memcpy(tile.bytes[r], static_cast<const char*>(from) + r * stride, tile.row_bytes);
}

inline void store_tile(const Tile& tile, void* to, long stride) {
    for (long r = 0; r < tile.rows; r++)
        std::memcpy(static_cast<char*>(to) + r * stride, tile.bytes[r], tile.row_bytes);
}

inline int32_t widened(uint8_t byte) { return byte; }
inline int32_t widened(int8_t byte) { return byte; }

// sums[r, c] += the sum over k and u of a[r, k, u] times b[k, c, u], each with UNIT values in four bytes
template <class Sum, class A, class B>
void add_products(Tile& sums, const Tile& a, const Tile& b) {
    constexpr long UNIT = 4 / sizeof(A);
    A left[16][16][UNIT];
    B right[16][16][UNIT];
    Sum results[16][16];
    std::memcpy(left, a.bytes, sizeof left);
    std::memcpy(right, b.bytes, sizeof right);
    std::memcpy(results, sums.bytes, sizeof results);
    for (long r = 0; r < sums.rows; r++)
        for (long k = 0; k < b.rows; k++)
            for (long u = 0; u < UNIT; u++) {
                const Sum value = widened(left[r][k][u]);
                for (long c = 0; c < 16; c++) results[r][c] += value * widened(right[k][c][u]);
            }
    std::memcpy(sums.bytes, results, sizeof results);
}

#define TILES_CONFIGURE(config) configure_tiles(config)
#define TILES_RELEASE() ((void)0)
#define TILE_ZERO(tile) std::memset(tiles[tile].bytes, 0, sizeof tiles[tile].bytes)
#define TILE_LOAD(tile, from, stride) load_tile(tiles[tile], from, stride)
#define TILE_STORE(tile, to, stride) store_tile(tiles[tile], to, stride)
#define TILE_ADD_BF16(sums, a, b) add_products<float, bf16, bf16>(tiles[sums], tiles[a], tiles[b])
#define TILE_ADD_BYTES(sums, a, b) add_products<int32_t, uint8_t, int8_t>(tiles[sums], tiles[a], tiles[b])

#endif

thread_local long configured_rows = 0;  // of the thread's tiles; 0 if they are not in use

// Tiles 0 to 3 hold the sums, 4 and 5 rows, 6 and 7 columns: the first 16 and the others.
inline void configure(long rows) {
    if (rows == configured_rows) return;
    TileConfig config = {};
    config.palette = 1;
    const long upper = std::min(rows, 16L), lower = rows - upper;
    const long counts[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int t = 0; t < 8; t++) config.rows[t] = counts[t], config.row_bytes[t] = counts[t] ? 64 : 0;
    hide(config);  // all of it must be in memory: g++ takes the instruction to read only the first bytes
    TILES_CONFIGURE(config);
    configured_rows = rows;
}

struct TileSession {
    TileSession() = default;
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
    ~TileSession() {
        if (configured_rows) TILES_RELEASE();
        configured_rows = 0;
    }
};

// A kernel of 32 rows and 32 columns: `Numbers` says of which type.
template <class Numbers>
struct TileKernel : Numbers {
    using typename Numbers::Row;
    using typename Numbers::Sum;
    using typename Numbers::Weight;
    using Session = TileSession;
    static constexpr long ROWS = 32, COLUMNS = 32, UNIT = 4 / sizeof(Weight), DEPTH = 64 / sizeof(Weight);

    static void multiply(const Row* a, long stride, long rows, const Weight* weights, long depth, Sum* sums) {
        configure(rows);
        asm volatile("" : : : "memory");  // the operands must be in memory now
        if (rows > 16)
            multiply_rows<true>(a, stride, weights, depth, sums);
        else
            multiply_rows<false>(a, stride, weights, depth, sums);
    }

    static long operations(long rounds) {
        alignas(64) static const char operands[4][1024] = {};
        TileSession session;
        configure(ROWS);
        for (long round = 0; round < rounds; round++) {
            TILE_LOAD(4, operands[0], 64);
            TILE_LOAD(6, operands[1], 64);
            TILE_LOAD(7, operands[2], 64);
            TILE_LOAD(5, operands[3], 64);
            add_all<true>();
        }
        return rounds * ROWS * COLUMNS * DEPTH * 2;
    }

 private:
    template <bool BOTH>
    static void add_all() {
        if constexpr (sizeof(Weight) == 2) {
            TILE_ADD_BF16(0, 4, 6);
            TILE_ADD_BF16(1, 4, 7);
            if constexpr (BOTH) {
                TILE_ADD_BF16(2, 5, 6);
                TILE_ADD_BF16(3, 5, 7);
            }
        } else {
            TILE_ADD_BYTES(0, 4, 6);
            TILE_ADD_BYTES(1, 4, 7);
            if constexpr (BOTH) {
                TILE_ADD_BYTES(2, 5, 6);
                TILE_ADD_BYTES(3, 5, 7);
            }
        }
    }

    // With the lower 16 rows only if there are BOTH.
    template <bool BOTH>
    static void multiply_rows(const Row* a, long stride, const Weight* weights, long depth, Sum* sums) {
        constexpr long PACKED = COLUMNS * 4;  // bytes from one row of a tile of weights to the next
        const long bytes = stride * sizeof(Row);
        TILE_ZERO(0);
        TILE_ZERO(1);
        if constexpr (BOTH) {
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
        for (long k = 0; k < depth; k += DEPTH) {
            const Weight* block = weights + k * COLUMNS;
            TILE_LOAD(4, a + k, bytes);
            TILE_LOAD(6, block, PACKED);
            TILE_LOAD(7, block + 16 * UNIT, PACKED);
            if constexpr (BOTH) TILE_LOAD(5, a + 16 * stride + k, bytes);
            add_all<BOTH>();
        }
        TILE_STORE(0, sums, PACKED);
        TILE_STORE(1, sums + 16, PACKED);
        if constexpr (BOTH) {
            TILE_STORE(2, sums + 16 * COLUMNS, PACKED);
            TILE_STORE(3, sums + 16 * COLUMNS + 16, PACKED);
        }
    }
};

struct TileBf16 {
    using Row = bf16;
    using Weight = bf16;
    using Sum = float;
};

struct TileBytes {
    using Row = uint8_t;
    using Weight = int8_t;
    using Sum = int32_t;
    static constexpr int ZERO = 128, LIMIT = 127;
};

struct Kind {
    using Fp32 = VectorKernel<FloatInstructions, 12, 32 / LANES>;
    using Bf16 = TileKernel<TileBf16>;
    using Int8 = TileKernel<TileBytes>;

    // The system lets a process use the tiles only after it has asked.
    static bool usable() {
#if defined(__AMX_TILE__)
        constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
        return true;
#endif
    }
};

}  // namespace
