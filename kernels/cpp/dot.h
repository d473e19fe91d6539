// Products that run along K and read weights in place, once: for few rows, where a weight column is contiguous along K.

constexpr int64_t AHEAD = 4096 / sizeof(Weight);  // weights between what is multiplied and what is prefetched
// Columns are read one after the other, in one run of memory, for as few rows as stay in L1 between two columns.
constexpr int LINE_ROWS = 8;
constexpr int64_t LINE_BYTES = 32768;

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

// c[m][n] = rows[m] . columns[n] for M rows and ND columns, each contiguous along K; what lies `ahead` weights after them
// is prefetched.
template <int M>
inline void dot_tile(const Operand* const* rows, const Weight* const* w, int64_t k, int64_t ahead, float* c) {
  constexpr int S = L * UNIT * PARTS;
  V acc[M][ND];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < ND; ++n) acc[m][n] = V(0.f);
  int64_t i = 0;
  for (; i + S <= k; i += S) {
#pragma GCC unroll 8
    for (int n = 0; n < ND; ++n) prefetch(w[n] + ahead + i);
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

// The lanes of sums[m * ND] add up to rows[m] . w, for M rows and one column; what lies AHEAD of it is prefetched.
template <int M>
inline void dot_line(const Operand* const* rows, const Weight* w, int64_t k, V* sums) {
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
      prefetch(w + AHEAD + i + u * S);
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
    prefetch(w + AHEAD + i);
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
#pragma GCC unroll 4
    for (int half = U * PARTS / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int u = 0; u < half; ++u) acc[u][m] = acc[u][m] + acc[u + half][m];
    sums[m * ND] = acc[0][m];
  }
}

// The products of all columns of a block, of its groups in turn: each is one long run of memory.
inline void dot_block(const Block& block, const Operand* const* rows, int count, float* c) {
  const auto& [w, groups, group_count] = block;
  const auto column = [&](int g, int64_t n) { return w[g].column(groups[g].first + n * groups[g].step); };
  const int64_t columns = groups[0].count, k = w->k;
  if (count == 1 || (count <= LINE_ROWS && count * depth(k) * int64_t(sizeof(Operand)) <= LINE_BYTES)) {
    with_height<LINE_ROWS>(count, [&](auto height) {
      V sums[2][height() * ND] = {};
      for (int64_t n = 0; n < columns; ++n)
        for (int g = 0; g < group_count; ++g) {
          dot_line<height()>(rows, column(g, n), k, sums[g] + n % ND);
          if (n % ND == ND - 1 || n == columns - 1)
            for (int m = 0; m < height(); ++m) sum4(sums[g] + m * ND, c + m * TILE_STRIDE + g * GROUP + n / ND * ND);
        }
    });
    return;
  }
  const int tiles = (count + MD - 1) / MD;
  for (int g = 0; g < group_count; ++g)
    for (int64_t n = 0; n < columns; n += ND) {
      const Weight* col[ND];
      for (int j = 0; j < ND; ++j) col[j] = column(g, std::min(n + j, columns - 1));
      const int64_t ahead = (AHEAD + k * ND - 1) / (k * ND) * ND * (groups[g].step * w[g].stride);
      for (int t = 0, done = 0; t < tiles; ++t) {
        const int m = (count - done + tiles - t - 1) / (tiles - t);
        with_height<MD>(m, [&](auto height) {
          dot_tile<height()>(rows + done, col, k, t == 0 ? ahead : 0, c + done * TILE_STRIDE + g * GROUP + n);
        });
        done += m;
      }
    }
}
