// The operators of plain.py for CPUs. Built by cpu.py, called through ctypes with one array of 64-bit integers each.
//
// What makes it fast: the query heads of a group lie side by side in vector lanes, so that one key is read once for
// all of them and no sum across lanes is needed; key/value blocks are read where they lie; scores are pooled as
// they come.
//
// Nothing that is added up depends on the number of threads, so neither does any result.
//
// Shape letters: B rows, S queries, N keys, G key/value heads, R query heads a group, L lanes (R rounded up), D head
// size, P head size rounded up to whole vectors, M blocks, T selected blocks.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int NATIVE = 16, SUMS = 16;
#elif defined(__AVX__)
constexpr int NATIVE = 8, SUMS = 8;
#elif defined(__aarch64__)
constexpr int NATIVE = 4, SUMS = 16;
#else
constexpr int NATIVE = 4, SUMS = 8;
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int TILE = 64;         // compressed keys per step
constexpr int QUERIES = 8;       // neighbouring queries of a prefill that share what is in cache
constexpr int MOST_QUERIES = 16;  // the same, where queries are many
constexpr int SPLIT_KEYS = 256;  // compressed keys per work item of a decode step
constexpr int SPLIT_TOKENS = 512;  // tokens per work item of a decode step
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

// ------------------------------------------------------------------------------------------------------- vectors

template <int W>
struct Vector {
    typedef float F __attribute__((vector_size(W * 4)));
    typedef int32_t I __attribute__((vector_size(W * 4)));
    typedef float Unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
};

template <int W>
INLINE typename Vector<W>::F load(const float* from) {
    return *reinterpret_cast<const typename Vector<W>::Unaligned*>(from);
}

template <int W>
INLINE void store(float* to, typename Vector<W>::F value) {
    *reinterpret_cast<typename Vector<W>::Unaligned*>(to) = value;
}

// 2^y to about 1e-7 relative; 0 below 2^-126 (-inf included), inf from 2^128.
template <int W>
INLINE typename Vector<W>::F exp2v(typename Vector<W>::F y) {
    typedef typename Vector<W>::F F;
    typedef typename Vector<W>::I I;
    const F zero = {};
    const F low = zero - 126.0f, high = zero + 128.5f;
    F x = y < low ? low : y;
    x = x > high ? high : x;
    const F magic = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    F shifted = x + magic;
    I whole;
    std::memcpy(&whole, &shifted, sizeof whole);
    whole -= 0x4B400000;
    F r = x - (shifted - magic);
    F p = r * 1.53533612e-4f + 1.33988744e-3f;
    p = p * r + 9.61843736e-3f;
    p = p * r + 5.55033247e-2f;
    p = p * r + 2.40226479e-1f;
    p = p * r + 6.93147203e-1f;
    p = p * r + 1.0f;
    I bits = (whole + 126) << 23;  // half of the factor, so that 2^128 does not need an exponent that does not exist
    F factor;
    std::memcpy(&factor, &bits, sizeof factor);
    F result = p * factor * 2.0f;
    return y < low ? zero : result;
}

template <int W>
INLINE float sum(typename Vector<W>::F v) {
    if constexpr (W == 2) {
        return v[0] + v[1];
    } else {
        typename Vector<W / 2>::F half[2];
        std::memcpy(half, &v, sizeof half);
        return sum<W / 2>(half[0] + half[1]);
    }
}

// ---------------------------------------------------------------------------------------------------------- types

int64_t bytes_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

INLINE float from_bfloat16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

INLINE float from_float16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
    // The factor 2^112 moves the exponent's bias, subnormals included; inf and NaN have an exponent of their own.
    const float value = from_bits(rest << 13) * 5.192296858534828e33f;
    const uint32_t special = rest >= 0x7C00 ? 0x7F800000u : 0u;
    return from_bits((to_bits(value) | special) | sign);
}

INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = to_bits(value);
    if (value != value) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);  // round half to even
}

void widen_row(const char* from, int64_t type, int64_t count, float* to) {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
    if (type == FLOAT32) std::memcpy(to, from, count * 4);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(half[i]);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = from_float16(half[i]);
}

// What is written is float32, or bfloat16 where the tensors are; float16 is rounded by torch.
void narrow_row(const float* from, int64_t type, int64_t count, float factor, char* to) {
    if (type == BFLOAT16)
        for (int64_t i = 0; i < count; ++i) reinterpret_cast<uint16_t*>(to)[i] = to_bfloat16(from[i] * factor);
    else
        for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(to)[i] = from[i] * factor;
}

int64_t written_bytes(int64_t type) { return type == BFLOAT16 ? 2 : 4; }

// --------------------------------------------------------------------------------------------------------- memory

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory of one thread, kept between calls: fresh pages would cost more than a decode step's arithmetic.
class Arena {
  public:
    // Room for `count` floats, aligned to a cache line. Everything taken is void after the next `reset`.
    float* take(int64_t count) {
        count = round_up(count, 16);
        if (used_ + count > size_) {
            const int64_t want = std::max(count, 2 * size_);
            chunks_.emplace_back(want + 16);
            const uintptr_t raw = reinterpret_cast<uintptr_t>(chunks_.back().data());
            at_ = reinterpret_cast<float*>((raw + 63) & ~uintptr_t(63));
            size_ = want;
            used_ = 0;
        }
        used_ += count;
        return at_ + used_ - count;
    }
    void reset() {
        if (chunks_.size() > 1) {  // one chunk as large as the last replaces them all
            chunks_.erase(chunks_.begin(), chunks_.end() - 1);
        }
        used_ = 0;
    }

  private:
    std::vector<std::vector<float>> chunks_;
    float* at_ = nullptr;
    int64_t size_ = 0, used_ = 0;
};

