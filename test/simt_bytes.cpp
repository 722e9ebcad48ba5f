// Every layer's traffic, as dev/simt counts it, against what its contract says it costs: within 5%, reads and writes
// apart. Sizes are such that what a call does only once vanishes.
//
// Held to the contract are the sectors that each launch touches at all: what it reads again shortly after finds a
// cache. All sectors, repeated ones included, may be no more than the factor that each case states: the price in L1
// and L2.
#include "check.h"

#include <numeric>

#include "../dev/simt/simt.h"
#include "../kernels/accumulate.h"
#include "../kernels/attention.h"
#include "../kernels/attention_backward.h"
#include "../kernels/classifier.h"
#include "../kernels/embedding.h"
#include "../kernels/gelu.h"
#include "../kernels/global_norm.h"
#include "../kernels/layernorm.h"
#include "../kernels/optimizer.h"
#include "../kernels/rotary.h"

using simt::Traffic;

namespace {

constexpr bool kBf16 = sizeof(real) == 2;
constexpr double kSector = 32;

// The traffic of one call, in kernels whose name contains `part`.
template <class Run> Traffic counted(Run run, const char* part = "") {
    simt::SettingsGuard guard;
    simt::settings().count = true;
    simt::reset_traffic();
    run();
    return simt::traffic_of(part);
}

void check_within(const std::string& what, double bytes, double want) {
    CAPTURE(what);
    CAPTURE(bytes);
    CAPTURE(want);
    CHECK(bytes >= 0.95 * want);
    CHECK(bytes <= 1.05 * want);
}
void check_at_most(const std::string& what, double bytes, double most) {
    CAPTURE(what);
    CAPTURE(bytes);
    CAPTURE(most);
    CHECK(bytes <= 1.05 * most);
}

// How often the contract's bytes may be read and written in all; whether shared memory may have bank conflicts.
struct Allowed {
    double read = 1, written = 1;
    bool conflicts = false;
};

void check_cost(const Traffic& t, const Cost& cost, Allowed allowed = {}) {
    check_within("read", kSector * (t.read.unique + t.atomic.unique), cost.read);
    check_within("written", kSector * (t.written.unique + t.atomic.unique), cost.written);
    check_at_most("read in all", kSector * (t.read.sectors + t.atomic.sectors), allowed.read * cost.read);
    check_at_most("written in all", kSector * (t.written.sectors + t.atomic.sectors), allowed.written * cost.written);
    CHECK(t.plain_global == 0);
    CHECK(t.plain_shared == 0);
    if (!allowed.conflicts) CHECK(t.shared().conflicts == 0);
}

constexpr int64_t N = 64, C = 768;

} // namespace

TEST_CASE("gelu: forward reads once and writes once, backward reads twice") {
    Vector<real> x = random_normal<real>(N * C, 1), y = random_normal<real>(N * C, 2);
    for (Gelu kind : {Gelu::tanh, Gelu::erf}) {
        check_cost(counted([&] { gelu_forward(nullptr, y.data(), x.data(), N * C, kind); }), gelu_forward_cost(N * C));
        check_cost(counted([&] { gelu_backward(nullptr, y.data(), y.data(), x.data(), N * C, kind); }),
                   gelu_backward_cost(N * C));
    }
}

// Weights and biases come from the L1 cache for each row: 2·C more than the row's own C or 2·C.
TEST_CASE("layernorm forward, alone and behind the residual") {
    Vector<real> x = random_normal<real>(N * C, 1), y = random_normal<real>(N * C, 2), residual(N * C), out(N * C);
    Vector<real> w = random_normal<real>(C, 3), b = random_normal<real>(C, 4);
    Vector<float> mean(N), rstd(N);
    Cost alone = layernorm_forward_cost(N, C), fused = residual_layernorm_forward_cost(N, C);
    auto n = [](double arrays) { return arrays * N * C * sizeof(real); };
    Traffic t = counted(
        [&] { layernorm_forward(nullptr, out.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), N, C); });
    check_cost(t, alone, {n(3) / alone.read});
    t = counted([&] {
        residual_layernorm_forward(nullptr, residual.data(), out.data(), mean.data(), rstd.data(), x.data(), y.data(),
                                   w.data(), b.data(), N, C);
    });
    check_cost(t, fused, {n(4) / fused.read});
}

