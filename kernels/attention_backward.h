// What the kernels of the flash backward pass share: their tiles, what a block has in shared memory, and the way from
// one source to the other.
#pragma once
#include "attention_flash.h"
#include "attention_tiles.h"

namespace flash {

// ---- The table of tiles ----
//
// dq keeps Q and dO in shared memory, dk_dv keeps K and V; the two other operands pass through the ring, together. What
// limits the tiles are registers: S and dP are alive at once beside one or two sums of D columns. Whether tensor cores
// or shared memory set the pace is told by the fragments read for each product (ldmatrix an mma): an A100's tensor
// cores take 2 cycles an mma and shared memory 4 an ldmatrix, so that 0.5 is where they meet. Cards with 99 KB a block
// have tensor cores of half or a quarter of that speed; there it is 1 or more, and what counts is that the next tile is
// under way, or a second block at work.
//
// dq                                                              ldmatrix an mma   shared memory, blocks an SM
//   D = 32    128×32  4 warps  2 slots                                       0.42   25 KB, 2 by registers
//   D = 64    128×32  4 warps  2 slots                                       0.42   49 KB, 2 by registers
//   D = 80    128×32  4 warps  2 slots   8 warps on 99 KB: one block        0.42   61 KB, 2
//   D = 128   128×32  4 warps  2 slots   227 KB                              0.42   97 KB, 2 by registers
//                              1 slot    163 KB, where two blocks take turns         81 KB, 2
//                     8 warps  2 slots   99 KB: 16 rows a warp               0.67   97 KB, 1
//   D = 256   64×32   8 warps  2 slots   two warps share 16 rows             0.83  129 KB, 1
// dk_dv
//   D = 32    128×32  4 warps  2 slots                                       0.38   25 KB, 2 by registers
//   D = 64    128×32  4 warps  2 slots                                       0.38   49 KB, 2 by registers
//      with dQ        4 warps  2 slots   1 on 99 KB, so that two fit         0.45   57 KB, 2 by registers
//   D = 80    128×64  8 warps  2 slots   with 32 rows a warp, sums of 160    0.56   83 KB, 1 by registers
//   D = 128   128×64  8 warps  2 slots   two warps exchange P and dS         0.44  162 KB, 1
//             128×32  8 warps  2 slots   99 KB: 16 rows a warp               0.63   97 KB, 1
//   D = 256   64×32   8 warps  2 slots   two warps share 16 rows             0.75  129 KB, 1
//
// How two warps share rows:
//   dk_dv, D = 128   Each has 32 keys × 32 queries of S and dP, and 32 keys × 64 columns of dV and of dK: 128 registers
//                    of sums, where whole rows would have 256 and 16 rows read a fragment for every two products. Pᵀ
//                    and dSᵀ pass through shared memory, and only the two warps wait for each other.
//                    On 99 KB 64 queries a turn (0.56) would leave one slot: a tile's loads and products taking turns
//                    cost more than fragments do there.
//   dk_dv, D = 256   One keeps dV, the other dK, and both need S: 5 products where 4 would do. Half the columns each
//                    would take 4, but Pᵀ and dSᵀ have no room in 99 KB.
//   dq, D = 256      Each takes half of a tile's columns, and they add what they have at the end.
// Where D = 256 has 99 KB, there is one slot.

// What a block may have of shared memory: 99, 163 or 227 KB.
enum class Room { small, medium, large };
constexpr size_t bytes_of(Room room) {
    return room == Room::small ? kSmallSharedBytes : room == Room::medium ? kMediumSharedBytes : kLargeSharedBytes;
}
// f(std::integral_constant<Room, R>) for the device at hand.
template <class F> void with_room(F f) {
    const size_t bytes = shared_per_block();
    if (bytes >= bytes_of(Room::large)) return f(std::integral_constant<Room, Room::large>());
    if (bytes >= bytes_of(Room::medium)) return f(std::integral_constant<Room, Room::medium>());
    f(std::integral_constant<Room, Room::small>());
}

template <int D> constexpr Tile dq_tile(Room room) {
    if (D == 256) return {64, 32, 8, room == Room::small ? 1 : 2, 2};
    if (D == 128 && room != Room::small) return {128, 32, 4, room == Room::large ? 2 : 1};
    if (D == 80 && room != Room::small) return {128, 32, 4, 2};
    return {128, 32, D <= 64 ? 4 : 8, 2};
}
template <int D, bool WithDq> constexpr Tile dk_dv_tile(Room room) {
    if (D == 256) return {64, 32, 8, room == Room::small ? 1 : 2, 2};
    if (D == 128 && room != Room::small) return {128, 64, 8, 2, 2};
    if (D == 80) return {128, 64, 8, 2};
    if (D == 64 && WithDq) return {128, 32, 4, room == Room::small ? 1 : 2};
    return {128, 32, D <= 64 ? 4 : 8, 2};
}
// The least room with the same tile: one kernel serves all of them. Kernels are told apart by it and not by the tile,
// since what nvcc 13 writes to launch a template with a class among its arguments does not compile.
template <class Table> constexpr Room first_alike(Room room, Table table) {
    if (table(Room::small) == table(room)) return Room::small;
    return table(Room::medium) == table(room) ? Room::medium : room;
}
// Is a kernel with the tile of `room` launched on the architecture that is compiled, given the table of its tiles?
// Bodies of others stay empty: their compilers would spill.
template <class Table> constexpr bool runs_here(Room room, Table table) {
    const Tile tile = table(room);
    return !(kSmallShared && !(tile == table(Room::small))) &&
           !(kLargeShared && !(tile == table(Room::medium)) && !(tile == table(Room::large)));
}

// Of dk_dv: do two warps that share rows exchange P and dS?
template <int D> constexpr bool exchanges(Tile tile) { return D == 128 && tile.sharing == 2; }

// ---- Shared memory ----

// In bytes from the block's start: the two operands that stay, the ring with two tiles of the others in each slot (for
// dk_dv with the queries' LSE and Δ), the rows' bounds, then what warps of dk_dv pass to each other: dSᵀ, or Pᵀ and
// dSᵀ.
template <int D, Tile T, int Passed = 0> struct Layout {
    static constexpr int rows = T.rows, columns = T.columns;
    static constexpr uint32_t kept = tile_bytes<D>(rows), passing = tile_bytes<D>(columns);
    static constexpr uint32_t ring = 2 * kept, slot = 2 * passing + 2 * columns * sizeof(float);
    static constexpr uint32_t bounds = ring + T.slots * slot, passed = bounds + rows * sizeof(int);
    static constexpr uint32_t scores = rows * columns * sizeof(bf16);
    static constexpr uint32_t bytes = passed + Passed * scores;
};

// A warp's place among those that share rows. The warps w, w + 4, … run on the same quarter of an SM, so that where two
// share rows, each quarter has one of either part.
template <int Warps, int Sharing> __device__ __forceinline__ int group_of_warp() {
    return Sharing == 1 ? warp_index() : warp_index() % (Warps / Sharing);
}
template <int Warps, int Sharing> __device__ __forceinline__ int part_of_warp() {
    return Sharing == 1 ? 0 : warp_index() / (Warps / Sharing);
}

// ---- dQ ----

// Of each query and head, (B,H,Tq) each: LSE in base 2, Δ.
struct Statistics {
    float *lse, *delta;
};

// dQ with one owner and one order, by attention_backward_dq.cu.
template <class Out> void launch_dq(Stream stream, Heads<Out> dq, Heads<const bf16> dout, Heads<const bf16> q,
                                    Heads<const bf16> k, Heads<const bf16> v, Statistics statistics, float scale,
                                    const AttentionShape& shape);

} // namespace flash
