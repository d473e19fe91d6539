// out[t] = scale * sum_j wo (act(wi x[t] @ W1[e] + b1[e]) @ W2[e] + b2[e]),  e = ids[t, j]
//
// Rows (token, slot) are listed by expert, and the work is cut by columns: of the first product for each expert by its
// true count of rows, of the second across all experts, so that one thread owns a block of the output and adds experts
// up in order. Hence no atomics, and the result does not depend on the number of threads.
//
// Expects product.h, problem.h, tasks.h; `V activation(V g, V u)`.

// The columns of W1 behind act columns [first, first + count): in one group g, u, g, u ..., or in a group each.
inline Block first_block(const Problem& p, int64_t expert, int64_t first, int64_t count) {
  Block block;
  for (int g = 0; g < 2; ++g)
    block.w[g] = {p.w1.at(expert * APART + (APART == 2 ? g : 0)), p.w1_stride, p.hidden};
  const bool halves = BRAZE_LAYOUT_HALVES;
  if (GATES == 1 || WOVEN) {
    block.groups[0] = {GATES * first, 1, GATES * count};
    block.group_count = 1;
  } else {
    const bool own = APART == 2, step = !own && !halves;
    block.groups[0] = {step ? 2 * first : first, step ? 2 : 1, count};
    block.groups[1] = {own ? first : halves ? p.inner + first : 2 * first + 1, step ? 2 : 1, count};
    block.group_count = 2;
  }
  return block;
}

inline Block second_block(const Problem& p, int64_t expert, int64_t first, int64_t count) {
  return {{{p.w2.at(expert), p.w2_stride, p.inner}}, {{first, 1, count}}, 1};
}

// The biases of a block's columns, those of matrix i; of matrix i + 1 for a second group, where `apart`.
inline void load_bias(const Biases& bias, int64_t i, bool apart, const Block& block, float* out) {
  std::fill(out, out + TILE_COLUMNS, 0.f);
  if (!bias) return;
  for (int g = 0; g < block.group_count; ++g)
    for (int64_t n = 0; n < block.groups[g].count; ++n)
      out[g * GROUP + n] = bias.at(i + (apart ? g : 0), block.groups[g].first + n * block.groups[g].step);
}

// One row of the tile -> act columns, in the dtype and order they are multiplied in.
inline void activate(const float* c, const float* bias, float weight, int64_t count, Operand* out) {
  const V w(weight);
  auto at = [&](int64_t i) { return at::vec::fmadd(V::loadu(c + i), w, V::loadu(bias + i)); };
  auto columns = [&](int64_t j) {
    if constexpr (GATES == 1) return activation(at(j), V(0.f));
    if constexpr (WOVEN) {
      const auto [g, u] = at::vec::deinterleave2(at(2 * j), at(2 * j + L));
      return activation(g, u);
    }
    return activation(at(j), at(GROUP + j));
  };
  if constexpr (BRAZE_SPLIT) {
    for (int64_t j = 0; j < count; j += 2 * L) {
      const V lo = V::set(V(0.f), columns(j), std::min<int64_t>(L, count - j));
      const V hi = count - j > L ? V::set(V(0.f), columns(j + L), std::min<int64_t>(L, count - j - L)) : V(0.f);
      const auto [even, odd] = at::vec::deinterleave2(lo, hi);
      even.store(out + j);
      odd.store(out + j + L);
    }
  } else {
    for (int64_t j = 0; j < count; j += L) store(out + j, columns(j), std::min<int64_t>(L, count - j));
  }
}

// x where rows are multiplied as they are; otherwise a widened copy of it.
template <class T>
inline const Operand* operand_rows(const Problem& p, const T* x, Operand* copy, int64_t* stride) {
  if constexpr (std::is_same_v<Operand, T>) {
    *stride = p.x_stride;
    return x;
  } else {
    *stride = depth(p.hidden);
#pragma omp for
    for (int64_t t = 0; t < p.tokens; ++t) {
      const T* src = x + t * p.x_stride;
      Operand* dst = copy + t * depth(p.hidden);
#if BRAZE_SPLIT
      for (int64_t i = 0; i < p.hidden; i += 2 * L) {
        const __m512i both = load_some(src + i, std::min<int64_t>(2 * L, p.hidden - i));
        part<0>(both).store(dst + i);
        part<1>(both).store(dst + i + L);
      }
#else
      for (int64_t i = 0; i < p.hidden; i += L) {
        const int count = std::min<int64_t>(L, p.hidden - i);
        store(dst + i, count == L ? load_wide(src + i) : load_wide(src + i, count), count);
      }
#endif
    }
    return copy;
  }
}

