// Products with packed columns on the CPU's matrix unit (AMX): tiles of 16 rows of 64 bytes, pairs of bfloat16 along K.
//
// A panel's 16 units of 16 columns are a tile as they lie. Rows are copied where they do not lie at equal distances, or
// where K is no multiple of a tile. BRAZE_AMX: 1, as machine instructions; 2, computed by plain code (to be tested anywhere).

#if BRAZE_AMX
#if BRAZE_AMX == 2
struct PlainTile {
  alignas(64) uint8_t at[16][64];
};
inline thread_local PlainTile plain_tiles[8];
inline void plain_load(int tile, const void* from, int64_t pitch) {
  for (int i = 0; i < 16; ++i) std::memcpy(plain_tiles[tile].at[i], static_cast<const char*>(from) + i * pitch, 64);
}
inline void plain_store(int tile, void* to, int64_t pitch) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * pitch, plain_tiles[tile].at[i], 64);
}
inline void plain_dot(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, plain_tiles[c].at[m] + 4 * n, 4);
      for (int k = 0; k < 32; ++k) {
        at::BFloat16 x, y;
        std::memcpy(&x, plain_tiles[a].at[m] + 2 * k, 2);
        std::memcpy(&y, plain_tiles[b].at[k / 2] + 4 * n + k % 2 * 2, 2);
        sum += widen(x) * widen(y);
      }
      std::memcpy(plain_tiles[c].at[m] + 4 * n, &sum, 4);
    }
}
#define AMX_TARGET
#define AMX_ZERO(t) plain_tiles[t] = {}
#define AMX_LOAD plain_load
#define AMX_STORE plain_store
#define AMX_DOT plain_dot
#else
#define AMX_TARGET __attribute__((target("amx-tile,amx-bf16")))
#define AMX_ZERO _tile_zero
#define AMX_LOAD _tile_loadd
#define AMX_STORE _tile_stored
#define AMX_DOT _tile_dpbf16ps
#endif

// Whether the operating system lets this process use tiles: it has to be asked once.
inline bool has_amx() {
#if BRAZE_AMX == 2
  return true;
#else
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return allowed;
#endif
}

// The tiles of this thread, whole, as long as it lives.
struct Tiles {
  const bool used;
  AMX_TARGET explicit Tiles(bool used) : used(used) {
#if BRAZE_AMX == 1
    if (!used) return;
    struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
#endif
  }
  AMX_TARGET ~Tiles() {
#if BRAZE_AMX == 1
    if (used) _tile_release();
#endif
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// c[m][0:NR] = a[m] @ panel for 16 rows, or 32 where `Both`, over `blocks` tiles along K; `ahead` is prefetched meanwhile.
template <bool Both>
AMX_TARGET void amx_panel(const Operand* a, int64_t a_stride, const uint32_t* panel, int64_t blocks, Lines ahead, float* c) {
  const int64_t pitch = a_stride * sizeof(Operand);
  AMX_ZERO(0);
  AMX_ZERO(1);
  if constexpr (Both) {
    AMX_ZERO(2);
    AMX_ZERO(3);
  }
  for (int64_t b = 0; b < blocks; ++b, a += TILE_DEPTH, panel += TILE_HEIGHT * NR) {
    for (int i = 0; i < TILE_HEIGHT; ++i, ahead.at += ahead.pitch) __builtin_prefetch(ahead.at, 0, 2);
    AMX_LOAD(4, a, pitch);
    AMX_LOAD(6, panel, NR * sizeof(uint32_t));
    AMX_LOAD(7, panel + L, NR * sizeof(uint32_t));
    AMX_DOT(0, 4, 6);
    AMX_DOT(1, 4, 7);
    if constexpr (Both) {
      AMX_LOAD(5, a + TILE_HEIGHT * a_stride, pitch);
      AMX_DOT(2, 5, 6);
      AMX_DOT(3, 5, 7);
    }
  }
  AMX_STORE(0, c, TILE_STRIDE * sizeof(float));
  AMX_STORE(1, c + L, TILE_STRIDE * sizeof(float));
  if constexpr (Both) {
    AMX_STORE(2, c + TILE_HEIGHT * TILE_STRIDE, TILE_STRIDE * sizeof(float));
    AMX_STORE(3, c + TILE_HEIGHT * TILE_STRIDE + L, TILE_STRIDE * sizeof(float));
  }
}

// `count` rows as the tiles' rows, up to BLOCK_ROWS of them: where they lie, if they can be read as they are, or a copy.
inline const Operand* block_rows(const Operand* const* rows, int count, int64_t k, Operand* copy, int64_t* stride) {
  *stride = count > 1 ? rows[1] - rows[0] : 0;
  bool spaced = k % TILE_DEPTH == 0 && count % TILE_HEIGHT == 0;
  for (int m = 2; spaced && m < count; ++m) spaced = rows[m] - rows[m - 1] == *stride;
  if (spaced) return rows[0];
  *stride = row_pitch(k);
  const int whole = (count + TILE_HEIGHT - 1) / TILE_HEIGHT * TILE_HEIGHT;
  for (int m = 0; m < whole; ++m) {
    Operand* to = copy + m * *stride;
    if (m < count) std::memcpy(to, rows[m], k * sizeof(Operand));
    const int64_t from = m < count ? k : 0;
    std::memset(static_cast<void*>(to + from), 0, (panel_depth(k) - from) * sizeof(Operand));
  }
  return copy;
}
#endif
