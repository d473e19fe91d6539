// A router's logits for few rows, each weight read once, and what route.h makes of them in the same call.
//
// logits[t] = x[t] . w[e] (+ b[e]), summed in float32 and rounded to the dtype that the product has in the graph.
//
// Expects route.h; X and Gate, the dtypes of x and w. The namespace ends here.

constexpr int64_t FEW = 8;          // rows at most: what one reading of a weight serves
constexpr int64_t SHARE = 1 << 17;  // bytes of weights for which another thread pays

// out[t * stride] = x[t] . w for N rows; several sums a row while rows are few, since an addition takes four cycles.
template <int N>
inline void dots(const X* const* x, const Gate* w, int64_t hidden, float* out, int64_t stride) {
  constexpr int U = N <= 2 ? 4 : N <= 4 ? 2 : 1;
  V sum[N][U];
  for (int t = 0; t < N; ++t)
    for (int u = 0; u < U; ++u) sum[t][u] = V(0.f);
  int64_t i = 0;
  for (; i + U * L <= hidden; i += U * L)
    for (int u = 0; u < U; ++u) {
      const V b = load_wide(w + i + u * L);
      for (int t = 0; t < N; ++t) sum[t][u] = at::vec::fmadd(load_wide(x[t] + i + u * L), b, sum[t][u]);
    }
  for (int t = 0; t < N; ++t) {
    for (int u = 1; u < U; ++u) sum[t][0] = sum[t][0] + sum[t][u];
    float total = at::vec::vec_reduce_all<float>([](V& a, V& b) { return a + b; }, sum[t][0]);
    for (int64_t j = i; j < hidden; ++j) total += static_cast<float>(x[t][j]) * static_cast<float>(w[j]);
    out[t * stride] = total;
  }
}

inline float rounded(float v, int64_t dtype) {
  switch (dtype) {
    case F32: return v;
    case BF16: return static_cast<float>(static_cast<at::BFloat16>(v));
    default: return static_cast<float>(static_cast<at::Half>(v));
  }
}

// All logits of `rows` tokens; each thread has a stretch of w.
inline void products(
    const X* x, int64_t x_stride, const Gate* w, int64_t w_stride, const void* b, int64_t b_offset,
    int64_t b_dtype, int64_t logits_dtype, int64_t rows, int64_t hidden, int64_t all, float* logits, int64_t threads) {
  const X* row[FEW];
  for (int64_t t = 0; t < rows; ++t) row[t] = x + t * x_stride;
  threads = std::max<int64_t>(1, std::min<int64_t>(threads, all * hidden * sizeof(Gate) / SHARE));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t e = 0; e < all; ++e) {
    with_height<FEW>(rows, [&](auto height) { dots<height()>(row, w + e * w_stride, hidden, logits + e, all); });
    float add = 0.f;
    if (b_dtype != NONE) read(b, b_offset + e, 1, 1, b_dtype, &add);
    for (int64_t t = 0; t < rows; ++t) logits[t * all + e] = rounded(logits[t * all + e] + add, logits_dtype);
  }
}

}  // namespace braze_kernel

extern "C" void kernel(
    void* weights, void* ids, const void* x, const void* w, const void* b, const void* bias, int64_t weights_dtype,
    int64_t wide_ids, int64_t x_stride, int64_t w_stride, int64_t b_dtype, int64_t logits_dtype, int64_t hidden,
    int64_t bias_dtype, int64_t x_offset, int64_t w_offset, int64_t b_offset, int64_t bias_offset, int64_t rows,
    int64_t experts, int64_t shared, int64_t top_k, int64_t scoring, int64_t on_scores, int64_t groups,
    int64_t open, int64_t top2, int64_t zero, int64_t renorm, float eps,
    float scale) {
  using namespace braze_kernel;
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  const int64_t all = experts + shared;
  std::vector<float> logits(rows * all), wide_bias(experts);
  products(
      static_cast<const X*>(x) + x_offset, x_stride, static_cast<const Gate*>(w) + w_offset, w_stride, b, b_offset,
      b_dtype, logits_dtype, rows, hidden, all, logits.data(), threads);
  const Problem p{
      logits.data(), bias, F32, bias_dtype, all, 1, experts, shared, top_k, scoring, on_scores, groups, open, top2, zero,
      renorm, eps, scale};
  if (bias_dtype != NONE) read(bias, bias_offset, experts, 1, bias_dtype, wide_bias.data());
  for (int64_t t = 0; t < rows; ++t) route(p, wide_bias.data(), t, weights, weights_dtype, ids, wide_ids);
}