// Each of 264 blocks writes sums of dw and db, which a second kernel reads: 4 KiB for 256 columns, so rows must be
// many.
TEST_CASE("layernorm backward") {
    const int64_t rows = 22528, columns = 256;
    Vector<real> dinp(rows * columns), dout(rows * columns), inp(rows * columns), w(columns);
    Vector<float> mean(rows), rstd(rows), dw(columns), db(columns);
    check::Scratch scratch(layernorm_backward_scratch(rows, columns));
    Traffic t = counted([&] {
        layernorm_backward(nullptr, dinp.data(), dw.data(), db.data(), dout.data(), inp.data(), w.data(), mean.data(),
                           rstd.data(), scratch, rows, columns);
    });
    Cost cost = layernorm_backward_cost(rows, columns);
    check_cost(t, cost, {(cost.read + 2.0 * rows * columns * sizeof(real)) / cost.read, 1.05, true});
}

TEST_CASE("classifier: logits are read once from memory, a second time from the cache") {
    const int64_t rows = 4, V = 20001, Vp = 20032;
    Vector<real> logits = random_normal<real>(rows * Vp, 1);
    Vector<float> losses(rows);
    Vector<int32_t> targets(rows);
    for (int64_t i = 0; i < rows; i++) targets[i] = static_cast<int32_t>(i * 611);
    Traffic t =
        counted([&] { classifier_forward(nullptr, losses.data(), logits.data(), targets.data(), rows, V, Vp); });
    CHECK(t.written.instructions == rows);
    CHECK(t.written.unique == 1);
    t.written = {}; // what remains to be checked are the reads
    Cost cost = classifier_forward_cost(rows, V);
    cost.written = 0;
    check_cost(t, cost);
    t = counted(
        [&] { classifier_forward_backward(nullptr, losses.data(), logits.data(), targets.data(), 1, rows, V, Vp); });
    check_cost(t, classifier_forward_backward_cost(rows, V, Vp), {2});
}

// 8-bit states: gradients so that codes differ, and a few counts that are added.
TEST_CASE("optimizer: every rule, type of state, of weights and of gradients") {
    const int64_t n = N * C;
    Vector<real> params = random_normal<real>(n, 1);
    Vector<float> master = random_normal<float>(n, 1), m(n), v(n), grads = random_normal<float>(n, 2), scale(1, 1);
    Vector<float> m_absmax(absmax_count(n)), v_absmax(absmax_count(n));
    Vector<bf16> half_grads = random_normal<bf16>(n, 2);
    Vector<OptimizerCounts> counts(1);
    for (Rule rule : {Rule::adamw, Rule::lion})
        for (StateType type : {StateType::fp32, StateType::bf16, StateType::int8})
            for (bool with_master : {false, true})
                for (bool bf16_grads : {false, true}) {
                    if (with_master && !kBf16) continue;
                    CAPTURE(int(rule));
                    CAPTURE(int(type));
                    CAPTURE(with_master);
                    CAPTURE(bf16_grads);
                    std::fill(m.begin(), m.end(), 0.f), std::fill(v.begin(), v.end(), 0.f);
                    const States states{type, m.data(), v.data(), m_absmax.data(), v_absmax.data()};
                    const Gradients g = bf16_grads ? Gradients(half_grads.data()) : Gradients(grads.data());
                    check_cost(counted([&] {
                                   optimizer_update(nullptr, params.data(), with_master ? master.data() : nullptr,
                                                    states, g, scale.data(), counts.data(), n,
                                                    {.lr = 1e-3f, .rule = rule});
                               }),
                               optimizer_cost(n, rule, type, bf16_grads, with_master));
                }
}

