// Attention past 2^31: strides from row to row, and arrays of so many queries that the index of one passes it. The
// answers are those of a small problem with the same rows.
#include <set>

#include <sys/mman.h>

#include "attention_problem.h"

namespace {

using check::kSimulated;
using check::same_bits;

// Rows scattered over a sparse mapping: only the pages that are touched exist. The tensors interleave: each has its own
// D·H columns of a row.
template <class T> class Scattered {
public:
    Scattered(int64_t elements, const AttentionShape& shape, int64_t batch, int64_t token, int64_t head)
        : memory_(elements), shape_(shape), batch_(batch), token_(token), head_(head) {
        madvise(memory_.data(), elements * sizeof(T), MADV_NOHUGEPAGE);
    }
    Heads<T> at(int64_t which) { return Heads<T>{memory_.data() + which * shape_.H * shape_.D, batch_, token_, head_}; }
    Heads<const T> view(int64_t which) { return Heads<const T>{at(which).data, batch_, token_, head_}; }

    void put(Tensor<T>& x, int64_t which) {
        each_row(x, which, [&](T* near, T* far) { memcpy(far, near, shape_.D * sizeof(T)); });
    }
    bool equals(Tensor<T>& x, int64_t which) {
        bool same = true;
        each_row(x, which, [&](T* near, T* far) { same = same && memcmp(near, far, shape_.D * sizeof(T)) == 0; });
        return same;
    }

private:
    check::Huge<T> memory_;
    AttentionShape shape_;
    int64_t batch_, token_, head_;

    template <class Body> void each_row(Tensor<T>& x, int64_t which, Body body) {
        for (int64_t b = 0; b < x.B; b++)
            for (int64_t t = 0; t < x.rows; t++)
                for (int64_t h = 0; h < x.H; h++) body(x.heads().row(b, t, h), at(which).row(b, t, h));
    }
};

} // namespace

