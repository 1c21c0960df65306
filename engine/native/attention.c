/* Attention of a step's segments over a paged bfloat16 cache, with float32 sums and softmax.
 *
 * Each segment and KV head goes by itself: its keys and values are packed, 64 tokens at a time, so
 * that no sum crosses lanes, and every query row that sees some of them takes them in (online
 * softmax: Milakov and Gimelshein 2018; Dao et al. 2022). The query heads that share a KV head are
 * rows beside each other. What a segment gets does not depend on the others of its step. No token
 * outside [first, stop) of a segment is read.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SPAN = 64, ROWS = 4, WIDE = 64 };

typedef struct {
    int64_t begin;  /* of its tokens in the step */
    int64_t tokens;
    int64_t start;  /* position of the first of them */
    int64_t table;  /* where its block table begins */
} segment;

static inline __m512 exp512(__m512 x)
{
    /* 2^n * 2^f with f in [-1/2, 1/2]: a polynomial of degree 6, exact to float32's last bits. */
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.54035304e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33335581e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Sixteen rows of sixteen become sixteen columns: by twos, fours, eights, then whole lanes. */
static inline void transpose(__m512i x[16])
{
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

/* Keys of `count` tokens as [pairs of dims][64 tokens][2], zero behind the last. */
static void pack_keys(const uint16_t *const *rows, int count, int64_t pairs, uint32_t *out)
{
    for (int64_t p = 0; p < pairs; p += 16) {
        int wide = pairs - p < 16 ? (int)(pairs - p) : 16;
        __mmask16 mask = (__mmask16)((1u << wide) - 1);
        for (int t = 0; t < SPAN; t += 16) {
            __m512i x[16];
            for (int i = 0; i < 16; i++)
                x[i] = t + i < count
                    ? _mm512_maskz_loadu_epi32(mask, (const uint32_t *)rows[t + i] + p)
                    : _mm512_setzero_si512();
            if (t < count)
                transpose(x);
            for (int k = 0; k < wide; k++)
                _mm512_storeu_si512(out + (p + k) * SPAN + t, x[k]);
        }
    }
}

/* Values of `count` tokens as [pairs of tokens][width dims][2], zero behind the last. */
static void pack_values(const uint16_t *const *rows, int count, int64_t dims, int64_t width,
                        uint32_t *out)
{
    for (int t = 0; t < count; t += 2) {
        for (int64_t d = 0; d < width; d += 16) {
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (d < dims) {
                even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(rows[t] + d)));
                if (t + 1 < count)
                    odd = _mm512_cvtepu16_epi32(
                        _mm256_loadu_si256((const void *)(rows[t + 1] + d)));
            }
            _mm512_storeu_si512(out + t / 2 * width + d,
                                _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
    }
}

typedef struct {
    const uint32_t *query;
    float *sums; /* [width] */
    float most, total;
    int64_t position;
} row_state;

/* Let four rows take in the packed tokens [from, from + count). */
static void take_in(row_state **rows, const uint32_t *keys, const uint32_t *values, int64_t from,
                    int count, int64_t pairs, int64_t width, int64_t window, float scale)
{
    __m512 scores[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 4; c++)
            scores[r][c] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh key[4];
        for (int c = 0; c < 4; c++)
            key[c] = (__m512bh)_mm512_loadu_si512(keys + p * SPAN + 16 * c);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            __m512bh query = (__m512bh)_mm512_set1_epi32((int)rows[r]->query[p]);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++)
                scores[r][c] = _mm512_dpbf16_ps(scores[r][c], key[c], query);
        }
    }
    uint32_t weights[ROWS][SPAN / 2];
    float keep[ROWS];
    const __m512i count16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int r = 0; r < ROWS; r++) {
        row_state *row = rows[r];
        int64_t low = window && row->position - window + 1 > from ? row->position - window + 1 : from;
        int64_t high = row->position + 1 < from + count ? row->position + 1 : from + count;
        if (low >= high) { /* nothing of these is seen */
            memset(weights[r], 0, sizeof weights[r]);
            keep[r] = 1.0f;
            continue;
        }
        __m512i first = _mm512_set1_epi32((int)(low - from)), end = _mm512_set1_epi32((int)(high - from));
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (int c = 0; c < 4; c++) {
            __m512i place = _mm512_add_epi32(count16, _mm512_set1_epi32(16 * c));
            __mmask16 seen = _mm512_cmpge_epi32_mask(place, first) & _mm512_cmplt_epi32_mask(place, end);
            scores[r][c] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen, scores[r][c],
                                              _mm512_set1_ps(scale));
            most = _mm512_max_ps(most, scores[r][c]);
        }
        float top = _mm512_reduce_max_ps(most);
        top = top > row->most ? top : row->most;
        __m512 sum = _mm512_setzero_ps();
        for (int c = 0; c < 4; c++) {
            __m512 e = exp512(_mm512_max_ps(_mm512_sub_ps(scores[r][c], _mm512_set1_ps(top)),
                                            _mm512_set1_ps(-126.0f)));
            e = _mm512_mask_mov_ps(e, _mm512_cmpeq_ps_mask(scores[r][c], _mm512_set1_ps(-INFINITY)),
                                   _mm512_setzero_ps());
            sum = _mm512_add_ps(sum, e);
            _mm256_storeu_si256((void *)(weights[r] + 8 * c), (__m256i)_mm512_cvtneps_pbh(e));
        }
        keep[r] = row->most == -INFINITY ? 0.0f : expf(row->most - top);
        row->total = row->total * keep[r] + _mm512_reduce_add_ps(sum);
        row->most = top;
    }
    int couples = (count + 1) / 2;
    for (int64_t d = 0; d < width; d += WIDE) {
        __m512 sums[ROWS][4];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++)
                sums[r][c] = _mm512_mul_ps(_mm512_loadu_ps(rows[r]->sums + d + 16 * c),
                                           _mm512_set1_ps(keep[r]));
        for (int t = 0; t < couples; t++) {
            __m512bh value[4];
            for (int c = 0; c < 4; c++)
                value[c] = (__m512bh)_mm512_loadu_si512(values + t * width + d + 16 * c);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                __m512bh weight = (__m512bh)_mm512_set1_epi32((int)weights[r][t]);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++)
                    sums[r][c] = _mm512_dpbf16_ps(sums[r][c], value[c], weight);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++)
                _mm512_storeu_ps(rows[r]->sums + d + 16 * c, sums[r][c]);
    }
}