using Rows = std::vector<const Operand*>;

// then: what this thread does next, if it is known.
inline void first_product(
    const Problem& p, const Routing& r, const Task& task, const Task* then, const Operand* x, int64_t x_stride,
    Operand* act, int64_t act_stride, const Workspace& space, Rows& rows) {
  rows.clear();
  for (int64_t s = task.begin; s < task.end; ++s) rows.push_back(x + r.token[s] * x_stride);
  Block next;
  if (then) next = first_block(p, then->expert, then->first, std::min<int64_t>(then->count, PANEL_COLUMNS / GATES));
  each_block(task, tile_columns(rows.size()) / GATES, [&](int64_t column, int64_t columns) {
    const Block block = first_block(p, task.expert, column, columns);
    float bias[TILE_COLUMNS];
    load_bias(p.b1, task.expert * APART, APART == 2, block, bias);
    multiply(block, then ? &next : nullptr, rows.data(), rows.size(), space, [&](int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t s = task.begin + first + i;
        const float weight = p.weight_on_input ? r.weight[s] : 1.f;
        activate(space.tile + i * TILE_STRIDE, bias, weight, columns, act + s * act_stride + column);
      }
    });
  });
}

// sums [tokens of the task][stride], a stride of the task's columns and more.
inline void second_product(
    const Problem& p, const Routing& r, const Task& task, const Task* then, const Operand* act, int64_t act_stride,
    float* sums, int64_t stride, const Workspace& space, Rows& rows) {
  std::fill(sums, sums + (task.end - task.begin) * stride, 0.f);
  for (size_t n = 0; n < r.used.size(); ++n) {
    const int64_t e = r.used[n];
    const auto bound = [&](int64_t token) {
      return std::lower_bound(r.token.begin() + r.begin[e], r.token.begin() + r.begin[e + 1], token) - r.token.begin();
    };
    const int64_t begin = bound(task.begin), end = bound(task.end);
    if (begin == end) continue;
    rows.clear();
    for (int64_t s = begin; s < end; ++s) rows.push_back(act + s * act_stride);
    const Task* after = n + 1 < r.used.size() ? &task : then;
    Block next;
    if (after)
      next = second_block(
          p, r.used[(n + 1) % r.used.size()], after->first, std::min<int64_t>(after->count, PANEL_COLUMNS));
    each_block(task, tile_columns(rows.size()), [&](int64_t column, int64_t count) {
      const Block block = second_block(p, e, column, count);
      float bias[TILE_COLUMNS];
      load_bias(p.b2, e, false, block, bias);
      multiply(block, after ? &next : nullptr, rows.data(), rows.size(), space, [&](int64_t first, int64_t height) {
        for (int64_t i = 0; i < height; ++i) {
          const int64_t s = begin + first + i;
          const V weight(p.weight_on_input ? 1.f : r.weight[s]);
          const float* c = space.tile + i * TILE_STRIDE;
          float* sum = sums + (r.token[s] - task.begin) * stride + column - task.first;
          for (int64_t j = 0; j < count; j += L)
            at::vec::fmadd(V::loadu(c + j) + V::loadu(bias + j), weight, V::loadu(sum + j)).store(sum + j);
        }
      });
    });
  }
  for (int64_t t = task.begin; t < task.end; ++t)
    for (int64_t j = 0; j < task.count; j += L)
      write(
          p.out, t * p.hidden + task.first + j, p.out_dtype,
          V::loadu(sums + (t - task.begin) * stride + j) * V(p.scale), std::min<int64_t>(L, task.count - j));
}