// In turn the strides from every 16th token to the next, head to head and sequence to sequence go beyond 2^31, and
// LSE's from sequence to sequence.
TEST_CASE("addresses beyond 2^31 elements") {
    if (!check::has_room(50e9 * sizeof(real))) return;
    simt::SettingsGuard guard;
    constexpr int64_t B = 2, T = 66, H = 2, kFar = (int64_t(1) << 31) + 4096, kRow = 1024;
    const struct {
        int64_t batch, token, head;
    } strides[] = {{kFar / 2, (kFar / 16 + kRow) / kRow * kRow, 0}, {T * kRow, kRow, kFar}, {kFar, kRow, 0}};
    check::Huge<float> lse_memory(kFar + H * T), part_lse_memory(kFar + H * T);
    float *lse = lse_memory.data(), *part_lse = part_lse_memory.data();
    for (int64_t D : {32, 64}) {
        if (D == 64 && !check::first_seed()) continue;
        Problem p({B, T, T, H, D}, 70);
        Output<real> out = forward(p);
        Output<float> part = forward<float>(p, true);
        Problem other = p;
        other.shape.k_offset = 3; // the first queries see nothing
        Output<float> other_part = forward<float>(other, true), merged = part;
        attention_merge(nullptr, merged.o.heads(), merged.lse.data(), other_part.o.view(), other_part.lse.data(),
                        p.shape);
        for (auto& stride : strides) {
            const int64_t head = stride.head ? stride.head : D;
            const int64_t elements = stride.batch + T * stride.token + head + kRow;
            Scattered<real> rows(elements, p.shape, stride.batch, stride.token, head);
            rows.put(p.q, 0), rows.put(p.k, 1), rows.put(p.v, 2), rows.put(p.dout, 3);
            AttentionShape s = p.shape;
            s.lse_batch = kFar;
            auto lse_is = [&](const Vector<float>& want) {
                return memcmp(lse, want.data(), H * T * sizeof(float)) == 0 &&
                       memcmp(lse + kFar, want.data() + H * T, H * T * sizeof(float)) == 0;
            };
            // With 66 keys the order of dQ's sums may be any only where one tile adds all that there is.
            for (bool deterministic : {true, false}) {
                if (!deterministic && (sizeof(real) == sizeof(float) || device_is_host())) continue;
                CAPTURE(deterministic);
                s.deterministic = p.shape.deterministic = deterministic;
                Backward<real> g = backward(p, out);
                Scratch scratch(std::max(attention_forward_scratch(s), attention_backward_scratch(s)));
                attention_forward(nullptr, rows.at(4), lse, rows.view(0), rows.view(1), rows.view(2), p.scale,
                                  scratch.get(), s);
                attention_backward(nullptr, rows.at(5), rows.at(6), rows.at(7), rows.view(3), rows.view(0),
                                   rows.view(1), rows.view(2), rows.view(4), lse, p.scale, scratch.get(), s);
                CHECK(rows.equals(out.o, 4));
                CHECK(rows.equals(g.dk, 6));
                CHECK(rows.equals(g.dv, 7));
                CHECK(lse_is(out.lse));
                CHECK(rows.equals(g.dq, 5));
            }

            Scattered<float> floats(elements, p.shape, stride.batch, stride.token, head);
            Backward<float> sums(p), far_sums(p);
            for (Tensor<float>* x : {&sums.dq, &sums.dk, &sums.dv}) x->fill(random_normal<float>(B * T * H * D, 71));
            floats.put(sums.dq, 2), floats.put(sums.dk, 3), floats.put(sums.dv, 4);
            Scratch scratch(std::max(attention_forward_scratch(s), attention_backward_scratch(s)));
            s.deterministic = p.shape.deterministic = true;
            attention_backward_partial(nullptr, sums.dq.heads(), sums.dk.heads(), sums.dv.heads(), p.dout.view(),
                                       p.q.view(), p.k.view(), p.v.view(), out.o.view(), out.lse.data(), p.scale,
                                       scratch.get(), p.shape);
            attention_backward_partial(nullptr, floats.at(2), floats.at(3), floats.at(4), rows.view(3), rows.view(0),
                                       rows.view(1), rows.view(2), rows.view(4), lse, p.scale, scratch.get(), s);
            CHECK(floats.equals(sums.dq, 2));
            CHECK(floats.equals(sums.dk, 3));
            CHECK(floats.equals(sums.dv, 4));
            attention_forward_partial(nullptr, floats.at(0), lse, rows.view(0), rows.view(1), rows.view(2), p.scale,
                                      scratch.get(), s);
            CHECK(floats.equals(part.o, 0));
            CHECK(lse_is(part.lse));
            s.k_offset = 3;
            attention_forward_partial(nullptr, floats.at(1), part_lse, rows.view(0), rows.view(1), rows.view(2),
                                      p.scale, scratch.get(), s);
            attention_merge(nullptr, floats.at(0), lse, floats.view(1), part_lse, s);
            CHECK(floats.equals(merged.o, 0));
            CHECK(lse_is(merged.lse));
        }
    }
}

namespace {

// B·H heads of Tq queries, of which the last kSeeing see any of the kKeys keys. All heads share their tensors, so that
// only what has an element for each query and head is large; the last head is looked at, and its last kTail queries
// are a small problem, cut into the same tiles.
constexpr int64_t kTail = 96, kSeeing = 40, kKeys = 15;

struct Crowd {
    AttentionShape shape;
    Problem near; // the tail
    check::Huge<real> q, dout, o, out, dq;
    Vector<real> k, v;
    check::Huge<float> lse;
    check::Huge<char> scratch;

