// Products of a few gathered rows with a block of one expert's columns, into a small fp32 tile: in place where rows are
// few (dot.h, strip.h), on packed columns otherwise (panel.h).

// Where a product leaves its results, and its panels; one a thread.
struct Workspace {
  float* tile;       // [TILE_ROWS][TILE_STRIDE]
  uint32_t* panels;  // [PANELS][K / UNIT][NR]
  Operand* rows;     // [BLOCK_ROWS][row_pitch(K)], for the matrix unit
};

// rows [count] times a block, whose group i lies at tile[:, i * GROUP :]. `done(first, count)` is called for each run of rows
// once the tile holds it. More than ROWS_IN_PLACE rows take PANEL_COLUMNS columns in all: packing them reads memory only,
// multiplying them computes only, so what is packed next, where that is known, is brought into L2 meanwhile.
template <class Done>
__attribute__((always_inline)) inline void multiply(
    const Block& block, const Block* next, const Operand* const* rows, int64_t count, const Workspace& space,
    Done&& done) {
  if (count <= ROWS_IN_PLACE) {
    (BRAZE_TRANSPOSED ? strip_block : dot_block)(block, rows, count, space.tile);
    done(0, count);
    return;
  }
  const int64_t k = block.w->k, steps = panel_depth(k) / UNIT, size = steps * NR;
  float* place[PANELS];
  int panels = 0;
  for (int g = 0; g < block.group_count; ++g) {
    pack(block.w[g], block.groups[g], space.panels + panels * size, size);
    for (int64_t n = 0; n < block.groups[g].count; n += NR) place[panels++] = space.tile + g * GROUP + n;
  }
  const auto ahead_of = [&](int64_t i) {
    return next ? part_of(*next, i, steps) : Lines{reinterpret_cast<char*>(space.tile), 0};
  };
#if BRAZE_AMX
  if (has_amx()) {
    for (int64_t first = 0, t = 0; first < count; first += BLOCK_ROWS, ++t) {
      const int m = std::min<int64_t>(BLOCK_ROWS, count - first);
      int64_t stride;
      const Operand* a = block_rows(rows + first, m, k, space.rows, &stride);
      for (int i = 0; i < panels; ++i)
        (m > TILE_HEIGHT ? amx_panel<true> : amx_panel<false>)(
            a, stride, space.panels + i * size, panel_depth(k) / TILE_DEPTH, ahead_of(t * panels + i), place[i]);
      done(first, m);
    }
    return;
  }
#endif
  const int64_t tiles = (count + MR - 1) / MR;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int m = (count - first + tiles - t - 1) / (tiles - t);
    for (int i = 0; i < panels; ++i) {
      const Lines ahead = ahead_of(t * panels + i);
      with_height<MR>(m, [&](auto height) {
        panel_tile<height()>(rows + first, space.panels + i * size, depth(k), ahead, place[i]);
      });
    }
    done(first, m);
    first += m;
  }
}
