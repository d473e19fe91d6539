// The call of a router that is given logits. Expects route.h; the namespace ends here.

}  // namespace braze_kernel

extern "C" void kernel(
    void* weights, void* ids, const void* logits, const void* bias, int64_t weights_dtype, int64_t wide_ids,
    int64_t logits_dtype, int64_t bias_dtype, int64_t rows, int64_t row_stride, int64_t expert_stride, int64_t experts,
    int64_t shared, int64_t top_k, int64_t scoring, int64_t on_scores, int64_t groups, int64_t open, int64_t top2,
    int64_t zero, int64_t renorm, float eps, float scale, int64_t threads) {
  using namespace braze_kernel;
  const Problem p{
      logits, bias, logits_dtype, bias_dtype, row_stride, expert_stride, experts, shared, top_k, scoring, on_scores,
      groups, open, top2, zero, renorm, eps, scale};
  float wide_bias[MOST];
  if (bias_dtype != NONE) read(bias, 0, experts, 1, bias_dtype, wide_bias);
  threads = std::max<int64_t>(1, std::min(threads, rows * experts / GRAIN));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < rows; ++t) route(p, wide_bias, t, weights, weights_dtype, ids, wide_ids);
}