// What it writes, a double a block, is next to nothing beside what it reads.
TEST_CASE_TEMPLATE("global_norm", T, float, bf16) {
    const int64_t n = 1 << 18;
    Vector<T> grads = random_normal<T>(n, 1);
    Vector<float> norm(1);
    check::Scratch scratch(global_norm_scratch(n));
    Traffic t = counted([&] { global_norm(nullptr, norm.data(), grads.data(), scratch, n); });
    const Cost cost = global_norm_cost(n, sizeof(T) == 2);
    check_within("read", kSector * t.read.unique, cost.read);
    check_within("read in all", kSector * t.read.sectors, cost.read);
    CHECK(t.written.bytes <= cost.read / 1000);
    CHECK(t.plain_global == 0);
    CHECK(t.shared().conflicts == 0);
}

// Each warp, which moves 3 KB, also reads the number of the draw.
TEST_CASE("accumulate") {
    Vector<bf16> grads = random_normal<bf16>(N * C, 1);
    Vector<float> staged = random_normal<float>(N * C, 2);
    Vector<uint64_t> draw(1);
    check_cost(counted([&] { accumulate_gradients(nullptr, grads.data(), staged.data(), N * C, 1, 2, draw.data()); }),
               accumulate_gradients_cost(N * C));
}

// Backward in bf16, a lane's eight floats of a table are two accesses, each of half of a sector: every sector twice.
// Each warp also looks at 32 of the sorted pairs for each strip of columns, which the caches have. The sort counts
// among the conflicts: what it does to shared memory depends on the tokens.
TEST_CASE("embedding, every token another row") {
    const int64_t tokens = 512, Vp = 1024;
    Vector<real> wte = random_normal<real>(Vp * C, 1), wpe = random_normal<real>(tokens * C, 2), out(tokens * C);
    Vector<float> dwte(Vp * C), dwpe(tokens * C);
    Vector<int32_t> inputs(tokens);
    for (int64_t i = 0; i < tokens; i++) inputs[i] = static_cast<int32_t>(i * 701 % Vp);
    EmbeddingShape shape{1, tokens, C};
    check::Scratch scratch(embedding_backward_scratch(shape));
    for (bool positions : {false, true}) {
        CAPTURE(positions);
        check_cost(counted([&] {
                       embedding_forward(nullptr, out.data(), inputs.data(), wte.data(),
                                         positions ? wpe.data() : nullptr, shape);
                   }),
                   embedding_forward_cost(shape, positions));
        Cost cost = embedding_backward_cost(shape, positions);
        check_cost(counted([&] {
                       embedding_backward(nullptr, dwte.data(), positions ? dwpe.data() : nullptr, out.data(),
                                          inputs.data(), scratch, shape);
                   }),
                   cost, {kBf16 ? 2.0 : 1.4, kBf16 ? 2.0 : 1.05, true});
    }
}

