// Intel's matrix unit (AMX): eight registers, tiles, of 16 rows of 64 bytes. Its users are compiled
// with BERT_FAST_AMX; with BERT_FAST_HOST, too, for tests, the unit is emulated.
#pragma once
#include <cstdint>

#include "simd.h"

#ifdef BERT_FAST_HOST
#include "../host/amx.h"
#else
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

// GCC's _tile_loadd does not say that it reads memory: what was written for it before, is. (No test
// can see this, for the emulated one does say so.)
BERT_FAST_INLINE void before_loads() { asm volatile("" ::: "memory"); }

// While one of these lives, its thread has the tiles, all of them whole.
class Tiles {
 public:
  Tiles() {
    static constexpr Config kConfig;  // static: GCC sees its first bytes read alone
    _tile_loadconfig(&kConfig);
    before_loads();
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
};

#ifdef BERT_FAST_HOST
inline bool has_amx(Precision) { return true; }
#else
inline bool ask_kernel_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
// Whether the processor has the unit's products of this precision; fp32 is multiplied as bf16.
inline bool has_amx(Precision precision) {
  static const bool tiles = processor_has(0, Register::kEdx, 24) && ask_kernel_for_tiles();
  static const bool bf16 = tiles && processor_has(0, Register::kEdx, 22);
  static const bool int8 = tiles && processor_has(0, Register::kEdx, 25);
  return precision == Precision::kInt8 ? int8 : bf16;
}
#endif

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
