// What the programs of Kimi Delta Attention share: what a channel's decay does to tokens and sums.
#pragma once

#include "native/delta_chunk.h"

namespace stoker {
namespace STOKER_ISA {

// Operations on an executor's Channels<K>: numbers by token and channel, in whichever order it keeps them.

// f(token, channel, x, ...).
template <class X, class F, class... More>
STOKER_TILE void each_channel(X &x, F f, More &...more) {
  if constexpr (X::kChannelsFirst)
    x.each([&](int c, int t, auto &...numbers) { f(t, c, numbers...); }, more...);
  else
    x.each(f, more...);
}
// acc = tokens channels^T, of tiles [C, V] and [K, V].
template <class X, class Acc, class Tokens, class Channels>
STOKER_TILE void start_channels(X &x, Acc &acc, const Tokens &tokens, const Channels &channels) {
  if constexpr (X::kChannelsFirst)
    x.template start<false, true>(acc, channels, tokens);
  else
    x.template start<false, true>(acc, tokens, channels);
}

// What the backward through the states leaves of a chunk's gradients: 64 K numbers each in the executor's own order, and
// 64 of dbeta.
template <class X>
struct KdaShares {
  typename X::Element *dq, *dk;
  typename X::Real *dg, *dbeta;
};

}  // namespace STOKER_ISA
}  // namespace stoker