thread_local Arena caller;  // what all threads of one call share
thread_local Arena own;     // what one thread needs for itself

struct Rows {
    const float* at;
    int64_t stride;
};

// Rows as float32, where they lie if possible: whole vectors, and not a multiple of 4096 bytes apart (such rows evict
// each other from the first-level cache).
INLINE Rows fetch(const char* from, int64_t apart, int64_t type, int n, int D, int M, float* scratch) {
    if (type == FLOAT32 && D == M && (apart & 4095) != 0) return {reinterpret_cast<const float*>(from), apart / 4};
    for (int j = 0; j < n; ++j) {
        widen_row(from + j * apart, type, D, scratch + int64_t(j) * M);
        for (int d = D; d < M; ++d) scratch[int64_t(j) * M + d] = 0.0f;
    }
    return {scratch, M};
}

// Work items that the threads of a team take one by one; `run` returns when all are done, by whomever. Where other
// programs hold the processors a waiting thread gives way, which OpenMP's own barrier does not (it spins for
// milliseconds while the thread waited for cannot run).
class Phase {
  public:
    template <class Function>
    void run(int64_t count, Function&& function) {
        for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < count;) {
            function(item);
            done_.fetch_add(1, std::memory_order_release);
        }
        for (int tries = 0; done_.load(std::memory_order_acquire) < count; ++tries)
            if (tries > 4096) std::this_thread::yield();
    }

  private:
    std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int64_t> done_{0};  // not in the line that every item writes to
};

// Asks for the lines of the rows needed next, a few at a time between the arithmetic.
struct Ahead {
    const char* row = nullptr;
    int64_t apart = 0, bytes = 0, left = 0, line = 0;

    INLINE void tick(int lines) {
        while (lines-- > 0 && left > 0) {
            __builtin_prefetch(row + line);
            line += 64;
            if (line >= bytes) {
                line = 0;
                row += apart;
                --left;
            }
        }
    }
};

// -------------------------------------------------------------------------------------------------------- kernels

template <int L, int HD>
struct Kernel {
    static constexpr int W = L < NATIVE ? L : NATIVE;
    static constexpr int NV = L / W;
    static constexpr int KEYS = SUMS / NV >= 8 ? 8 : (SUMS / NV >= 4 ? 4 : (SUMS / NV >= 2 ? 2 : 1));
    typedef typename Vector<W>::F F;

    // Logits (times log2 e: the query carries all factors) of `KB` keys for every lane.
    template <int KB>
    static INLINE void logits_of(const float* key, int64_t apart, const float* query, int D, float* out) {
        F acc[KB][NV] = {};
        const int size = HD ? HD : D;
#pragma GCC unroll 4
        for (int d = 0; d < size; ++d) {
            F q[NV];
            for (int v = 0; v < NV; ++v) q[v] = load<W>(query + d * L + v * W);
            for (int j = 0; j < KB; ++j) {
                const float k = key[j * apart + d];
                for (int v = 0; v < NV; ++v) acc[j][v] += q[v] * k;
            }
        }
        for (int j = 0; j < KB; ++j)
            for (int v = 0; v < NV; ++v) store<W>(out + j * L + v * W, acc[j][v]);
    }

    static __attribute__((noinline)) void logits(
        Rows key, int n, const float* query, int D, float* out, Ahead& ahead
    ) {
        int j = 0;
        const int lines = KEYS * int((ahead.bytes + 63) / 64);
        for (; j + KEYS <= n; j += KEYS) {
            ahead.tick(lines);
            logits_of<KEYS>(key.at + j * key.stride, key.stride, query, D, out + j * L);
        }
        if constexpr (KEYS > 4)
            for (; j + 4 <= n; j += 4) logits_of<4>(key.at + j * key.stride, key.stride, query, D, out + j * L);
        for (; j < n; ++j) logits_of<1>(key.at + j * key.stride, key.stride, query, D, out + j * L);
    }

    // Running maximum `m` and sum `l` over keys, the logits replaced by their weights; `factor` is for what was
    // summed before.
    static __attribute__((noinline)) void softmax(float* s, int n, float* m, float* l, float* factor) {
        for (int v = 0; v < NV; ++v) {
            F top = load<W>(m + v * W), before = top;
            for (int j = 0; j < n; ++j) {
                const F x = load<W>(s + j * L + v * W);
                top = x > top ? x : top;
            }
            store<W>(m + v * W, top);
            const F zero = {};
            const F base = top == -INF ? zero : top;
            const F scale = exp2v<W>(before - base);
            F total = load<W>(l + v * W) * scale;
            for (int j = 0; j < n; ++j) {
                const F p = exp2v<W>(load<W>(s + j * L + v * W) - base);
                total += p;
                store<W>(s + j * L + v * W, p);
            }
            store<W>(l + v * W, total);
            store<W>(factor + v * W, scale);
        }
    }

    // Adds weights times values to `HB` heads' outputs, `VB` vectors of columns.
    template <int HB, int VB>
    static INLINE void values_of(
        const float* weight, Rows value, int n, const float* factor, float* out, int M, Ahead& ahead, int lines
    ) {
        typedef typename Vector<NATIVE>::F N;
        N acc[HB][VB];
        for (int h = 0; h < HB; ++h)
            for (int c = 0; c < VB; ++c) acc[h][c] = load<NATIVE>(out + h * M + c * NATIVE) * factor[h];
        for (int j = 0; j < n; ++j) {
            N x[VB];
            for (int c = 0; c < VB; ++c) x[c] = load<NATIVE>(value.at + j * value.stride + c * NATIVE);
            for (int h = 0; h < HB; ++h) {
                const float p = weight[j * L + h];
                for (int c = 0; c < VB; ++c) acc[h][c] += x[c] * p;
            }
            ahead.tick(lines);
        }
        for (int h = 0; h < HB; ++h)
            for (int c = 0; c < VB; ++c) store<NATIVE>(out + h * M + c * NATIVE, acc[h][c]);
    }

