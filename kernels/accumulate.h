// Gradients that are kept in bf16 take in what one micro-batch has staged in floats.
//
//   grads = round(grads + staged)        staged = 0
//
// The sum is taken in float and rounded stochastically: to one of its two neighbours in bf16, the nearer the likelier,
// so that the mean is the sum itself; a sum that bf16 has stays as it is. Nearest rounding would swallow every
// micro-batch that adds less than half a step (1/512 to 1/256 of the value): 300 equal ones would come to 256 of them.
// What it costs: each call errs by a standard deviation of at most half a step where nearest rounding errs by half a
// step at most; errors of calls are independent, so that of M micro-batches grows as sqrt(M). In time, 10 rounds of
// Philox for eight elements: on a GPU they fit behind memory.
//
// NaN and infinities stay what they are, for the norm to see them; a sum beyond bf16's range becomes infinite, and one
// less than a step below the end of that range may.
//
// The noise is a function of (seed, stream_number, *draw, element): the same in a rerun, for any alignment and any
// number of threads, and of no two calls the same that differ in stream_number or *draw. *draw is read on the device
// because a recorded micro-batch is replayed with the arguments that it was recorded with: what changes from one
// micro-batch to the next has to be in memory.
#pragma once
#include "common.h"
#include "types.h"

// grads (n) updated in place, staged (n) added and set to 0, draw (1) read.
// stream_number: one for each range of gradients that is added alone (a layer, say), below 2^24. draw: any number, a
// new one for each micro-batch of the run. No two arrays overlap; each may begin at any address that its type allows,
// and the fastest way needs multiples of 16 bytes. Throws std::invalid_argument for n above 2^39 or a stream_number out
// of range.
void accumulate_gradients(Stream stream, bf16* grads, float* staged, int64_t n, uint64_t seed, uint64_t stream_number,
                          const uint64_t* draw);

inline Cost accumulate_gradients_cost(int64_t n) { return {6.0 * n, 6.0 * n, 1.0 * n}; }

// ---- What the backends share ----

// Element i's noise is half i % 8 of Philox's block this + i / 8 in stream *draw. No other draws of a run lie at 2^61
// or above, whatever their stream: the optimizer's, the next, end below.
inline uint64_t accumulation_noise(int64_t n, uint64_t stream_number) {
    require(n <= int64_t(1) << 39, "accumulate_gradients: more than 2^39 gradients");
    require(stream_number < uint64_t(1) << 24, "accumulate_gradients: stream_number is below 2^24");
    return uint64_t(1) << 61 | stream_number << 36;
}
