// Products that run along K and read weights in place, once: for few rows, where a weight column is contiguous along K.

constexpr int64_t AHEAD = 8192 / sizeof(Weight);  // weights between what is multiplied and what is prefetched
constexpr int LINE_ROWS = 2;  // rows for which columns are read one after the other, in one run of memory

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

// c[m][n] = rows[m] . columns[n] for M rows and ND columns, each contiguous along K; ND columns that begin at `next`, `pitch`
// weights apart, are prefetched.
template <int M>
inline void dot_tile(
    const Operand* const* rows, const Weight* const* w, int64_t k, const Weight* next, int64_t pitch, float* c) {
  constexpr int S = L * UNIT * PARTS;
  V acc[M][ND];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < ND; ++n) acc[m][n] = V(0.f);
  int64_t i = 0;
  for (; i + S <= k; i += S) {
#pragma GCC unroll 8
    for (int n = 0; n < ND; ++n) prefetch(next + n * pitch + i);
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

// The lanes of sums[m * ND] add up to rows[m] . w, for M rows and one column.
template <int M>
inline void dot_line(const Operand* const* rows, const Weight* w, int64_t k, const Weight* next, V* sums) {
  constexpr int S = L * UNIT * PARTS;
  constexpr int U = (M == 1 ? 8 : M == 2 ? 4 : 2) / PARTS;
  V acc[U * PARTS][M];
#pragma GCC unroll 8
  for (int u = 0; u < U * PARTS; ++u)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[u][m] = V(0.f);
  int64_t i = 0;
  for (; i + U * S <= k; i += U * S) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      prefetch(next + i + u * S);
      each_part([&](auto part) {
        const Step b = load_part<part()>(w + i + u * S);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          V& sum = acc[u * PARTS + part()][m];
          sum = madd(load_operand(rows[m] + i + u * S + part() * L), b, sum);
        }
      });
    }
  }
  for (; i < k; i += S) {
    prefetch(next + i);
    const int64_t left = std::min<int64_t>(S, k - i);
    each_part([&](auto part) {
      const Step b = left == S ? load_part<part()>(w + i) : load_part<part()>(w + i, left);
      for (int m = 0; m < M; ++m) {
        const Operand* row = rows[m] + i + part() * L;
        acc[0][m] = madd(left == S ? load_operand(row) : load_operand(row, left), b, acc[0][m]);
      }
    });
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    V sum = acc[0][m];
#pragma GCC unroll 8
    for (int u = 1; u < U * PARTS; ++u) sum = sum + acc[u][m];
    sums[m * ND] = sum;
  }
}

// The products of all columns. Of what is read after them, which begins at `then` and is spaced alike, the beginning is
// prefetched: a task that started on what is not yet on its way would wait for each line of it.
inline void dot_block(
    const Matrix& w, Columns columns, const Operand* const* rows, int count, const Weight* then, float* c) {
  const int64_t pitch = columns.step * w.stride;
  const auto column = [&](int64_t n) { return w.column(columns.first + n * columns.step); };
  const auto after = [&](int64_t n, int64_t group) {  // `group` columns are read together
    n += (AHEAD + w.k * group - 1) / (w.k * group) * group;
    return n < columns.count ? column(n) : then + (n - columns.count) * pitch;
  };
  if (count <= LINE_ROWS) {
    with_height<LINE_ROWS>(count, [&](auto height) {
      V sums[height() * ND] = {};
      for (int64_t n = 0; n < columns.count; ++n) {
        dot_line<height()>(rows, column(n), w.k, after(n, 1), sums + n % ND);
        if (n % ND == ND - 1 || n == columns.count - 1)
          for (int m = 0; m < height(); ++m) sum4(sums + m * ND, c + m * TILE_STRIDE + n / ND * ND);
      }
    });
    return;
  }
  const int tiles = (count + MD - 1) / MD;
  for (int64_t n = 0; n < columns.count; n += ND) {
    const Weight* col[ND];
    for (int j = 0; j < ND; ++j) col[j] = column(std::min(n + j, columns.count - 1));
    for (int t = 0, done = 0; t < tiles; ++t) {
      const int m = (count - done + tiles - t - 1) / (tiles - t);
      with_height<MD>(m, [&](auto height) {
        float* out = c + done * TILE_STRIDE + n;
        dot_tile<height()>(rows + done, col, w.k, t == 0 ? after(n, ND) : col[0], t == 0 ? pitch : 0, out);
      });
      done += m;
    }
  }
}