    template <int VB>
    static INLINE void values_columns(
        const float* weight, Rows value, int n, const float* factor, float* out, int R, int M, Ahead& ahead, int lines
    ) {
        int h = 0;
        for (; h + 4 <= R; h += 4)
            values_of<4, VB>(weight + h, value, n, factor + h, out + int64_t(h) * M, M, ahead, lines);
        for (; h < R; ++h)
            values_of<1, VB>(weight + h, value, n, factor + h, out + int64_t(h) * M, M, ahead, lines);
    }

    static void attend(
        Rows key, Rows value, int n, const float* query, float* m, float* l, float* out, float* s, int R, int D, int M,
        Ahead& key_ahead, Ahead& value_ahead
    ) {
        constexpr int VB = SUMS / 4;
        alignas(64) float factor[L];
        logits(key, n, query, D, s, key_ahead);
        softmax(s, n, m, l, factor);
        const int width = HD ? round_up(HD, NATIVE) : M;
        // Passes over the block are (heads / 4) * (columns / VB); each line of the next block is asked for once.
        const int passes = std::max(1, ((R + 3) / 4) * (width / NATIVE / VB));
        const int lines = int((value_ahead.bytes + 63) / 64 + passes - 1) / passes;
        int c = 0;
        for (; c + VB * NATIVE <= width; c += VB * NATIVE)
            values_columns<VB>(s, {value.at + c, value.stride}, n, factor, out + c, R, width, value_ahead, lines);
        for (; c < width; c += NATIVE)
            values_columns<1>(s, {value.at + c, value.stride}, n, factor, out + c, R, width, value_ahead, lines);
    }

    static void coarse(Rows key, int n, const float* query, float* m, float* l, float* s, int D, Ahead& ahead) {
        alignas(64) float factor[L];
        logits(key, n, query, D, s, ahead);
        softmax(s, n, m, l, factor);
    }

    static void fine(
        Rows key, int n, const float* query, const float* lse, float* s, float* weight, int D, Ahead& ahead
    ) {
        logits(key, n, query, D, s, ahead);
        F base[NV];
        for (int v = 0; v < NV; ++v) base[v] = load<W>(lse + v * W);
        for (int j = 0; j < n; ++j) {
            F total = {};
            for (int v = 0; v < NV; ++v) total += exp2v<W>(load<W>(s + j * L + v * W) - base[v]);
            weight[j] = sum<W>(total);
        }
    }
};

struct Kernels {
    int lanes;
    decltype(&Kernel<4, 0>::attend) attend;
    decltype(&Kernel<4, 0>::coarse) coarse;
    decltype(&Kernel<4, 0>::fine) fine;
};

template <int L>
Kernels pick_size(int D) {
    if (D == 128) return {L, &Kernel<L, 128>::attend, &Kernel<L, 128>::coarse, &Kernel<L, 128>::fine};
    if (D == 64) return {L, &Kernel<L, 64>::attend, &Kernel<L, 64>::coarse, &Kernel<L, 64>::fine};
    return {L, &Kernel<L, 0>::attend, &Kernel<L, 0>::coarse, &Kernel<L, 0>::fine};
}

Kernels pick(int R, int D) {
    if (R <= 4) return pick_size<4>(D);
    if (R <= 8) return pick_size<8>(D);
    if (R <= 16) return pick_size<16>(D);
    return pick_size<32>(D);
}

// One query's heads of a group as `[D, L]`, all factors in; lanes without a head are 0.
void transpose_query(
    const char* from, int64_t head_apart, int64_t type, int R, int L, int D, float factor, float* to
) {
    float row[256];
    for (int r = 0; r < L; ++r) {
        if (r < R) widen_row(from + r * head_apart, type, D, row);
        for (int d = 0; d < D; ++d) to[d * L + r] = r < R ? row[d] * factor : 0.0f;
    }
}

// Complete windows at or before position `at`.
int64_t windows(int64_t at, int64_t size, int64_t stride) {
    return at + 1 < size ? 0 : (at + 1 - size) / stride + 1;
}

void log_sum(const float* m, const float* l, int R, int L, float* lse) {
    // Lanes without a head add 2^-inf = 0; so does a query that sees no coarse key.
    for (int r = 0; r < L; ++r) lse[r] = r < R && l[r] > 0.0f ? m[r] + std::log2(l[r]) : INF;
    for (int r = 0; r < R; ++r)
        if (l[r] != l[r]) lse[r] = l[r];
}

void clear(float* m, float* l, int L) {
    std::fill(m, m + L, -INF);
    std::fill(l, l + L, 0.0f);
}

// Maximum over the fine keys that overlap each block.
void pool(const float* weight, int64_t count, int64_t M, int64_t step, int64_t before, float* out) {
    for (int64_t m = 0; m < M; ++m) {
        const int64_t from = std::max<int64_t>(m * step - before, 0), to = std::min(count, (m + 1) * step);
        float best = 0.0f;
        for (int64_t j = from; j < to; ++j) best = weight[j] > best ? weight[j] : best;
        out[m] = best;
    }
}

