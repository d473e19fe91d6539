// Products that read rows of weights in place: for few rows, where a weight is contiguous along N.
//
// A few rows of weights are walked together along all columns of the task, their sums kept in the tile: memory is read
// in long runs, each page once or twice.

constexpr int64_t STRIP_BYTES = 32768;  // of a tile, to stay in L1
constexpr int STRIP_DEPTH = L == 16 ? 8 : 4;  // rows of weights walked together

// c[m][0 : count] += rows[m][k : k + D] @ w[0 : D][0 : count] for M rows; what lies `ahead` elements on is prefetched.
template <int M, int D>
inline void strip_rows(
    const Operand* const* rows, int64_t k, const Weight* w, int64_t stride, int64_t ahead, int64_t count, float* c) {
  V x[M][D];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d) x[m][d] = V(widen(rows[m][k + d]));
  auto step = [&](int64_t n, auto&& load) {
    V b[D];
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d) b[d] = load(w + d * stride + n);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      V acc = V::loadu(c + m * TILE_STRIDE + n);
#pragma GCC unroll 16
      for (int d = 0; d < D; ++d) acc = at::vec::fmadd(x[m][d], b[d], acc);
      acc.store(c + m * TILE_STRIDE + n);
    }
  };
  int64_t n = 0;
  for (; n + L <= count; n += L) {
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d) prefetch(w + d * stride + ahead + n);
    step(n, [](const Weight* p) { return load_wide(p); });
  }
  if (n < count) step(n, [&](const Weight* p) { return load_wide(p, static_cast<int>(count - n)); });
}

inline void strip_group(const Matrix& w, Columns columns, const Operand* const* rows, int count, float* c) {
  for (int m = 0; m < count; ++m) std::fill_n(c + m * TILE_STRIDE, (columns.count + L - 1) / L * L, 0.f);
  const int tiles = (count + STRIP_ROWS - 1) / STRIP_ROWS;
  for (int64_t k = 0; k < w.k;) {
    const int64_t depth = k + STRIP_DEPTH <= w.k ? STRIP_DEPTH : 1;
    const Weight* block = w.column(columns.first) + k * w.stride;
    for (int t = 0, done = 0; t < tiles; ++t) {
      const int m = (count - done + tiles - t - 1) / (tiles - t);
      const int64_t ahead = t == 0 && k + 2 * STRIP_DEPTH <= w.k ? STRIP_DEPTH * w.stride : 0;
      with_height<STRIP_ROWS>(m, [&](auto height) {
        float* out = c + done * TILE_STRIDE;
        if (depth == 1)
          strip_rows<height(), 1>(rows + done, k, block, w.stride, ahead, columns.count, out);
        else
          strip_rows<height(), STRIP_DEPTH>(rows + done, k, block, w.stride, ahead, columns.count, out);
      });
      done += m;
    }
    k += depth;
  }
}

// As dot_block.
inline void strip_block(const Block& block, const Operand* const* rows, int count, float* c) {
  for (int g = 0; g < block.group_count; ++g) strip_group(block.w[g], block.groups[g], rows, count, c + g * GROUP);
}