/* queries [tokens] rows `query_stride` apart, of query_heads * dims; keys and values of one layer,
 * [blocks, block_size, kv_heads, dims]; out [tokens, query_heads * dims]. dims is a multiple of 16.
 * window 0 sees all. Returns 0, or 1 where memory ran out. */
int baton_attention_bf16(const uint16_t *queries, int64_t query_stride, const uint16_t *keys,
                         const uint16_t *values, uint16_t *out, const segment *segments,
                         int64_t count, const int32_t *tables, int64_t block_size,
                         int64_t query_heads, int64_t kv_heads, int64_t dims, int64_t window,
                         float scale)
{
    int64_t group = query_heads / kv_heads, pairs = dims / 2, most_rows = 0;
    int64_t width = (dims + WIDE - 1) / WIDE * WIDE;
    for (int64_t s = 0; s < count; s++)
        if (segments[s].tokens * group > most_rows)
            most_rows = segments[s].tokens * group;
    row_state *rows = malloc((most_rows + 1) * sizeof *rows);
    float *sums = malloc((most_rows + 1) * width * sizeof *sums);
    uint32_t *packed = malloc((pairs * SPAN + SPAN / 2 * width) * sizeof *packed);
    if (!rows || !sums || !packed) {
        free(rows), free(sums), free(packed);
        return 1;
    }
    uint32_t *packed_values = packed + pairs * SPAN;
    for (int64_t s = 0; s < count; s++) {
        const segment *seg = segments + s;
        int64_t stop = seg->start + seg->tokens, all = seg->tokens * group;
        int64_t first = window && seg->start - window + 1 > 0 ? seg->start - window + 1 : 0;
        for (int64_t head = 0; head < kv_heads; head++) {
            memset(sums, 0, (all + 1) * width * sizeof *sums);
            for (int64_t r = 0; r <= all; r++) { /* the one behind the last stands in for none */
                int64_t token = (r < all ? r : all - 1) / group, which = (r < all ? r : all - 1) % group;
                rows[r].query = (const uint32_t *)(queries + (seg->begin + token) * query_stride +
                                                   (head * group + which) * dims);
                rows[r].sums = sums + r * width;
                rows[r].most = -INFINITY;
                rows[r].total = 0.0f;
                rows[r].position = seg->start + token;
            }
            for (int64_t from = first; from < stop; from += SPAN) {
                int now = stop - from < SPAN ? (int)(stop - from) : SPAN;
                const uint16_t *key_rows[SPAN], *value_rows[SPAN];
                for (int t = 0; t < now; t++) {
                    int64_t place = from + t;
                    int64_t slot = tables[seg->table + place / block_size] * block_size + place % block_size;
                    key_rows[t] = keys + (slot * kv_heads + head) * dims;
                    value_rows[t] = values + (slot * kv_heads + head) * dims;
                }
                pack_keys(key_rows, now, pairs, packed);
                pack_values(value_rows, now, dims, width, packed_values);
                for (int64_t r = 0; r < all; r += ROWS) {
                    int64_t last = r + ROWS - 1 < all ? r + ROWS - 1 : all - 1;
                    if (rows[last].position < from || (window && rows[r].position - window + 1 >= from + now))
                        continue;
                    row_state *four[ROWS];
                    for (int i = 0; i < ROWS; i++)
                        four[i] = rows + (r + i < all ? r + i : all);
                    take_in(four, packed, packed_values, from, now, pairs, width, window, scale);
                }
            }
            for (int64_t r = 0; r < all; r++) {
                uint16_t *to = out + (seg->begin + r / group) * query_heads * dims + (head * group + r % group) * dims;
                __m512 inverse = _mm512_set1_ps(1.0f / rows[r].total);
                for (int64_t d = 0; d < dims; d += 16)
                    _mm256_storeu_si256((void *)(to + d), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(
                        _mm512_loadu_ps(rows[r].sums + d), inverse)));
            }
        }
    }
    free(rows), free(sums), free(packed);
    return 0;
}
