// Products with packed ternary weights on CPUs. Built by ternary_cpu.py, called through ctypes with one array of
// 64-bit integers. The layout of the packed bytes is told in ternary_packing.py.
//
// 32 bits hold 16 neighbouring codes, so a vector of W integers holds W * 16 of them: shifted by 2 * t, its lane j
// holds the code of input 16 * j + t. The inputs are put in that order once a call, after which a step is a shift, a
// look-up within a register and a multiplication. No lane mixes two groups where groups are multiples of 16, so a
// vector of scales ends every W * 16 inputs. Inputs and sums are float32.
//
// Each output is one thread's, and its terms are added in an order that depends on its row alone: neither the threads
// nor the rows beside it change a bit.
//
// Shape letters: M rows of x, O outputs, I inputs, N blocks of W * 16 inputs, B bytes of a packed row, Q groups, R
// outputs computed together.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16, R = 4;
#elif defined(__AVX2__)
constexpr int W = 8, R = 4;
#else
constexpr int W = 4, R = 2;
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int CODES = 16;         // codes in 32 bits
constexpr int BLOCK = W * CODES;  // inputs of one vector of codes

template <int L>
struct Vector {
    typedef float F __attribute__((vector_size(L * 4)));
    typedef int32_t V __attribute__((vector_size(L * 4)));
};
typedef Vector<W>::F F;
typedef Vector<W>::V V;

struct Arguments {
    int64_t threads, M, O, I, B, Q, group;
    int64_t half;            // whether scales are float16
    const float* x;          // [M, I]; null for dequantize
    const uint8_t* packed;   // [O, B]
    const char* scales;      // [O, Q]
    float* out;              // [M, O] or, for dequantize, [O, I]
};

template <class T>
INLINE T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <int L>
INLINE float sum_of(typename Vector<L>::F lanes) {
    if constexpr (L == 1) {
        return load<float>(&lanes);
    } else {
        typename Vector<L / 2>::F half[2];
        std::memcpy(half, &lanes, sizeof half);
        return sum_of<L / 2>(half[0] + half[1]);
    }
}

// Codes t of all lanes, as floats.
INLINE F codes(V packed, int t) {
#if defined(__AVX512F__)
    // A look-up reads 4 bits: the code's own, and two that belong to its neighbour and are ignored.
    const __m512 table = _mm512_setr_ps(0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1);
    return (F)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)packed, 2 * t), table);
#elif defined(__AVX2__)
    const __m256 table = _mm256_setr_ps(0, 1, 0, -1, 0, 1, 0, -1);
    return (F)_mm256_permutevar8x32_ps(table, _mm256_srli_epi32((__m256i)packed, 2 * t));
#else
    return __builtin_convertvector((packed << (30 - 2 * t)) >> 30, F);
#endif
}

INLINE float from_float16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
    const uint32_t moved = rest << 13;
    // The factor 2^112 moves the exponent's bias, subnormals included; inf and NaN have an exponent of their own.
    const float value = load<float>(&moved) * 5.192296858534828e33f;
    const uint32_t bits = load<uint32_t>(&value) | sign | (rest >= 0x7C00 ? 0x7F800000u : 0u);
    return load<float>(&bits);
}

INLINE float scale_at(const Arguments& a, int64_t at) {
    if (a.half) return from_float16(reinterpret_cast<const uint16_t*>(a.scales)[at]);
    return reinterpret_cast<const float*>(a.scales)[at];
}

// Scales of row `o` as float32.
void widen_scales(const Arguments& a, int64_t o, float* out) {
    int64_t q = 0;
    if (!a.half) {
        std::memcpy(out, reinterpret_cast<const float*>(a.scales) + o * a.Q, a.Q * 4);
        return;
    }
    const uint16_t* from = reinterpret_cast<const uint16_t*>(a.scales) + o * a.Q;
#if defined(__AVX2__) && defined(__F16C__)
    for (; q + 8 <= a.Q; q += 8) _mm256_storeu_ps(out + q, _mm256_cvtph_ps(load<__m128i>(from + q)));
#endif
    for (; q < a.Q; ++q) out[q] = from_float16(from[q]);
}

// One scale for every 16 inputs of row `o`, for N * W of them; `wide` has room for Q + W.
void spread_scales(const Arguments& a, int64_t o, int64_t N, float* wide, float* out) {
    widen_scales(a, o, wide);
    const int64_t each = a.Q == 1 ? N * W : a.group / CODES;
#if defined(__AVX2__)
    if (each % W == 0 || W % each == 0) {
        V lanes;
        for (int j = 0; j < W; ++j) lanes[j] = int(j / each);
        for (int64_t n = 0; n < N; ++n) {
            const F some = load<F>(wide + n * W / each);
#if defined(__AVX512F__)
            const F spread = (F)_mm512_permutexvar_ps((__m512i)lanes, (__m512)some);
#else
            const F spread = (F)_mm256_permutevar8x32_ps((__m256)some, (__m256i)lanes);
#endif
            std::memcpy(out + n * W, &spread, sizeof spread);
        }
        return;
    }
#endif
    for (int64_t q = 0; q < a.Q; ++q) std::fill(out + q * each, out + std::min((q + 1) * each, N * W), wide[q]);
}