    static AttentionShape near_shape(const AttentionShape& s) {
        AttentionShape tail{1, kTail, kKeys, 1, s.D, s.Tq - kTail, s.k_offset};
        tail.deterministic = s.deterministic;
        return tail;
    }
    static AttentionShape of(int64_t B, int64_t Tq, int64_t H, int64_t D, bool deterministic) {
        AttentionShape s{B, Tq, kKeys, H, D, 0, Tq - kSeeing};
        s.deterministic = deterministic, s.most_sums = int64_t(1) << 50;
        return s;
    }
    explicit Crowd(const AttentionShape& s)
        : shape(s), near(near_shape(s), 72), q(s.Tq * s.D), dout(s.Tq * s.D), o(s.Tq * s.D), out(s.Tq * s.D, true),
          dq(s.Tq * s.D, true), k(near.k.dense()), v(near.v.dense()), lse(s.B * s.H * s.Tq, true),
          scratch(std::max(attention_forward_scratch(s), attention_backward_scratch(s))) {
        put(q, near.q), put(dout, near.dout);
    }
    Heads<real> heads(real* x) const { return {x, 0, shape.D, 0}; }
    Heads<const real> view(const real* x) const { return {x, 0, shape.D, 0}; }
    int64_t tail_at() const { return (shape.Tq - kTail) * shape.D; }
    void put(check::Huge<real>& x, Tensor<real>& rows) {
        const Vector<real> dense = rows.dense();
        std::copy(dense.begin(), dense.end(), &x[tail_at()]);
    }
    bool ends_with(check::Huge<real>& x, Tensor<real>& rows) {
        const Vector<real> dense = rows.dense();
        return memcmp(&x[tail_at()], dense.data(), dense.size() * sizeof(real)) == 0;
    }
    float* last_lse() { return &lse[shape.B * shape.H * shape.Tq - kTail]; }

    void run_forward() {
        attention_forward(nullptr, heads(out.data()), lse.data(), view(q.data()), view(k.data()), view(v.data()),
                          near.scale, scratch.data(), shape);
    }
    // dk, dv (B·H,kKeys,D): other heads' blocks may run before what they need has been computed.
    void run_backward(real* dk, real* dv) {
        auto of_heads = [&](real* x) {
            const int64_t head = kKeys * shape.D;
            return Heads<real>{x, shape.H * head, shape.D, head};
        };
        // Full of NaN; in the simulator only where the last queries' sums for dQ are, if it is summed in any order.
        const size_t bytes = attention_backward_scratch(shape);
        const size_t poisoned = kSimulated ? kTail * shape.D * sizeof(float) : bytes;
        memset(scratch.data() + bytes - poisoned, 0xff, poisoned);
        attention_backward(nullptr, heads(dq.data()), of_heads(dk), of_heads(dv), view(dout.data()), view(q.data()),
                           view(k.data()), view(v.data()), view(o.data()), lse.data(), near.scale, scratch.data(),
                           shape);
    }
};

// Of a launch over the rows of all heads, the blocks of the last head's last rows: where a head's tiles follow each
// other, the last ones first; where heads do; where rows do.
check::BlockChoice of_the_last_head(int64_t heads) {
    return [heads](uint64_t count) {
        std::set<uint64_t> chosen;
        for (int64_t i = 0; i < 24; i++)
            for (int64_t block :
                 {int64_t(count) - 1 - i, (heads - 1) * (int64_t(count) / heads) + i, heads * i + heads - 1})
                if (i < 12 || block > int64_t(count) / 2)
                    if (block >= 0 && block < int64_t(count)) chosen.insert(block);
        return std::vector<uint64_t>(chosen.begin(), chosen.end());
    };
}

void check_crowd(const AttentionShape& shape, bool backward_too) {
    CAPTURE(shape.B);
    CAPTURE(shape.D);
    CAPTURE(shape.deterministic);
    Crowd crowd(shape);
    check::Huge<int64_t> doc_start(shape.H == 1 ? shape.B * shape.Tq : 1);
    if (shape.H == 1 && shape.B > 1) { // the last queries' document begins behind the first keys
        crowd.near.documents.assign(kTail, 0);
        std::fill(crowd.near.documents.end() - 20, crowd.near.documents.end(), shape.k_offset + 5);
        std::copy(crowd.near.documents.begin(), crowd.near.documents.end(), &doc_start[shape.B * shape.Tq - kTail]);
        crowd.shape.doc_start = doc_start.data();
    }
    Output<real> want = forward(crowd.near);
    Backward<real> gradients = backward(crowd.near, want);
    check::OnlyBlocks some(of_the_last_head(shape.B * shape.H));
    crowd.run_forward();
    CHECK(crowd.ends_with(crowd.out, want.o));
    CHECK(memcmp(crowd.last_lse(), want.lse.data(), kTail * sizeof(float)) == 0);
    if (!backward_too) return;
    crowd.put(crowd.o, want.o);
    const int64_t head = kKeys * shape.D;
    Vector<real> dk(shape.B * shape.H * head), dv(dk.size());
    crowd.run_backward(dk.data(), dv.data());
    CHECK(crowd.ends_with(crowd.dq, gradients.dq));
    CHECK(same_bits(Vector<real>(dk.end() - head, dk.end()), gradients.dk.dense()));
    CHECK(same_bits(Vector<real>(dv.end() - head, dv.end()), gradients.dv.dense()));
}

constexpr int64_t kQueries = 171 * 384 + kTail, kCrowd = 32769; // a product past 2^31
static_assert(kQueries * kCrowd > int64_t(1) << 31);

} // namespace

