// What the ranks of a run exchange: sums of gradients, weights, pieces of a sequence. MPI carries it in the cpu build,
// NCCL in the cuda build. One rank by itself loads neither: sums are what they were, and copies are made where the two
// arrays differ.
//
// All ranks call the same functions in the same order with the same counts (send_receive() alone may have its own).
// What is called here happens beside what device.stream does, one after another in the order of the calls:
// - It begins when all that device.stream was given before the call is done.
// - What device.stream is given after wait(ticket) begins when the call that returned this ticket, and all calls
//   before it, are done. Until then nobody may touch the arrays.
// The cpu build has done it when the call returns.
//
// Sums are made in float (of double values in double), in the order of the ranks in the cpu build, where bf16 sums are
// rounded once, to nearest even. Two arrays of a call are apart or, where it says so, the same.
//
// Errors: RunFailed naming the rank that failed, or what MPI or NCCL says. BadInput where the library is missing, or
// was started otherwise than this run. After either the run can only end.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "../device/device.h"
#include "control.h"

class Comm {
public:
    using Ticket = int64_t; // the number of the call or mark, from 1 on

    // Meets the other ranks and exchanges a first piece with each, so that no connection is made later. control: null
    // for one rank, which then loads no library. Both must outlive it.
    Comm(const Device& device, Control* control);
    ~Comm(); // meets the others again, unless it was abandoned
    Comm(const Comm&) = delete;
    Comm& operator=(const Comm&) = delete;

    int rank() const { return control_ ? control_->rank() : 0; }
    int ranks() const { return control_ ? control_->ranks() : 1; }
    Control* control() const { return control_; } // null for one rank

    // data (count) = sum over ranks of data. T: float, bf16 or double.
    template <class T> Ticket all_reduce(T* data, int64_t count) {
        return begin({Kind::all_reduce, element(data), data, data, size_t(count), size_t(count)});
    }
    // own (each) = sum over ranks of data (ranks, each)[this rank]. own may be data's part of this rank.
    template <class T> Ticket reduce_scatter(T* own, const T* data, int64_t each) {
        return begin({Kind::reduce_scatter, element(data), own, data, size_t(each), size_t(each)});
    }
    // data (ranks, bytes)[r] = own (bytes) of rank r. own may be data's part of this rank.
    Ticket all_gather(void* data, const void* own, size_t bytes) {
        return begin({Kind::all_gather, Element::byte, data, own, bytes, bytes});
    }
    // data (bytes) = that of rank `root`.
    Ticket broadcast(void* data, size_t bytes, int root) {
        return begin({Kind::broadcast, Element::byte, data, data, bytes, bytes, root});
    }
    // data (received_bytes) = what rank `from` sends here: its own (bytes), for rank `to`.
    Ticket send_receive(void* data, size_t received_bytes, int from, const void* own, size_t bytes, int to) {
        return begin({Kind::send_receive, Element::byte, data, own, bytes, received_bytes, from, to});
    }
    // data (ranks, bytes)[r] = own (ranks, bytes)[this rank] of rank r.
    Ticket all_to_all(void* data, const void* own, size_t bytes) {
        return begin({Kind::all_to_all, Element::byte, data, own, bytes, bytes});
    }

    void wait(Ticket ticket);
    // What device.stream was given until here is a piece of work, whose end is a sign of progress (control.h).
    void mark();
    // After a failure, or an agreed end in the middle: does not wait for other ranks, now or when it is destroyed.
    void abandon();
    // Waits for device.stream, and says meanwhile whether this rank works or waits for others, and in which call. To
    // come before anything else that waits for what was given since a wait(): that cannot be interrupted.
    void finish();

private:
    enum class Kind { all_reduce, reduce_scatter, all_gather, broadcast, send_receive, all_to_all };
    enum class Element { fp32, bf16, fp64, byte };
    struct Call {
        Kind kind;
        Element element;
        void* to;
        const void* from;
        size_t count, received; // elements sent to a rank and received from one
        int source = 0, target = 0;

        size_t bytes() const {
            constexpr size_t kBytes[] = {sizeof(float), sizeof(bf16), sizeof(double), 1};
            return count * kBytes[int(element)];
        }
    };
    static Element element(const float*) { return Element::fp32; }
    static Element element(const bf16*) { return Element::bf16; }
    static Element element(const double*) { return Element::fp64; }
    struct Library;

    const Device& device_;
    Control* control_;
    Ticket last_ = 0;
    int64_t calls_ = 0;                // the same on all ranks, while marks are each rank's own
    std::unique_ptr<Library> library_; // null without control_

    Ticket begin(const Call& call);
};
