// The instructions of Intel's matrix unit (AMX) that csrc/cpu/amx.h and its users need, in plain C++,
// by Intel's manual (volume 2, TDPBF16PS and the others): so that tests run those kernels where no
// processor has the unit. What the unit refuses ends the process. Slow; never part of bert_fast._C.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bert_fast {
namespace host {

struct Shape {
  int rows, bytes;  // rows, bytes of a row
};

struct MatrixUnit {
  bool configured = false;
  Shape shape[8];
  alignas(64) uint32_t tile[8][16][16];
};
inline thread_local MatrixUnit unit;

inline void expect(bool so, const char* what) {
  if (so) return;
  std::fprintf(stderr, "AMX, emulated: %s\n", what);
  std::abort();
}

inline void tile_loadconfig(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  expect(bytes[0] == 1 && bytes[1] == 0, "a configuration is of palette 1 and starts at row 0");
  for (int i = 0; i < 8; ++i) {
    unit.shape[i] = {bytes[48 + i], bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8};
    expect(unit.shape[i].rows <= 16 && unit.shape[i].bytes <= 64, "a tile is too large");
  }
  for (int i = 2; i < 64; ++i) {
    const bool used = (i >= 16 && i < 32) || (i >= 48 && i < 56);
    expect(used || bytes[i] == 0, "reserved bytes of a configuration are 0");
  }
  std::memset(unit.tile, 0, sizeof(unit.tile));
  unit.configured = true;
}

inline void tile_release() { unit.configured = false; }

inline const Shape& shape_of(int tile) {
  expect(unit.configured, "this thread has not configured it");
  return unit.shape[tile];
}

inline void tile_zero(int tile) {
  shape_of(tile);
  std::memset(unit.tile[tile], 0, sizeof(unit.tile[tile]));
}

inline void tile_loadd(int tile, const void* from, int64_t stride) {
  const Shape shape = shape_of(tile);
  tile_zero(tile);
  for (int row = 0; row < shape.rows; ++row) {
    std::memcpy(unit.tile[tile][row], static_cast<const char*>(from) + row * stride, shape.bytes);
  }
}

inline void tile_stored(int tile, void* to, int64_t stride) {
  const Shape shape = shape_of(tile);
  for (int row = 0; row < shape.rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, unit.tile[tile][row], shape.bytes);
  }
}

inline void expect_product(int to, int a, int b) {
  const Shape sum = shape_of(to), left = shape_of(a), right = shape_of(b);
  expect(to != a && to != b && a != b, "a product is of three tiles");
  expect(left.rows == sum.rows && right.bytes == sum.bytes && left.bytes == 4 * right.rows,
         "tiles of these shapes have no product");
}

// As float, denormals zero. (Of arithmetic, too: rounded first, as the unit flushes what it gives.)
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f * x : x; }
inline float flushed(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return flushed(x);
}

// Even and odd elements are summed on their own, from zero, and their sum is added. The product of
// two bf16 is exact in fp32, so that it makes no difference whether these are FMA.
inline void tile_dpbf16ps(int to, int a, int b) {
  expect_product(to, a, b);
  for (int row = 0; row < unit.shape[to].rows; ++row) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < unit.shape[b].rows; ++k) {
      const uint32_t pair = unit.tile[a][row][k];
      const float low = flushed(pair << 16), high = flushed(pair & 0xFFFF0000u);
      for (int n = 0; n < 16; ++n) {
        even[n] = flushed(even[n] + low * flushed(unit.tile[b][k][n] << 16));
        odd[n] = flushed(odd[n] + high * flushed(unit.tile[b][k][n] & 0xFFFF0000u));
      }
    }
    for (int n = 0; n < 16; ++n) {
      const float sum = flushed(flushed(unit.tile[to][row][n]) + flushed(even[n] + odd[n]));
      std::memcpy(&unit.tile[to][row][n], &sum, sizeof(sum));
    }
  }
}

// Four unsigned bytes of a by four signed bytes of b, added modulo 2^32.
inline void tile_dpbusd(int to, int a, int b) {
  expect_product(to, a, b);
  for (int row = 0; row < unit.shape[to].rows; ++row) {
    for (int k = 0; k < unit.shape[b].rows; ++k) {
      const uint32_t x = unit.tile[a][row][k];
      for (int n = 0; n < 16; ++n) {
        const uint32_t w = unit.tile[b][k][n];
        for (int byte = 0; byte < 32; byte += 8) {
          const int32_t product = static_cast<uint8_t>(x >> byte) * static_cast<int8_t>(w >> byte);
          unit.tile[to][row][n] += static_cast<uint32_t>(product);
        }
      }
    }
  }
}

}  // namespace host
}  // namespace bert_fast

// Some compilers' headers have these as macros.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig ::bert_fast::host::tile_loadconfig
#define _tile_release ::bert_fast::host::tile_release
#define _tile_zero ::bert_fast::host::tile_zero
#define _tile_loadd ::bert_fast::host::tile_loadd
#define _tile_stored ::bert_fast::host::tile_stored
#define _tile_dpbf16ps ::bert_fast::host::tile_dpbf16ps
#define _tile_dpbusd ::bert_fast::host::tile_dpbusd