// Heads of every size with a quarter of them rotated. The bias comes from the caches for each token, as many bytes as
// the row. A thread's packs are an access each, so that a sector which two of them share is taken twice: in bf16 two of
// the twelve sectors of a head of 64, four of the fifteen of a head of 80; in floats two of the twelve of a head of 32,
// and six of the thirty of a head of 80, whose 10 pairs make accesses of 8 bytes.
TEST_CASE("rotary: everything once, apart or in place; in place without a bias only what turns") {
    const int64_t T = 64, H = 8;
    for (int64_t D : {32, 64, 80, 128, 256}) {
        CAPTURE(D);
        Rotary rotary;
        rotary.dims = D / 4;
        std::iota(rotary.turns, rotary.turns + rotary.dims / 2, uint64_t(1) << 50);
        const RotaryShape shape{1, T, H, D};
        const int64_t values = T * H * 3 * D;
        Vector<real> qkv = random_normal<real>(values, 1), bias = random_normal<real>(H * 3 * D, 2), out(values);
        auto apart = [&](int s) { return Heads<real>{out.data() + s * T * H * D, T * H * D, H * D, D}; };
        auto read = [&](int s) { return rotary_part(static_cast<const real*>(out.data()), s, shape); };
        const double twice = D == 80 ? (kBf16 ? 4 / 15. : 6 / 30.) : D == (kBf16 ? 64 : 32) ? 2 / 12. : 0;
        const Cost cost = rotary_forward_cost(shape, rotary.dims), back = rotary_backward_cost(shape, rotary.dims);
        check_cost(counted([&] {
                       rotary_forward(nullptr, apart(0), apart(1), apart(2), qkv.data(), bias.data(), rotary, shape);
                   }),
                   cost, {2 * (1 + twice), 1 + twice});
        check_cost(counted([&] {
                       rotary_forward(nullptr, rotary_part(qkv.data(), 0, shape), rotary_part(qkv.data(), 1, shape),
                                      rotary_part(qkv.data(), 2, shape), qkv.data(), bias.data(), rotary, shape);
                   }),
                   cost, {2 * (1 + twice), 1 + twice});
        check_cost(counted([&] { rotary_backward(nullptr, qkv.data(), read(0), read(1), read(2), rotary, shape); }),
                   back, {1 + twice, 1 + twice});
        // A sector is the least that moves: of 8 dims in bf16 it is twice what turns.
        Traffic t = counted([&] { rotary_backward(nullptr, out.data(), read(0), read(1), read(2), rotary, shape); });
        const double bytes = 2.0 * T * H * ((rotary.dims * sizeof(real) + 31) / 32 * 32);
        CHECK(kSector * t.read.unique == bytes);
        CHECK(kSector * t.written.unique == bytes);
        CHECK(bytes <= 2 * rotary_backward_cost(shape, rotary.dims, true).read);
    }
}

// ---- Attention ----
//
// Its contract counts every row once. How often rows of the other axis are read again follows from the table of tiles:
// once for each tile of the axis that stays.

namespace {

struct Problem {
    AttentionShape shape;
    Vector<real> q, k, v, o, dout, dq, dk, dv;
    Vector<float> lse;
    check::Scratch scratch;

    explicit Problem(const AttentionShape& s)
        : shape(s), q(random_normal<real>(s.B * s.Tq * s.H * s.D, 1)),
          k(random_normal<real>(s.B * s.Tk * s.H * s.D, 2)), v(random_normal<real>(k.size(), 3)), o(q.size()),
          dout(random_normal<real>(q.size(), 4)), dq(q.size()), dk(k.size()), dv(k.size()), lse(s.B * s.H * s.Tq),
          scratch(std::max(attention_forward_scratch(s), attention_backward_scratch(s))) {}

