// AVX2's vocabulary with the dot products of AVX-VNNI: four bytes to an int32 in one instruction, so that nothing is added
// as words on the way. Operands of eight bits stay unsigned, their zero taken off at the start, as with AVX-512: sums are of
// the same integers as AVX2's, and results its bits.
#pragma once

#include "../vnni.h"
#include "vec_avx2.h"

namespace phl {
namespace PHL_NS {
namespace {

struct Vec : Avx2 {
  using Part = Vec;
  static constexpr int wide_rows = tile_rows;  // operands of eight bits take no more registers than others
  static constexpr bool signed_wide = false;

  template <bool Wide>
  static U ready(U w) {
    return w;
  }
  template <bool Wide>
  static U kept(U w) {
    return w;
  }
  template <bool Wide>
  static I dot(I sum, U w, A a) {
    return {dot_bytes(sum.a, w.a, a), dot_bytes(sum.b, w.b, a)};
  }
  template <int Bits, bool Wide>
  struct Sum {
    I total;
    void add(int, U w, A a) {
      total = dot<Wide>(total, w, a);
      asm("" : "+x"(total.a), "+x"(total.b));  // in this order, as Avx2::Sum
    }
    I all(int) { return total; }
  };
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
