// Products that run along K and read weights in place, once: for few rows, where a weight column is contiguous along K.

// The sums of the lanes of four vectors.
inline void sum4(const V* v, float* out) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = at::vec::vec_reduce_all<float>([](V a, V b) { return a + b; }, v[i]);
#endif
}

// c[m][n] = rows[m] . columns[n] for M rows and ND columns, each contiguous along K; `ahead` columns on are prefetched.
template <int M>
inline void dot_tile(const Operand* const* rows, const Weight* const* w, int64_t k, int64_t ahead, float* c) {
  constexpr int S = L * UNIT * PARTS;
  V acc[M][ND];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < ND; ++n) acc[m][n] = V(0.f);
  int64_t i = 0;
  for (; i + S <= k; i += S) {
#pragma GCC unroll 8
    for (int n = 0; n < ND; ++n) prefetch(w[n] + i + ahead);
    each_part([&](auto part) {
      Step b[ND];
#pragma GCC unroll 8
      for (int n = 0; n < ND; ++n) b[n] = load_part<part()>(w[n] + i);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Step a = load_operand(rows[m] + i + part() * L);
#pragma GCC unroll 8
        for (int n = 0; n < ND; ++n) acc[m][n] = madd(a, b[n], acc[m][n]);
      }
    });
  }
  if (i < k) {
    each_part([&](auto part) {
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < ND; ++n)
          acc[m][n] = madd(
              load_operand(rows[m] + i + part() * L, k - i), load_part<part()>(w[n] + i, k - i), acc[m][n]);
    });
  }
  for (int m = 0; m < M; ++m) sum4(acc[m], c + m * TILE_STRIDE);
}

// Calls f with a compile-time height for `m` rows, 1..Max.
template <int Max, class F>
inline void with_height(int m, F&& f) {
  if constexpr (Max > 1) {
    if (m < Max) return with_height<Max - 1>(m, f);
  }
  f(std::integral_constant<int, Max>{});
}

inline void dot_block(const Matrix& w, Columns columns, const Operand* const* rows, int count, float* c) {
  const int tiles = (count + MD - 1) / MD;
  for (int64_t n = 0; n < columns.count; n += ND) {
    const Weight* col[ND];
    for (int j = 0; j < ND; ++j) col[j] = w.column(columns.first + std::min(n + j, columns.count - 1) * columns.step);
    const int64_t ahead = n + ND < columns.count ? ND * columns.step * w.stride : 0;
    for (int t = 0, done = 0; t < tiles; ++t) {
      const int m = (count - done + tiles - t - 1) / (tiles - t);
      with_height<MD>(m, [&](auto height) {
        dot_tile<height()>(rows + done, col, w.k, t == 0 ? ahead : 0, c + done * TILE_STRIDE + n);
      });
      done += m;
    }
  }
}