// Uninitialised memory aligned to a cache line.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* const data;
};

inline void moe(const Problem& p, const Routing& r, int threads) {
  int64_t most_rows = 1, most_tokens = 0, most_columns = 0;
  for (const int64_t e : r.used) most_rows = std::max(most_rows, r.begin[e + 1] - r.begin[e]);
  const bool packs = most_rows > ROWS_IN_PLACE;
  const std::vector<Task> first = first_tasks(p, r, threads), second = second_tasks(p, most_rows, threads);
  for (const Task& t : second) {
    most_tokens = std::max(most_tokens, t.end - t.begin);
    most_columns = std::max(most_columns, t.count);
  }
  // Rows that start a multiple of 4 KiB apart would compete for the same lines of the L1 cache.
  const int64_t act_stride = (p.inner + 31) / 32 * 32 + 32;
  const int64_t sum_stride = (most_columns + L - 1) / L * L + L;
  const int64_t deepest = std::max(p.hidden, p.inner), panel = panel_depth(deepest) / UNIT * NR;
  Buffer<Operand> act(r.begin[p.experts] * act_stride);
  Buffer<Operand> copy(std::is_same_v<Operand, Weight> ? 0 : p.tokens * depth(p.hidden));
  std::atomic<size_t> first_queue{0}, second_queue{0};
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> tile(TILE_ROWS * TILE_STRIDE), sums(most_tokens * sum_stride);
    Buffer<uint32_t> panels(packs ? PANELS * panel : 0);
#if BRAZE_AMX
    Buffer<Operand> block(packs ? BLOCK_ROWS * row_pitch(deepest) : 0);
    const Tiles tiles(packs && has_amx());
    const Workspace space{tile.data, panels.data, block.data};
#else
    const Workspace space{tile.data, panels.data, nullptr};
#endif
    Rows rows;
    rows.reserve(most_rows);
    int64_t x_stride;
    const Operand* x = operand_rows(p, p.x, copy.data, &x_stride);
    each_task(first_queue, first, packs, [&](const Task& task, const Task* then) {
      first_product(p, r, task, then, x, x_stride, act.data, act_stride, space, rows);
    });
#pragma omp barrier
    each_task(second_queue, second, packs, [&](const Task& task, const Task* then) {
      second_product(p, r, task, then, act.data, act_stride, sums.data, sum_stride, space, rows);
    });
  }
}

inline void run(
    void* out, const void* x, const void* ids, const void* router, const void* const* w1, const void* const* w2,
    const void* const* b1, const void* const* b2, int64_t out_dtype, int64_t ids_wide, int64_t router_dtype, int64_t b1_dtype, int64_t b2_dtype,
    int64_t tokens, int64_t hidden, int64_t inner, int64_t experts, int64_t top_k, int64_t x_stride,
    int64_t ids_stride0, int64_t ids_stride1, int64_t router_stride0, int64_t router_stride1, int64_t w1_expert,
    int64_t w1_stride, int64_t w2_expert, int64_t w2_stride, int64_t b1_stride0, int64_t b1_stride1,
    int64_t b2_stride0, int64_t b2_stride1, int64_t weight_on_input, float scale) {
  const Problem p{
      tokens, hidden, inner, experts, top_k, static_cast<const Weight*>(x), x_stride,
      {w1, w1_expert}, {w2, w2_expert}, w1_stride, w2_stride,
      {router, router_dtype, router_stride0, router_stride1}, {b1, b1_dtype, b1_stride0, b1_stride1},
      {b2, b2_dtype, b2_stride0, b2_stride1}, weight_on_input != 0, scale, out, out_dtype};
  const Routing r = router_dtype == NONE ? of_one_expert(p)
      : ids_wide ? route(p, static_cast<const int64_t*>(ids), ids_stride0, ids_stride1)
                 : route(p, static_cast<const int32_t*>(ids), ids_stride0, ids_stride1);
#ifdef _OPENMP
  moe(p, r, omp_get_max_threads());
#else
  moe(p, r, 1);
#endif
}

}  // namespace braze_kernel