// Order of floats as order of integers; -0 equals 0.
uint32_t ordered(float value) {
    const uint32_t bits = to_bits(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// See plain.select_blocks; `order` holds M integers.
void choose(
    const float* score, int64_t M, int64_t position, int64_t wanted, int64_t init, int64_t window, int64_t block_size,
    uint32_t* order, int32_t* out
) {
    const int64_t own_block = position / block_size, end = std::min(own_block + 1, M), T = std::min(wanted, M);
    const int64_t from = std::min(init, end), to = std::min(std::max(own_block - window, from), end);  // candidates
    const int64_t need = std::max<int64_t>(T - from - (end - to), 0);
    int64_t at = 0;
    for (int64_t m = 0; m < from && at < T; ++m) out[at++] = int32_t(m);
    if (to - from <= need) {
        for (int64_t m = from; m < to; ++m) out[at++] = int32_t(m);
    } else if (need > 0) {
        for (int64_t m = from; m < to; ++m)
            order[m - from] = ordered(std::min(score[m], std::numeric_limits<float>::max()));
        std::nth_element(order, order + need - 1, order + (to - from), [](uint32_t a, uint32_t b) { return a > b; });
        const uint32_t least = order[need - 1];
        int64_t above = 0;
        for (int64_t i = 0; i < need; ++i) above += order[i] > least;
        int64_t ties = need - above;  // the lower blocks among equals
        for (int64_t m = from; m < to; ++m) {
            const uint32_t value = ordered(std::min(score[m], std::numeric_limits<float>::max()));
            if (value > least || (value == least && ties-- > 0)) out[at++] = int32_t(m);
        }
    }
    for (int64_t m = to; m < end && at < T; ++m) out[at++] = int32_t(m);
    while (at < T) out[at++] = -1;
}

// The mean of `size` rows.
void mean_row(const char* from, int64_t apart, int64_t type, int64_t size, int64_t D, char* to) {
    float total[256] = {}, row[256];
    for (int64_t t = 0; t < size; ++t) {
        const float* x = reinterpret_cast<const float*>(from + t * apart);
        if (type != FLOAT32) {
            widen_row(from + t * apart, type, D, row);
            x = row;
        }
        for (int64_t d = 0; d < D; ++d) total[d] += x[d];
    }
    narrow_row(total, type, D, 1.0f / float(size), to);
}

}  // namespace

// ------------------------------------------------------------------------------------------------------ operators
//
// Strides count elements. Each struct is what cpu.py packs, in this order.

extern "C" {

struct SelectArguments {
    int64_t threads, G, S, M, wanted, init, window, block_size;
    const float* scores;
    const int32_t* positions;
    int32_t* out;
};

void infllm_select(const SelectArguments* a) {
    const int64_t T = std::min(a->wanted, a->M), pairs = a->G * a->S;
#pragma omp parallel num_threads(int(a->threads)) if (pairs * a->M > 16384)
    {
        own.reset();
        uint32_t* order = reinterpret_cast<uint32_t*>(own.take(a->M));
#pragma omp for schedule(dynamic, 8)
        for (int64_t p = 0; p < pairs; ++p)
            choose(a->scores + p * a->M, a->M, a->positions[p % a->S], a->wanted, a->init, a->window, a->block_size,
                   order, a->out + p * T);
    }
}

struct CompressArguments {
    int64_t threads, type, B, G, D, size, stride, ratio, key_n, key_g, fine_k, fine_g, coarse_k, coarse_g;
    const char* key;
    const int32_t* bounds;
    char *fine, *coarse;
};

// Windows of all rows `[N, G, D]`; what lies between rows was set to 0.
void infllm_compress(const CompressArguments* a) {
    const int64_t bytes = bytes_of(a->type), written = written_bytes(a->type), wide = a->stride * a->ratio;
    for (int64_t b = 0; b < a->B; ++b) {
        const int64_t k0 = a->bounds[b], length = a->bounds[b + 1] - k0;
        const int64_t fine = windows(length - 1, a->size, a->stride);
        const int64_t coarse = windows(length - 1, a->size * a->ratio, wide);
        const int64_t parts = (fine + a->ratio - 1) / a->ratio, items = std::max(parts, coarse) * a->G;
#pragma omp parallel for num_threads(int(a->threads)) schedule(dynamic, 16) if (items > 64)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t g = item % a->G, c = item / a->G;
            const char* key = a->key + (k0 * a->key_n + g * a->key_g) * bytes;
            for (int64_t w = c * a->ratio; w < std::min(fine, (c + 1) * a->ratio); ++w)
                mean_row(key + w * a->stride * a->key_n * bytes, a->key_n * bytes, a->type, a->size, a->D,
                         a->fine + ((k0 / a->stride + w) * a->fine_k + g * a->fine_g) * written);
            if (c < coarse)
                mean_row(key + c * wide * a->key_n * bytes, a->key_n * bytes, a->type, a->size * a->ratio, a->D,
                         a->coarse + ((k0 / wide + c) * a->coarse_k + g * a->coarse_g) * written);
        }
    }
}

struct UpdateArguments {
    int64_t threads, type, B, G, D, size, stride, ratio;
    int64_t key_b, key_g, key_n, fine_b, fine_g, fine_k, coarse_b, coarse_g, coarse_k;
    const char* key;
    char *fine, *coarse;
    const int32_t *starts, *done, *lengths;
};

void infllm_update(const UpdateArguments* a) {
    const int64_t bytes = bytes_of(a->type), written = written_bytes(a->type);
    for (int64_t b = 0; b < a->B; ++b) {
        for (int kind = 0; kind < 2; ++kind) {
            const int64_t size = kind ? a->size * a->ratio : a->size, stride = kind ? a->stride * a->ratio : a->stride;
            const int64_t first = windows(a->done[b] - 1, size, stride);
            const int64_t last = windows(a->lengths[b] - 1, size, stride);
            const int64_t items = std::max<int64_t>(last - first, 0) * a->G;
            if (items == 0) continue;
            char* out = kind ? a->coarse + b * a->coarse_b * written : a->fine + b * a->fine_b * written;
            const int64_t out_g = kind ? a->coarse_g : a->fine_g, out_k = kind ? a->coarse_k : a->fine_k;
#pragma omp parallel for num_threads(int(a->threads)) schedule(dynamic, 16) if (items > 64)
            for (int64_t item = 0; item < items; ++item) {
                const int64_t g = item % a->G, w = first + item / a->G;
                const int64_t token = a->starts[b] + w * stride;
                mean_row(a->key + (b * a->key_b + g * a->key_g + token * a->key_n) * bytes, a->key_n * bytes, a->type,
                         size, a->D, out + (g * out_g + w * out_k) * written);
            }
        }
    }
}

struct ScoreArguments {
    int64_t threads, type, B, S, H, G, D, M, block_size, size, stride, ratio;
    int64_t query_b, query_s, query_h, fine_b, fine_g, fine_k, coarse_b, coarse_g, coarse_k;
    const char *query, *fine, *coarse;
    const int32_t *bounds_q, *bounds_k, *lengths, *positions;
    float* out;
    double scaling;
};

// All rows packed `[S, H, D]`; work items are tiles of neighbouring queries, which share the keys in cache.
void infllm_scores(const ScoreArguments* a) {
    const int64_t bytes = bytes_of(a->type), wide = a->stride * a->ratio;
    const int R = int(a->H / a->G), D = int(a->D), P = int(round_up(D, NATIVE));
    const Kernels kernels = pick(R, D);
    const int L = kernels.lanes;
    const float factor = float(a->scaling) * LOG2E;
    const int64_t step = a->block_size / a->stride, before = (a->size - 1) / a->stride;
    for (int64_t b = 0; b < a->B; ++b) {
        const int64_t q0 = a->bounds_q[b], queries = a->bounds_q[b + 1] - q0;
        const int64_t k0 = a->bounds_k[b], length = a->bounds_k[b + 1] - k0;
        const int64_t tiles = (queries + QUERIES - 1) / QUERIES;
        const int64_t most = windows(length - 1, a->size, a->stride);
    Phase phases[1];
#pragma omp parallel num_threads(int(a->threads)) if (queries * length > 4096)
        {
            own.reset();
            float* scratch = own.take(TILE * P);
            float* s = own.take(TILE * L);
            float* qt = own.take(int64_t(QUERIES) * D * L);
            float* m = own.take(QUERIES * L);
            float* l = own.take(QUERIES * L);
            float* lse = own.take(QUERIES * L);
            float* weight = own.take(QUERIES * most);
            phases[0].run(tiles * a->G, [&](int64_t item) {
                const int64_t g = item % a->G, first = item / a->G * QUERIES;
                const int count = int(std::min<int64_t>(QUERIES, queries - first));
                const int64_t position = length - queries + first;
                for (int i = 0; i < count; ++i) {
                    const char* query = a->query + ((q0 + first + i) * a->query_s + g * R * a->query_h) * bytes;
                    transpose_query(query, a->query_h * bytes, a->type, R, L, D, factor, qt + int64_t(i) * D * L);
                    clear(m + i * L, l + i * L, L);
                }
                Ahead none;
                const char* keys = a->coarse + ((k0 / wide) * a->coarse_k + g * a->coarse_g) * bytes;
                int64_t upto = windows(position + count - 1, a->size * a->ratio, wide);
                for (int64_t from = 0; from < upto; from += TILE) {
                    const Rows rows = fetch(keys + from * a->coarse_k * bytes, a->coarse_k * bytes, a->type,
                                            int(std::min<int64_t>(TILE, upto - from)), D, P, scratch);
                    for (int i = 0; i < count; ++i) {
                        const int64_t seen = windows(position + i, a->size * a->ratio, wide) - from;
                        if (seen > 0)
                            kernels.coarse(rows, int(std::min<int64_t>(TILE, seen)), qt + int64_t(i) * D * L,
                                           m + i * L, l + i * L, s, D, none);
                    }
                }
                for (int i = 0; i < count; ++i) log_sum(m + i * L, l + i * L, R, L, lse + i * L);
                keys = a->fine + ((k0 / a->stride) * a->fine_k + g * a->fine_g) * bytes;
                upto = windows(position + count - 1, a->size, a->stride);
                for (int64_t from = 0; from < upto; from += TILE) {
                    const Rows rows = fetch(keys + from * a->fine_k * bytes, a->fine_k * bytes, a->type,
                                            int(std::min<int64_t>(TILE, upto - from)), D, P, scratch);
                    for (int i = 0; i < count; ++i) {
                        const int64_t seen = windows(position + i, a->size, a->stride) - from;
                        if (seen > 0)
                            kernels.fine(rows, int(std::min<int64_t>(TILE, seen)), qt + int64_t(i) * D * L,
                                         lse + i * L, s, weight + i * most + from, D, none);
                    }
                }
                const int64_t total = a->bounds_q[a->B];
                for (int i = 0; i < count; ++i)
                    pool(weight + i * most, windows(position + i, a->size, a->stride), a->M, step, before,
                         a->out + (g * total + q0 + first + i) * a->M);
            });
        }
    }
}

// A few queries a row `[B, S, H, D]`, split over the keys.
void infllm_scores_decode(const ScoreArguments* a) {
    const int64_t bytes = bytes_of(a->type), wide = a->stride * a->ratio;
    const int R = int(a->H / a->G), D = int(a->D), P = int(round_up(D, NATIVE)), S = int(a->S);
    const Kernels kernels = pick(R, D);
    const int L = kernels.lanes;
    const float factor = float(a->scaling) * LOG2E;
    int64_t longest = 0;
    for (int64_t b = 0; b < a->B; ++b) longest = std::max<int64_t>(longest, a->lengths[b]);
    const int64_t most = windows(longest - 1, a->size, a->stride);
    const int64_t most_coarse = windows(longest - 1, a->size * a->ratio, wide);
    const int64_t splits = std::max<int64_t>((most_coarse + SPLIT_KEYS - 1) / SPLIT_KEYS, 1);
    const int64_t fine_splits = (most + SPLIT_KEYS - 1) / SPLIT_KEYS;
    const int64_t heads = a->B * a->G, pairs = heads * S;  // pair: ((b * G) + g) * S + s
    caller.reset();
    float* qt = caller.take(pairs * D * L);
    float* m = caller.take(pairs * splits * L);
    float* l = caller.take(pairs * splits * L);
    float* lse = caller.take(pairs * L);
    float* weight = caller.take(pairs * most);
    auto position = [&](int64_t b, int s) -> int64_t {
        return a->positions ? a->positions[b * S + s] : a->lengths[b] - S + s;
    };
    auto seen_by = [&](int64_t b, int s, int64_t size, int64_t stride) {
        return std::min(windows(position(b, s), size, stride), windows(a->lengths[b] - 1, size, stride));
    };
    Phase phases[5];
#pragma omp parallel num_threads(int(a->threads)) if (pairs * longest > 4096)
    {
        own.reset();
        float* scratch = own.take(TILE * P);
        float* logits = own.take(TILE * L);
        phases[0].run(pairs, [&](int64_t p) {
            const int64_t b = p / S / a->G, g = p / S % a->G;
            const char* query = a->query + (b * a->query_b + p % S * a->query_s + g * R * a->query_h) * bytes;
            transpose_query(query, a->query_h * bytes, a->type, R, L, D, factor, qt + p * D * L);
        });
        auto walk = [&](int64_t head, int64_t split, const char* keys, int64_t apart, int64_t size, int64_t stride,
                        auto&& each) {
            const int64_t b = head / a->G;
            int64_t upto = 0;
            for (int s = 0; s < S; ++s) upto = std::max(upto, seen_by(b, s, size, stride));
            upto = std::min(upto, (split + 1) * SPLIT_KEYS);
            for (int64_t from = split * SPLIT_KEYS; from < upto; from += TILE) {
                const int n = int(std::min<int64_t>(TILE, upto - from));
                const Rows rows = fetch(keys + from * apart, apart, a->type, n, D, P, scratch);
                const int64_t then = std::min<int64_t>(TILE, upto - from - n);
                Ahead ahead{keys + (from + TILE) * apart, apart, D * bytes, then, 0};
                for (int s = 0; s < S; ++s) {
                    const int64_t seen = std::min<int64_t>(seen_by(b, s, size, stride) - from, n);
                    if (seen > 0) each(rows, int(seen), s, from, ahead);
                }
            }
        };
        phases[1].run(heads * splits, [&](int64_t item) {
            const int64_t head = item / splits, split = item % splits, b = head / a->G, g = head % a->G;
            for (int s = 0; s < S; ++s)
                clear(m + ((head * S + s) * splits + split) * L, l + ((head * S + s) * splits + split) * L, L);
            walk(head, split, a->coarse + (b * a->coarse_b + g * a->coarse_g) * bytes, a->coarse_k * bytes,
                 a->size * a->ratio, wide, [&](Rows rows, int n, int s, int64_t, Ahead& ahead) {
                     const int64_t at = ((head * S + s) * splits + split) * L;
                     kernels.coarse(rows, n, qt + (head * S + s) * D * L, m + at, l + at, logits, D, ahead);
                 });
        });
        phases[2].run(pairs, [&](int64_t p) {
            float total_m[32], total_l[32];
            clear(total_m, total_l, L);
            for (int64_t split = 0; split < splits; ++split)
                for (int r = 0; r < L; ++r) total_m[r] = std::max(total_m[r], m[(p * splits + split) * L + r]);
            for (int64_t split = 0; split < splits; ++split)
                for (int r = 0; r < L; ++r) {
                    const float part = l[(p * splits + split) * L + r];
                    if (part != 0.0f) total_l[r] += part * std::exp2(m[(p * splits + split) * L + r] - total_m[r]);
                }
            log_sum(total_m, total_l, R, L, lse + p * L);
        });
        phases[3].run(heads * fine_splits, [&](int64_t item) {
            const int64_t head = item / fine_splits, split = item % fine_splits, b = head / a->G, g = head % a->G;
            walk(head, split, a->fine + (b * a->fine_b + g * a->fine_g) * bytes, a->fine_k * bytes, a->size, a->stride,
                 [&](Rows rows, int n, int s, int64_t from, Ahead& ahead) {
                     const int64_t p = head * S + s;
                     kernels.fine(rows, n, qt + p * D * L, lse + p * L, logits, weight + p * most + from, D, ahead);
                 });
        });
        phases[4].run(pairs, [&](int64_t p) {
            const int64_t b = p / S / a->G, g = p / S % a->G;
            pool(weight + p * most, seen_by(b, int(p % S), a->size, a->stride), a->M, a->block_size / a->stride,
                 (a->size - 1) / a->stride, a->out + (g * a->B * S + b * S + p % S) * a->M);
        });
    }
}

struct AttendArguments {
    int64_t threads, type, B, S, H, G, D, T, block_size;
    int64_t query_s, query_h, key_n, key_g, value_n, value_g;
    const char *query, *key, *value;
    const int32_t *blocks, *bounds_q, *bounds_k;
    char* out;
    float* lse;
    double scaling;
};

// All rows packed; a tile of neighbouring queries walks its blocks together, so that a block which several of them
// read is in cache for all but the first. Each query meets its blocks in rising order whatever its neighbours read.
void infllm_attend(const AttendArguments* a) {
    const int64_t bytes = bytes_of(a->type), written = written_bytes(a->type), size = a->block_size;
    const int R = int(a->H / a->G), D = int(a->D), P = int(round_up(D, NATIVE));
    const Kernels kernels = pick(R, D);
    const int L = kernels.lanes;
    const float factor = float(a->scaling) * LOG2E;
    for (int64_t b = 0; b < a->B; ++b) {
        const int64_t q0 = a->bounds_q[b], queries = a->bounds_q[b + 1] - q0;
        const int64_t k0 = a->bounds_k[b], length = a->bounds_k[b + 1] - k0;
        // Wide tiles share more; every thread should still find several.
        const int64_t share = queries * a->G / (4 * a->threads) / QUERIES * QUERIES;
        const int64_t tile = std::min<int64_t>(std::max<int64_t>(share, QUERIES), MOST_QUERIES);
        const int64_t tiles = (queries + tile - 1) / tile;
    Phase phases[1];
#pragma omp parallel num_threads(int(a->threads)) if (queries * std::min(length, a->T * size) > 4096)
        {
            own.reset();
            float* keys = own.take(size * P);
            float* values = own.take(size * P);
            float* s = own.take(size * L);
            float* qt = own.take(tile * D * L);
            float* m = own.take(tile * L);
            float* l = own.take(tile * L);
            float* out = own.take(tile * R * P);
            phases[0].run(tiles * a->G, [&](int64_t item) {
                const int64_t g = item / tiles, first = item % tiles * tile;
                const int count = int(std::min(tile, queries - first));
                const int64_t position = length - queries + first;
                const char* key = a->key + (k0 * a->key_n + g * a->key_g) * bytes;
                const char* value = a->value + (k0 * a->value_n + g * a->value_g) * bytes;
                const int32_t* block[MOST_QUERIES];
                int64_t cursor[MOST_QUERIES] = {};
                std::fill(out, out + int64_t(count) * R * P, 0.0f);
                for (int i = 0; i < count; ++i) {
                    const char* query = a->query + ((q0 + first + i) * a->query_s + g * R * a->query_h) * bytes;
                    transpose_query(query, a->query_h * bytes, a->type, R, L, D, factor, qt + int64_t(i) * D * L);
                    clear(m + i * L, l + i * L, L);
                    block[i] = a->blocks + (g * a->bounds_q[a->B] + q0 + first + i) * a->T;
                }
                // The lowest block that any query has still to read.
                auto next = [&]() {
                    int64_t lowest = INT64_MAX;
                    for (int i = 0; i < count; ++i) {
                        auto hidden = [&](int64_t m) { return m < 0 || m * size > position + i; };
                        while (cursor[i] < a->T && hidden(block[i][cursor[i]])) ++cursor[i];
                        if (cursor[i] < a->T) lowest = std::min<int64_t>(lowest, block[i][cursor[i]]);
                    }
                    return lowest;
                };
                for (int64_t now = next(); now != INT64_MAX;) {
                    bool reads[MOST_QUERIES];
                    int64_t most = 0;
                    for (int i = 0; i < count; ++i) {
                        reads[i] = cursor[i] < a->T && block[i][cursor[i]] == now;
                        if (!reads[i]) continue;
                        ++cursor[i];
                        most = std::min(size, position + i + 1 - now * size);
                    }
                    const int64_t then = next(), key_apart = a->key_n * bytes, value_apart = a->value_n * bytes;
                    Ahead key_ahead, value_ahead;
                    if (then != INT64_MAX) {
                        const int64_t rows = std::min(size, length - then * size);
                        key_ahead = {key + then * size * key_apart, key_apart, D * bytes, rows, 0};
                        value_ahead = {value + then * size * value_apart, value_apart, D * bytes, rows, 0};
                    }
                    const int n = int(most);
                    const Rows k = fetch(key + now * size * key_apart, key_apart, a->type, n, D, P, keys);
                    const Rows v = fetch(value + now * size * value_apart, value_apart, a->type, n, D, P, values);
                    for (int i = 0; i < count; ++i)
                        if (reads[i])
                            kernels.attend(k, v, int(std::min(size, position + i + 1 - now * size)),
                                           qt + int64_t(i) * D * L, m + i * L, l + i * L, out + int64_t(i) * R * P,
                                           s, R, D, P, key_ahead, value_ahead);
                    now = then;
                }
                for (int i = 0; i < count; ++i)
                    for (int r = 0; r < R; ++r) {
                        const int64_t at = (q0 + first + i) * a->H + g * R + r;
                        const float total = l[i * L + r];
                        narrow_row(out + (int64_t(i) * R + r) * P, a->type, D, total == 0.0f ? 0.0f : 1.0f / total,
                                   a->out + at * D * written);
                        a->lse[at] = total == 0.0f ? -INF : (m[i * L + r] + std::log2(total)) * LN2;
                    }
            });
        }
    }
}

struct DecodeArguments {
    int64_t threads, type, B, S, H, G, D, T, M, block_size, wanted, init, window, page_size, pages;
    int64_t query_b, query_s, query_h, key_b, key_g, key_n, value_b, value_g, value_n;
    const char *query, *key, *value;
    const int32_t* blocks;
    const float* scores;
    const int32_t *lengths, *positions, *starts, *page_table;
    const int64_t* tree_mask;
    char* out;
    double scaling;
};

void infllm_decode(const DecodeArguments* a) {
    const int64_t bytes = bytes_of(a->type), written = written_bytes(a->type), size = a->block_size, S = a->S;
    const int R = int(a->H / a->G), D = int(a->D), P = int(round_up(D, NATIVE));
    const Kernels kernels = pick(R, D);
    const int L = kernels.lanes;
    const float factor = float(a->scaling) * LOG2E;
    const int64_t rows = a->B * S, pairs = rows * a->G;  // pair: g * B * S + b * S + s, as the blocks lie
    const int64_t per_item = std::max<int64_t>(SPLIT_TOKENS / size, 1);
    const int64_t splits = (a->T + per_item - 1) / per_item;
    const int64_t items = splits + (a->tree_mask != nullptr);  // the drafts are an item of their own
    caller.reset();
    float* qt = caller.take(pairs * D * L);
    float* m = caller.take(pairs * items * L);
    float* l = caller.take(pairs * items * L);
    float* out = caller.take(pairs * items * R * P);
    int32_t* chosen = a->blocks ? nullptr : reinterpret_cast<int32_t*>(caller.take(pairs * a->T));
    const int32_t* blocks = a->blocks ? a->blocks : chosen;

    auto position = [&](int64_t row) -> int64_t {
        return a->positions ? a->positions[row] : a->lengths[row / S] - S + row % S;
    };
    auto offset = [&](int64_t b, int64_t g, int64_t token, int64_t apart_b, int64_t apart_g, int64_t apart_n) {
        if (a->page_table) {
            const int64_t page = a->page_table[b * a->pages + token / a->page_size];
            return (page * apart_b + g * apart_g + token % a->page_size * apart_n) * bytes;
        }
        return (b * apart_b + g * apart_g + ((a->starts ? a->starts[b] : 0) + token) * apart_n) * bytes;
    };
    auto key_at = [&](int64_t b, int64_t g, int64_t token) {
        return a->key + offset(b, g, token, a->key_b, a->key_g, a->key_n);
    };
    auto value_at = [&](int64_t b, int64_t g, int64_t token) {
        return a->value + offset(b, g, token, a->value_b, a->value_g, a->value_n);
    };

    Phase phases[3];
#pragma omp parallel num_threads(int(a->threads)) if (pairs * a->T * size > 1024)
    {
        own.reset();
        const int64_t tokens = std::max<int64_t>(size, a->tree_mask ? S : 0);
        float* keys = own.take(tokens * P);
        float* values = own.take(tokens * P);
        float* s = own.take(tokens * L);
        uint32_t* order = chosen ? reinterpret_cast<uint32_t*>(own.take(a->M)) : nullptr;
        phases[0].run(pairs, [&](int64_t p) {
            const int64_t g = p / rows, row = p % rows;
            const char* query = a->query + (row / S * a->query_b + row % S * a->query_s + g * R * a->query_h) * bytes;
            transpose_query(query, a->query_h * bytes, a->type, R, L, D, factor, qt + p * D * L);
            if (chosen)
                choose(a->scores + p * a->M, a->M, position(row), a->wanted, a->init, a->window, size, order,
                       chosen + p * a->T);
        });
        phases[1].run(pairs * items, [&](int64_t item) {
            const int64_t p = item / items, split = item % items, g = p / rows, row = p % rows, b = row / S;
            const int64_t length = a->lengths[b];
            float* own_m = m + item * L;
            float* own_l = l + item * L;
            float* own_out = out + item * R * P;
            clear(own_m, own_l, L);
            std::fill(own_out, own_out + R * P, 0.0f);
            if (split == splits) {
                int n = 0;
                for (int64_t j = 0; j < S; ++j) {
                    if (!(a->tree_mask[row] >> j & 1) || length - S + j < 0) continue;
                    widen_row(key_at(b, g, length - S + j), a->type, D, keys + n * P);
                    widen_row(value_at(b, g, length - S + j), a->type, D, values + n * P);
                    std::fill(values + n * P + D, values + (n + 1) * P, 0.0f);
                    ++n;
                }
                Ahead none;
                if (n)
                    kernels.attend({keys, P}, {values, P}, n, qt + p * D * L, own_m, own_l, own_out, s, R, D, P, none,
                                   none);
                return;
            }
            const int64_t last = std::min(position(row), a->tree_mask ? length - S - 1 : length - 1);
            for (int64_t t = split * per_item; t < std::min(a->T, (split + 1) * per_item); ++t) {
                const int64_t from = blocks[p * a->T + t] * size;
                if (from < 0 || from > last) continue;
                const int n = int(std::min(size, last + 1 - from));
                Ahead key_ahead, value_ahead;
                const int64_t then = t + 1 < a->T ? blocks[p * a->T + t + 1] * size : -1;
                if (then >= 0 && then <= last) {
                    const int64_t count = std::min(size, last + 1 - then);
                    key_ahead = {key_at(b, g, then), a->key_n * bytes, D * bytes, count, 0};
                    value_ahead = {value_at(b, g, then), a->value_n * bytes, D * bytes, count, 0};
                }
                const Rows k = fetch(key_at(b, g, from), a->key_n * bytes, a->type, n, D, P, keys);
                const Rows v = fetch(value_at(b, g, from), a->value_n * bytes, a->type, n, D, P, values);
                kernels.attend(k, v, n, qt + p * D * L, own_m, own_l, own_out, s, R, D, P, key_ahead, value_ahead);
            }
        });
        phases[2].run(pairs, [&](int64_t p) {
            const int64_t g = p / rows, row = p % rows;
            for (int r = 0; r < R; ++r) {
                float top = -INF, total = 0.0f, sums[256] = {};
                for (int64_t i = 0; i < items; ++i) top = std::max(top, m[(p * items + i) * L + r]);
                for (int64_t i = 0; i < items; ++i) {
                    const float part = l[(p * items + i) * L + r];
                    if (part == 0.0f) continue;
                    const float scale = std::exp2(m[(p * items + i) * L + r] - top);
                    const float* from = out + ((p * items + i) * R + r) * P;
                    total += part * scale;
                    for (int d = 0; d < D; ++d) sums[d] += from[d] * scale;
                }
                narrow_row(sums, a->type, D, total == 0.0f ? 0.0f : 1.0f / total,
                           a->out + ((row * a->H) + g * R + r) * D * written);
            }
        });
    }
}

}  // extern "C"