    template <class T> Heads<T> heads(Vector<real>& x, int64_t T_axis) {
        return {x.data(), T_axis * shape.H * shape.D, shape.H * shape.D, shape.D};
    }
    Heads<const real> query(Vector<real>& x) { return heads<const real>(x, shape.Tq); }
    Heads<const real> key(Vector<real>& x) { return heads<const real>(x, shape.Tk); }
    void backward() {
        attention_backward(nullptr, heads<real>(dq, shape.Tq), heads<real>(dk, shape.Tk), heads<real>(dv, shape.Tk),
                           query(dout), query(q), key(k), key(v), query(o), lse.data(), 0.1f, scratch, shape);
    }
};

// Sums over the tiles of a kernel: of `rows` rows of one axis, each of which passes over tiles of `columns` columns of
// the other.
struct Tiles {
    double pairs = 0;   // of tiles
    double columns = 0; // that exist, over all row tiles
};
// begin(row), end(row): the columns that a row sees.
template <class Begin, class End> Tiles tiles_of(int64_t n, int rows, int columns, Begin begin, End end) {
    Tiles t;
    for (int64_t first = 0; first < n; first += rows) {
        int64_t from = begin(first), to = end(std::min(first + rows, n) - 1);
        if (from >= to) continue;
        t.pairs += double((to - from + columns - 1) / columns);
        t.columns += double(to - from);
    }
    return t;
}
Tiles query_tiles(const AttentionShape& s, flash::Tile tile) {
    return tiles_of(
        s.Tq, tile.rows, tile.columns, [](int64_t) { return int64_t(0); },
        [&](int64_t i) { return std::clamp<int64_t>(i + s.q_offset - s.k_offset + 1, 0, s.Tk); });
}
Tiles key_tiles(const AttentionShape& s, flash::Tile tile) {
    return tiles_of(
        s.Tk, tile.rows, tile.columns,
        [&](int64_t j) { return std::clamp<int64_t>(j - (s.q_offset - s.k_offset), 0, s.Tq); },
        [&](int64_t) { return s.Tq; });
}

void check_exactly(const std::string& what, double got, double want) {
    CAPTURE(what);
    CAPTURE(got);
    CAPTURE(want);
    CHECK(got == want);
}
void check_main_loop(const Traffic& t) {
    CHECK(t.matrix.conflicts == 0);
    CHECK(t.async.conflicts == 0);
    CHECK(t.load.conflicts == 0);
    CHECK(t.store.conflicts == 0);
    CHECK(t.plain_shared == 0);
    CHECK(t.plain_global == 0);
}

// Square, ragged, a ring's step with other offsets, more keys than queries.
const AttentionShape kShapes[] = {
    {1, 256, 256, 2, 64}, {1, 200, 200, 1, 64}, {1, 160, 160, 1, 64, 160, 0}, {2, 96, 224, 1, 64, 128, 0}};

template <int D> void check_forward(AttentionShape s, bool small) {
    s.D = D;
    simt::SettingsGuard guard;
    if (small) simt::settings().shared_per_block = flash::kSmallSharedBytes;
    flash::Tile tile = flash::forward_tile<D>(small);
    Problem p(s);
    Traffic t = counted([&] {
        attention_forward(nullptr, p.heads<real>(p.o, s.Tq), p.lse.data(), p.query(p.q), p.key(p.k), p.key(p.v), 0.1f,
                          p.scratch, s);
    });
    double heads = double(s.B) * s.H, row = D * 2;
    Tiles tiles = query_tiles(s, tile);
    check_exactly("read", kSector * t.read.sectors, heads * row * (s.Tq + 2 * tiles.columns));
    check_within("unique", kSector * t.read.unique, attention_forward_cost(s).read);
    check_within("written", kSector * t.written.unique, attention_forward_cost(s).written);
    check_exactly("mma", t.mma, heads * tiles.pairs * 2 * tile.rows * tile.columns * D / 2048);
    check_main_loop(t);
}

template <int D> void check_backward(AttentionShape s, flash::Room room, bool deterministic) {
    s.D = D;
    s.deterministic = deterministic;
    simt::SettingsGuard guard;
    simt::settings().shared_per_block = flash::bytes_of(room);
    flash::Tile tile = deterministic ? flash::dk_dv_tile<D, false>(room) : flash::dk_dv_tile<D, true>(room);
    Problem p(s);
    const double heads = double(s.B) * s.H, row = D * 2, statistics = 8;
    auto products = [](flash::Tile t) { return t.rows * t.columns * D / 2048.0; };
    Traffic t = counted([&] { p.backward(); }, "dk_dv_kernel");
    Tiles tiles = key_tiles(s, tile);
    check_exactly("dk, dv: read", kSector * t.read.sectors,
                  heads * (row * 2 * s.Tk + (2 * row + statistics) * tiles.columns));
    check_exactly("dk, dv: written", kSector * t.written.sectors, heads * row * 2 * s.Tk);
    check_exactly("dk, dv: mma", t.mma, heads * tiles.pairs * products(tile) * (!deterministic || D == 256 ? 5 : 4));
    check_exactly("dq by atomics", t.atomic.bytes, deterministic ? 0 : heads * tiles.columns * D * sizeof(float));
    check_main_loop(t);
    if (!deterministic) return;

    t = simt::traffic_of("dq_kernel");
    tile = flash::dq_tile<D>(room);
    tiles = query_tiles(s, tile);
    // Eight rows at a time take their LSE and Δ, in each of the warps that share them; those past the end all take the
    // last row's.
    double past_end = 2 * double(-s.Tq & (tile.rows - 1)) / 8 * kSector * tile.sharing,
           own = statistics * (tile.sharing - 1) * s.Tq;
    check_exactly("dq: read", kSector * t.read.sectors,
                  heads * ((2 * row + statistics) * s.Tq + own + past_end + 2 * row * tiles.columns));
    check_exactly("dq: written", kSector * t.written.sectors, heads * row * s.Tq);
    check_exactly("dq: mma", t.mma, heads * tiles.pairs * products(tile) * 3);
    check_main_loop(t);
}

} // namespace