// Lane j of vector t of a block is input 16 * j + t of it; zeros past the last input.
void reorder(const float* x, int64_t I, float* out) {
    for (int64_t start = 0; start < I; start += BLOCK) {
        float last[BLOCK] = {};
        const float* from = x + start;
        if (I - start < BLOCK) {
            std::memcpy(last, from, (I - start) * 4);
            from = last;
        }
        for (int t = 0; t < CODES; ++t)
            for (int j = 0; j < W; ++j) out[start + t * W + j] = from[j * CODES + t];
    }
}

// Floats from one reordered row to the next: never a multiple of 4096 bytes, at which rows evict each other from cache.
int64_t apart_of(int64_t N) { return N * BLOCK + 16; }

// RR outputs of MM rows. `x` is reordered, `apart` floats a row; `scales` holds N * W a row.
template <int RR, int MM>
void tile(const Arguments& a, int64_t N, int64_t o, const float* scales, const float* x, int64_t apart, float* out) {
    const uint8_t* rows = a.packed + o * a.B;
    F total[RR][MM] = {};
    for (int64_t n = 0; n < N; ++n) {
        V packed[RR];
        const int64_t rest = a.B - n * W * 4;
        for (int r = 0; r < RR; ++r) {
            // The rows of the next tile: each is too short for the processor to foresee it in time.
            __builtin_prefetch(rows + (r + RR) * a.B + n * W * 4);
            if (rest >= W * 4) {
                packed[r] = load<V>(rows + r * a.B + n * W * 4);
            } else {
                packed[r] = V{};
                std::memcpy(&packed[r], rows + r * a.B + n * W * 4, rest);
            }
        }
        const float* input = x + n * BLOCK;
        F sum[RR][MM] = {};
#pragma GCC unroll 16
        for (int t = 0; t < CODES; ++t) {
            F in[MM];
#pragma GCC unroll 4
            for (int m = 0; m < MM; ++m) in[m] = load<F>(input + m * apart + t * W);
#pragma GCC unroll 4
            for (int r = 0; r < RR; ++r) {
                const F code = codes(packed[r], t);
#pragma GCC unroll 4
                for (int m = 0; m < MM; ++m) sum[r][m] += code * in[m];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < RR; ++r)
#pragma GCC unroll 4
            for (int m = 0; m < MM; ++m) total[r][m] += sum[r][m] * load<F>(scales + (r * N + n) * W);
    }
    for (int r = 0; r < RR; ++r)
        for (int m = 0; m < MM; ++m) out[m * a.O + o + r] = sum_of<W>(total[r][m]);
}

template <int RR>
void all_rows(const Arguments& a, int64_t N, int64_t o, const float* scales, const float* x) {
    const int64_t apart = apart_of(N);
    int64_t m = 0;
    for (; a.M - m >= 4; m += 4) tile<RR, 4>(a, N, o, scales, x + m * apart, apart, a.out + m * a.O);
    if (a.M - m >= 2) {
        tile<RR, 2>(a, N, o, scales, x + m * apart, apart, a.out + m * a.O);
        m += 2;
    }
    if (a.M > m) tile<RR, 1>(a, N, o, scales, x + m * apart, apart, a.out + m * a.O);
}

}  // namespace

extern "C" {

void ternary_product(const Arguments* arguments) {
    const Arguments& a = *arguments;
    const int64_t N = (a.I + BLOCK - 1) / BLOCK, tiles = (a.O + R - 1) / R;
    std::vector<float> ordered(a.M * apart_of(N));
    float* x = ordered.data();
#pragma omp parallel num_threads(int(a.threads)) if (a.M * a.O * a.I > 65536)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < a.M; ++m) reorder(a.x + m * a.I, a.I, x + m * apart_of(N));
        std::vector<float> wide(a.Q + W), scales(R * N * W);
#pragma omp for schedule(dynamic, 8)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t o = t * R, count = std::min<int64_t>(R, a.O - o);
            for (int64_t r = 0; r < count; ++r)
                spread_scales(a, o + r, N, wide.data(), scales.data() + r * N * W);
            if (count == R) {
                all_rows<R>(a, N, o, scales.data(), x);
            } else {
                for (int64_t r = 0; r < count; ++r) all_rows<1>(a, N, o + r, scales.data() + r * N * W, x);
            }
        }
    }
}

void ternary_dequantize(const Arguments* arguments) {
    const Arguments& a = *arguments;
    typedef Vector<CODES>::V Codes;
    Codes places;
    for (int j = 0; j < CODES; ++j) places[j] = 30 - 2 * j;
#pragma omp parallel for num_threads(int(a.threads)) schedule(static) if (a.O * a.I > 65536)
    for (int64_t o = 0; o < a.O; ++o) {
        const uint8_t* row = a.packed + o * a.B;
        float* out = a.out + o * a.I;
        for (int64_t q = 0; q < a.Q; ++q) {
            const float scale = scale_at(a, o * a.Q + q);
            const int64_t end = std::min((q + 1) * a.group, a.I);
            const auto unpack = [&](int32_t packed) {
                return __builtin_convertvector(((Codes{} + packed) << places) >> 30, Vector<CODES>::F) * scale;
            };
            int64_t i = q * a.group;
            for (; i + CODES <= end; i += CODES) {
                const auto weight = unpack(load<int32_t>(row + i / 4));
                std::memcpy(out + i, &weight, sizeof weight);
            }
            if (i < end) {
                int32_t packed = 0;
                std::memcpy(&packed, row + i / 4, std::min<int64_t>(4, a.B - i / 4));
                const auto weight = unpack(packed);
                std::memcpy(out + i, &weight, (end - i) * 4);
            }
        }
    }
}

}  // extern "C"
