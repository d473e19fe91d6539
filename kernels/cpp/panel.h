// Products with packed columns: a panel [K][NR] of 4-byte units (one float, or two bfloat16 for the CPU's own bf16 dot
// where that is the faster one), which stays in L2 while all rows pass over it.

#if BRAZE_TRANSPOSED
constexpr int ROWS_AHEAD = 8;  // rows of weights between what is loaded and what is prefetched

// Rows of the weight are runs of columns already: widen them, or interleave two for pairs along K.
template <bool Whole>
inline void pack_units(const Matrix& w, const Weight* row, int64_t u, int64_t columns, uint32_t* panel) {
#if BRAZE_PAIRED
  const __mmask32 valid = (__mmask32)((uint64_t(1) << columns) - 1);
  const __m512i even = _mm512_maskz_loadu_epi16(valid, row);
  const __m512i odd = _mm512_maskz_loadu_epi16(2 * u + 1 < w.k ? valid : 0, row + w.stride);
  const auto pairs = [](__m256i a, __m256i b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
  };
  _mm512_storeu_si512(panel, pairs(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
  _mm512_storeu_si512(panel + L, pairs(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1)));
#else
  const int left = static_cast<int>(columns);
  (Whole ? load_wide(row) : load_wide(row, std::min(left, L))).store(panel);
  (Whole ? load_wide(row + L) : load_wide(row + L, std::max(left - L, 0))).store(panel + L);
#endif
}

// Panels `size` units apart are packed together, so that memory is read in long runs.
inline void pack(const Matrix& w, Columns columns, uint32_t* panels, int64_t size) {
  for (int64_t u = 0; u * UNIT < w.k; ++u) {
    const Weight* row = w.column(columns.first) + u * UNIT * w.stride;
    for (int i = 0; i < UNIT; ++i)
      for (int64_t j = 0; j < columns.count; j += 64 / sizeof(Weight)) prefetch(row + (ROWS_AHEAD + i) * w.stride + j);
    uint32_t* unit = panels + u * NR;
    int64_t n = 0;
    for (; n + NR <= columns.count; n += NR, unit += size) pack_units<true>(w, row + n, u, NR, unit);
    if (n < columns.count) pack_units<false>(w, row + n, u, columns.count - n, unit);
  }
  for (int64_t u = (w.k + UNIT - 1) / UNIT; u < panel_depth(w.k) / UNIT; ++u)
    for (int64_t n = 0; n < columns.count; n += NR) std::memset(panels + n / NR * size + u * NR, 0, NR * sizeof(uint32_t));
}
#else
constexpr int WORD = 4 / sizeof(Weight);  // weights in 4 bytes

// dst[u][j] = the u-th word of column j, for `valid` <= L columns and `elements` <= L * WORD weights each, else zero.
inline void transpose_words(const Weight* src, int64_t pitch, int64_t valid, int64_t elements, float* dst, int64_t ld) {
  if (valid == L && elements == L * WORD && pitch % WORD == 0)
    return at::vec::transpose_mxn<float, L, L>(reinterpret_cast<const float*>(src), pitch / WORD, dst, ld);
  alignas(64) float buffer[L][L] = {};
  for (int64_t j = 0; j < valid; ++j) std::memcpy(buffer[j], src + j * pitch, elements * sizeof(Weight));
  at::vec::transpose_mxn<float, L, L>(&buffer[0][0], L, dst, ld);
}

// L columns x L words are transposed at a time.
inline void pack(const Matrix& w, Columns columns, uint32_t* panels, int64_t size) {
  const int64_t pitch = columns.step * w.stride;
  for (int64_t n = 0; n < columns.count; n += L) {
    uint32_t* panel = panels + n / NR * size + n % NR;
    const int64_t valid = std::min<int64_t>(columns.count - n, L);
    for (int64_t k = 0; k < w.k; k += L * WORD) {
      const int64_t elements = std::min<int64_t>(L * WORD, w.k - k);
      const Weight* src = w.column(columns.first + n * columns.step) + k;
      for (int64_t j = 0; j < valid; ++j) prefetch(src + j * pitch + 2 * L * WORD);
      alignas(64) float words[L][L];
      transpose_words(src, pitch, valid, elements, &words[0][0], L);
      for (int u = 0; u < L; ++u) {
#if BRAZE_SPLIT
        const __m512i both = _mm512_load_si512(words[u]);
        part<0>(both).store(panel + (k + u) * NR);
        part<1>(both).store(panel + (k + L + u) * NR);
#else
        if (!BRAZE_AMX && k + u * WORD >= w.k) break;
        if constexpr (UNIT == WORD) {
          V::loadu(words[u]).store(panel + (k / UNIT + u) * NR);
        } else {
          const Weight* pairs = reinterpret_cast<const Weight*>(words[u]);
          for (int i = 0; i < WORD && k + u * WORD + i < w.k; ++i) {
            alignas(64) Weight one[L];
            for (int j = 0; j < L; ++j) one[j] = pairs[j * WORD + i];
            load_wide(one).store(panel + (k + u * WORD + i) * NR);
          }
        }
#endif
      }
    }
  }
}
#endif

// Lines of memory to prefetch, one a step of a product: `pitch` bytes apart from `at` on.
struct Lines {
  const char* at;
  int64_t pitch;
};

// The part of a block that the i-th product of `steps` steps should prefetch; the same line over and over where all is done.
inline Lines part_of(const Block& block, int64_t i, int64_t steps) {
  const bool woven = block.groups[0].step > 1;  // the first group's memory holds the second
  for (int g = 0; g < (woven ? 1 : block.group_count); ++g) {
    const Columns& columns = block.groups[g];
    const Matrix& w = block.w[g];
    const char* begin = reinterpret_cast<const char*>(w.column(columns.first));
    const int64_t row = w.stride * int64_t(sizeof(Weight));
#if BRAZE_TRANSPOSED
    const int64_t parts = (columns.count * int64_t(sizeof(Weight)) + 63) / 64 * UNIT;  // lines of a row, of UNIT rows a step
    if (i < parts) return {begin + i / UNIT * 64 + i % UNIT * row, UNIT * row};
#else
    const int64_t parts = (columns.count * columns.step * row + steps * 64 - 1) / (steps * 64);
    if (i < parts) return {begin + i * steps * 64, 64};
#endif
    i -= parts;
  }
  return {reinterpret_cast<const char*>(block.w[0].base), 0};
}

// c[m][0:NR] = rows[m] @ panel, while `ahead` is prefetched into L2.
template <int M>
inline void panel_tile(const Operand* const* rows, const uint32_t* panel, int64_t k, Lines ahead, float* c) {
  V acc[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = V(0.f);
  int64_t i = 0;
  for (; i + UNIT <= k; i += UNIT, panel += NR) {
    __builtin_prefetch(ahead.at, 0, 2);
    ahead.at += ahead.pitch;
    const Step b0 = load_unit(panel), b1 = load_unit(panel + L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Step a = splat(rows[m] + i);
      acc[m][0] = madd(a, b0, acc[m][0]);
      acc[m][1] = madd(a, b1, acc[m][1]);
    }
  }
  if (i < k) {
    const Step b0 = load_unit(panel), b1 = load_unit(panel + L);
    for (int m = 0; m < M; ++m) {
      const Step a = splat_last(rows[m] + i);
      acc[m][0] = madd(a, b0, acc[m][0]);
      acc[m][1] = madd(a, b1, acc[m][1]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    acc[m][0].store(c + m * TILE_STRIDE);
    acc[m][1].store(c + m * TILE_STRIDE + L);
  }
}
