/* y = x Wᵀ + b in bfloat16 with float32 sums, for any number of rows, over one layout of W.
 *
 * W lies in tiles of 32 outputs; a tile is [pairs of inputs][32 outputs][2 inputs], contiguous, so
 * that one row streams it at the rate of memory and no sum crosses lanes. Up to 12 rows keep their
 * sums in registers over a tile. Every row is summed in the order of its inputs, whatever the
 * number of rows beside it: a row's answer is bitwise the same alone and in a batch.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 32, MOST_ROWS = 12, AHEAD_BYTES = 2048, BLOCK_BYTES = 512 << 10 };

static inline __attribute__((always_inline)) void panel(
    const int rows, const uint32_t *x, const char *tile, int64_t pairs, __m512 low, __m512 high,
    uint16_t *y, int64_t outputs, __mmask16 low_mask, __mmask16 high_mask)
{
    __m512 sums[MOST_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        sums[r][0] = low;
        sums[r][1] = high;
    }
    for (int64_t k = 0; k < pairs; k++, tile += 128) {
        _mm_prefetch(tile + AHEAD_BYTES, _MM_HINT_T0);
        _mm_prefetch(tile + AHEAD_BYTES + 64, _MM_HINT_T0);
        __m512bh first = (__m512bh)_mm512_loadu_si512(tile);
        __m512bh second = (__m512bh)_mm512_loadu_si512(tile + 64);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[r * pairs + k]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], first, pair);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], second, pair);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        uint16_t *out = y + r * outputs;
        _mm256_mask_storeu_epi16(out, low_mask, (__m256i)_mm512_cvtneps_pbh(sums[r][0]));
        if (high_mask)
            _mm256_mask_storeu_epi16(out + 16, high_mask, (__m256i)_mm512_cvtneps_pbh(sums[r][1]));
    }
}

static inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

/* x [rows, 2 * pairs], w packed, bias [outputs padded to 32] float32 or null, y [rows, outputs]. */
void baton_linear_bf16(const uint32_t *x, const char *w, const float *bias, uint16_t *y,
                       int64_t rows, int64_t pairs, int64_t outputs)
{
    /* A block of x stays in L2 while the tiles pass over it. */
    int64_t block = BLOCK_BYTES / (pairs * 4) / MOST_ROWS * MOST_ROWS;
    if (block < MOST_ROWS)
        block = MOST_ROWS;
    for (int64_t begin = 0; begin < rows; begin += block) {
        int64_t end = begin + block < rows ? begin + block : rows;
        for (int64_t out = 0; out < outputs; out += TILE) {
            const char *tile = w + out / TILE * pairs * 128;
            __m512 low = bias ? _mm512_loadu_ps(bias + out) : _mm512_setzero_ps();
            __m512 high = bias ? _mm512_loadu_ps(bias + out + 16) : _mm512_setzero_ps();
            __mmask16 lm = lanes(outputs - out), hm = lanes(outputs - out - 16);
            for (int64_t row = begin; row < end;) {
                int64_t left = end - row, panels = (left + MOST_ROWS - 1) / MOST_ROWS;
                int now = (int)((left + panels - 1) / panels); /* panels of even height */
                switch (now) {
#define CASE(n) case n: panel(n, x + row * pairs, tile, pairs, low, high, y + row * outputs + out, outputs, lm, hm); break;
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                    CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
                }
                row += now;
            }
        }
    }
}