TEST_CASE("attention forward: global traffic and mma are those of the table of tiles, no bank conflicts" *
          doctest::skip(!kBf16)) {
    for (const AttentionShape& s : kShapes)
        for (bool small : {false, true}) {
            CAPTURE(s.Tq);
            CAPTURE(small);
            check_forward<64>(s, small);
            check_forward<128>(s, small);
            if (&s != &kShapes[1]) continue; // the other dims: the ragged shape tells
            check_forward<32>(s, small);
            check_forward<80>(s, small);
            check_forward<256>(s, small);
        }
}

TEST_CASE("attention backward: the same" * doctest::skip(!kBf16)) {
    using flash::Room;
    for (const AttentionShape& s : kShapes) {
        CAPTURE(s.Tq);
        check_backward<64>(s, Room::large, true);
        check_backward<64>(s, Room::large, false);
        check_backward<128>(s, Room::large, true);
        if (&s != &kShapes[1]) continue; // the other tiles: the ragged shape tells
        check_backward<64>(s, Room::small, false);
        check_backward<32>(s, Room::large, true);
        for (Room room : {Room::small, Room::medium, Room::large}) {
            check_backward<80>(s, room, true);
            check_backward<128>(s, room, true);
            check_backward<256>(s, room, true);
        }
    }
}

// Cycles of shared memory (wavefronts) for a 128×128 tile of which all is seen: what a second one adds. An mma is 2
// cycles of an A100's tensor cores, 512 mma a product at D = 64 and 1024 at D = 128.
namespace {

template <int D> double tile_cycles(const char* kernel, bool deterministic, flash::Room room) {
    simt::SettingsGuard guard;
    simt::settings().shared_per_block = flash::bytes_of(room);
    const bool keys = kernel == std::string("dq_kernel"); // what passes by
    auto wavefronts = [&](int64_t tiles) {
        AttentionShape s{1, keys ? 128 : 128 * tiles, keys ? 128 * tiles : 128, 1, D, 256, 0};
        s.deterministic = deterministic;
        Problem p(s);
        return double(counted([&] { p.backward(); }, kernel).shared().wavefronts);
    };
    return wavefronts(2) - wavefronts(1);
}
template <int D> void check_cycles(flash::Room room, double dk_dv, double dq) {
    CAPTURE(D);
    CAPTURE(int(room));
    check_exactly("dk, dv", tile_cycles<D>("dk_dv_kernel", true, room), dk_dv);
    check_exactly("dq", tile_cycles<D>("dq_kernel", true, room), dq);
}

} // namespace

TEST_CASE("attention backward: shared memory's cycles of a 128x128 tile" * doctest::skip(!kBf16)) {
    using flash::Room;
    check_cycles<32>(Room::large, 1928, 1408);
    check_cycles<64>(Room::large, 3592, 2816);
    check_cycles<80>(Room::large, 6600, 3520);
    check_cycles<128>(Room::large, 8456, 5632);
    check_cycles<128>(Room::medium, 8456, 5632);
    check_cycles<128>(Room::small, 11272, 8704);
    check_cycles<256>(Room::large, 29456, 22528);
    check_exactly("D = 64, any order", tile_cycles<64>("dk_dv_kernel", false, Room::large), 5384);
}
