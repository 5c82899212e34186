// Calls a library of kernels on another CPU than that of the tests. Its input and output are arrays without headers.
//
//   call_kernels limit
//   call_kernels layer PRECISION DIM HEADS HEAD_SIZE HIDDEN SEQUENCES TOKENS
//   call_kernels attention PRECISION BATCH QUERIES KEYS HEADS SIZE
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

struct Linear {
    const void* packed;
    const float *bias, *scales;
    const int32_t* starts;
};

struct Layer {
    long dim, heads, head_size, hidden;
    Linear qkv_gates, out, up, down;
    const float* norm_gains;
};

extern "C" {
int usable();
int integer_limit();
long packed_bytes(long columns, long depth, long precision);
int pack(const float* weights, long columns, long depth, const float* gains, void* packed, float* scales,
         int32_t* starts, long precision, long threads);
int transformer_layer(float* x, long sequences, long tokens, long sequence_stride, long token_stride,
                      const Layer* layer, const float* cosines, const float* sines, long precision, long threads);
int attention(const void* q, const void* k, const void* v, void* out, const long* sizes, const long* strides,
              long precision, long threads);
}

namespace {

constexpr long PANEL = 32, THREADS = 2, BF16 = 1;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

long padded(long columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

// Memory aligned as PyTorch does it, until the program ends.
template <class T>
T* allocate(long count) {
    const long bytes = (count * sizeof(T) + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) fail("out of memory");
    return static_cast<T*>(memory);
}

template <class T = float>
T* read(long count) {
    T* values = allocate<T>(count);
    if (std::fread(values, sizeof(T), count, stdin) != static_cast<size_t>(count)) fail("the input is too short");
    return values;
}

void write(const void* values, long bytes) {
    if (std::fwrite(values, 1, bytes, stdout) != static_cast<size_t>(bytes)) fail("cannot write the output");
}

// Reads the norm's gains [depth], if any, the weights [columns, depth] of each part, and the bias of all of them.
Linear read_linear(std::initializer_list<long> parts, long depth, bool has_gains, long precision) {
    const float* gains = has_gains ? read(depth) : nullptr;
    long bytes = 0, columns = 0;
    for (long part : parts) bytes += packed_bytes(part, depth, precision), columns += padded(part);
    char* packed = allocate<char>(bytes);
    float* scales = allocate<float>(columns);
    int32_t* starts = allocate<int32_t>(columns);
    long byte = 0, column = 0;
    for (long part : parts) {
        if (pack(read(part * depth), part, depth, gains, packed + byte, scales + column, starts + column, precision,
                 THREADS))
            fail("pack failed");
        byte += packed_bytes(part, depth, precision), column += padded(part);
    }
    return {packed, read(columns), scales, starts};
}

void call_layer(const std::vector<long>& sizes) {
    const long precision = sizes[0], dim = sizes[1], heads = sizes[2], head_size = sizes[3], hidden = sizes[4],
               sequences = sizes[5], tokens = sizes[6], inner = heads * head_size;
    Layer layer = {dim, heads, head_size, hidden, {}, {}, {}, {}, nullptr};
    layer.qkv_gates = read_linear({3 * inner, heads}, dim, true, precision);
    layer.out = read_linear({dim}, inner, false, precision);
    layer.up = read_linear({hidden}, dim, true, precision);
    layer.down = read_linear({dim}, hidden, false, precision);
    const float *cosines = read(tokens * head_size), *sines = read(tokens * head_size);
    float* x = read(sequences * tokens * dim);
    if (transformer_layer(x, sequences, tokens, tokens * dim, dim, &layer, cosines, sines, precision, THREADS))
        fail("transformer_layer failed");
    write(x, sequences * tokens * dim * sizeof(float));
}

void call_attention(const std::vector<long>& sizes) {
    const long precision = sizes[0], width = sizes[4] * sizes[5], queries = sizes[2] * width, keys = sizes[3] * width,
               value_bytes = precision == BF16 ? 2 : 4;
    const long strides[] = {queries, width, keys, width};
    const char* q = read<char>(sizes[1] * queries * value_bytes);
    const char* k = read<char>(sizes[1] * keys * value_bytes);
    const char* v = read<char>(sizes[1] * keys * value_bytes);
    char* out = allocate<char>(sizes[1] * queries * value_bytes);
    if (attention(q, k, v, out, &sizes[1], strides, precision, THREADS)) fail("attention failed");
    write(out, sizes[1] * queries * value_bytes);
}

}  // namespace

int main(int count, char** words) {
    const std::string call = count > 1 ? words[1] : "";
    std::vector<long> sizes;
    for (int i = 2; i < count; i++) sizes.push_back(std::stol(words[i]));
    if (!usable()) fail("the CPU cannot run these kernels");
    if (call == "limit" && sizes.empty())
        std::printf("%d\n", integer_limit());
    else if (call == "layer" && sizes.size() == 7)
        call_layer(sizes);
    else if (call == "attention" && sizes.size() == 6)
        call_attention(sizes);
    else
        fail("unknown call, or wrong sizes");
}
