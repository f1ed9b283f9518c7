// A page of the int8 KV cache, for one kv head. Its S tokens lie in blocks of 16 (8 or 4 where S is not a multiple): B
// tokens times D values, then B float32 scales, so that a block has B * (D + 4) bytes. What one integer dot product of
// four bytes takes lies side by side:
//
//   keys    [D / 4][B][4]  value + 128, unsigned; a vector holds four values of several tokens
//   values  [B / 4][D][4]  signed; a vector holds several values of four tokens
//
// A value stands for itself times its token's scale. D and S are multiples of 4.
#pragma once
#include <cstdint>

#include "isa.h"

namespace phl {
namespace PHL_NS {

constexpr int64_t kGroup = 16;  // tokens that kernels take together

PHL_INLINE int64_t block_tokens(int64_t page_size) { return page_size % 16 == 0 ? 16 : page_size % 8 == 0 ? 8 : 4; }

// One token's place in a page: its block, and which of the block's tokens it is.
struct Int8Slot {
  int8_t* block;
  int64_t tokens, token;  // of the block

  PHL_INLINE Int8Slot(int8_t* page, int64_t page_size, int64_t size, int64_t slot) {
    tokens = block_tokens(page_size);
    token = slot % tokens;
    block = page + (slot - token) * (size + 4);
  }
  PHL_INLINE int8_t* key(int64_t d) const { return block + d * tokens + 4 * token; }  // of four values from d
  PHL_INLINE int8_t* value(int64_t d, int64_t size) const { return block + (token - token % 4) * size + 4 * d + token % 4; }
  PHL_INLINE int8_t* scale(int64_t size) const { return block + tokens * size + 4 * token; }
};

}  // namespace PHL_NS
}  // namespace phl
