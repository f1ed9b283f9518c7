// The tile intrinsics as plain loops, for machines without AMX: same arithmetic as the instructions (Intel's manual,
// TDPBSUD and TDPBF16PS), and a stop where the processor would fault. Denormal numbers are not flushed to zero.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace phl {
namespace PHL_NS {
namespace {

struct EmulatedTiles {
  bool configured = false;
  int rows[8] = {}, row_bytes[8] = {};
  uint8_t data[8][16][64] = {};

  static void demand(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "AMX fault: %s\n", what);
    std::abort();
  }
  void demand_shape(int tile) const {
    demand(configured && rows[tile] > 0 && row_bytes[tile] > 0, "a tile without a shape");
  }

  void load_config(const void* at) {
    uint8_t bytes[64];
    std::memcpy(bytes, at, 64);
    demand(bytes[0] == 1 && bytes[1] == 0, "palette or first row");
    for (int i = 2; i < 16; ++i) demand(bytes[i] == 0, "reserved bytes");
    for (int tile = 0; tile < 16; ++tile) {
      uint16_t width;
      std::memcpy(&width, bytes + 16 + 2 * tile, 2);
      demand(width <= 64 && bytes[48 + tile] <= 16 && (tile < 8 || width + bytes[48 + tile] == 0), "a tile too large");
      demand((width == 0) == (bytes[48 + tile] == 0), "a tile half there");
      if (tile < 8) rows[tile] = bytes[48 + tile], row_bytes[tile] = width;
    }
    std::memset(data, 0, sizeof data);
    configured = true;
  }
  void zero(int tile) {
    demand_shape(tile);
    std::memset(data[tile], 0, sizeof data[tile]);
  }
  void load(int tile, const void* from, int64_t stride) {
    zero(tile);
    for (int r = 0; r < rows[tile]; ++r) {
      std::memcpy(data[tile][r], static_cast<const uint8_t*>(from) + r * stride, size_t(row_bytes[tile]));
    }
  }
  void store(int tile, void* to, int64_t stride) const {
    demand_shape(tile);
    for (int r = 0; r < rows[tile]; ++r) {
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, data[tile][r], size_t(row_bytes[tile]));
    }
  }
  void demand_product(int c, int a, int b) const {
    demand_shape(a), demand_shape(b), demand_shape(c);
    demand(a != b && b != c && a != c, "one tile twice");
    demand(rows[a] == rows[c] && row_bytes[b] == row_bytes[c] && row_bytes[a] == 4 * rows[b], "shapes do not fit");
  }
  void dot_bytes(int c, int a, int b) {  // signed times unsigned
    demand_product(c, a, b);
    for (int m = 0; m < rows[c]; ++m) {
      for (int n = 0; n < row_bytes[c] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, &data[c][m][4 * n], 4);
        for (int k = 0; k < row_bytes[a]; ++k) {
          sum += static_cast<int8_t>(data[a][m][k]) * int32_t{data[b][k / 4][4 * n + k % 4]};
        }
        std::memcpy(&data[c][m][4 * n], &sum, 4);
      }
    }
  }
  static float wide(const uint8_t* p) {
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, p, 2);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  void dot_halves(int c, int a, int b) {
    demand_product(c, a, b);
    for (int m = 0; m < rows[c]; ++m) {
      for (int n = 0; n < row_bytes[c] / 4; ++n) {
        float sum, even = 0, odd = 0;
        for (int k = 0; k < rows[b]; ++k) {
          even = std::fma(wide(&data[a][m][4 * k]), wide(&data[b][k][4 * n]), even);
          odd = std::fma(wide(&data[a][m][4 * k + 2]), wide(&data[b][k][4 * n + 2]), odd);
        }
        std::memcpy(&sum, &data[c][m][4 * n], 4);
        sum += even + odd;
        std::memcpy(&data[c][m][4 * n], &sum, 4);
      }
    }
  }
};

inline thread_local EmulatedTiles emulated;

}  // namespace
}  // namespace PHL_NS
}  // namespace phl

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig(at) emulated.load_config(at)
#define _tile_release() (emulated.configured = false)
#define _tile_zero(tile) emulated.zero(tile)
#define _tile_loadd(tile, from, stride) emulated.load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated.store(tile, to, stride)
#define _tile_dpbsud(c, a, b) emulated.dot_bytes(c, a, b)
#define _tile_dpbf16ps(c, a, b) emulated.dot_halves(c, a, b)