TEST_CASE("more than 2^31 queries in all heads" * doctest::test_suite(kSimulated ? "" : "long")) {
    check_crowd(Crowd::of(1, kQueries, kCrowd, 32, true), true);
    if (!kSimulated) return;
    check_crowd(Crowd::of(1, kQueries, kCrowd, 64, false), true);
    // The index of a query's document too.
    check_crowd(Crowd::of(kCrowd, kQueries, 1, 32, true), true);
    check_crowd(Crowd::of(kCrowd, kQueries, 1, 64, false), true);
}

TEST_CASE("a head's dQ of more than 2^31 elements" * doctest::test_suite(kSimulated ? "" : "long")) {
    constexpr int64_t kLong = 21846 * 384 + kTail;
    static_assert(kLong * 256 > int64_t(1) << 31);
    check_crowd(Crowd::of(1, kLong, 1, 256, true), true);
    if (kSimulated) check_crowd(Crowd::of(1, 4 * kLong, 1, 64, false), true);
}

TEST_CASE("more than 2^31 rows to merge" * doctest::test_suite(kSimulated ? "" : "long")) {
    const AttentionShape s = Crowd::of(1, kQueries, kCrowd, 32, true), tail = Crowd::near_shape(s);
    const int64_t rows = s.H * s.Tq, elements = kTail * s.D;
    check::Huge<float> lse(rows, true), part_lse(rows, true);
    Vector<float> o(s.Tq * s.D), part(s.Tq * s.D);
    // No part of the other rows saw anything. In the simulator they are not looked at.
    if (!kSimulated) std::fill(&part_lse[0], &part_lse[rows - 1] + 1, -INFINITY);
    auto fill = [](float* to, int64_t n, uint64_t seed) {
        const Vector<float> values = random_normal<float>(n, seed);
        std::copy(values.begin(), values.end(), to);
        return values;
    };
    Vector<float> want_o = fill(&o[o.size() - elements], elements, 73), want_lse = fill(&lse[rows - kTail], kTail, 74),
                  near = fill(&part[part.size() - elements], elements, 75),
                  near_lse = fill(&part_lse[rows - kTail], kTail, 76);
    attention_merge(nullptr, {want_o.data(), 0, s.D, 0}, want_lse.data(), {near.data(), 0, s.D, 0}, near_lse.data(),
                    tail);
    check::OnlyBlocks some(of_the_last_head(s.H));
    attention_merge(nullptr, {o.data(), 0, s.D, 0}, lse.data(), {part.data(), 0, s.D, 0}, part_lse.data(), s);
    CHECK(memcmp(&o[o.size() - elements], want_o.data(), elements * sizeof(float)) == 0);
    CHECK(memcmp(&lse[rows - kTail], want_lse.data(), kTail * sizeof(float)) == 0);
}
