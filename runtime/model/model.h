// The interface between the loop and a model: all that runtime/ asks of a trainer's forward, backward and update.
#pragma once
#include <cstdint>
#include <string>

#include "../../kernels/optimizer.h"
#include "../options/options.h"
#include "tensors.h"

class FileWriter;

// What the loop asks of a model. B is at most options.batch, T is the run's context.
struct Model {
    virtual ~Model() = default;

    virtual void allocate() = 0; // before anything else

    // Forward and backward over one micro-batch: gradients += factor · d(Σ losses), loss += factor · Σ losses.
    // tokens, targets (B,T) on the host. `last` of its step: then sums over ranks begin as gradients are done.
    virtual void accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor, bool last) = 0;
    // Forward alone: loss += factor · Σ losses.
    virtual void evaluate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) = 0;
    virtual void clear_loss() = 0;
    virtual void sum_loss() = 0; // over all ranks
    // Clears loss, gradients and counts; the step's number is part of what noise it draws.
    virtual void begin_step(int64_t step) = 0;
    // Sums loss and gradients over all ranks. Norm of all gradients, and the scale that clips them, both left on the
    // device for update().
    virtual void measure_gradients(double clip) = 0;
    virtual void update(const Optimizer& options) = 0;
    virtual double loss() = 0;
    virtual double grad_norm() = 0;
    virtual OptimizerCounts counts() = 0; // of this step's update
    virtual int64_t non_finite_gradients() = 0;

    // One sequence with a KV cache: rows [start, start+n) of a sequence whose earlier rows were given before; fills
    // logits (V) of the last row. Uses the activations' memory, so a step in between ends the sequence.
    virtual void next_logits(const int32_t* tokens, int64_t start, int64_t n, float* logits) = 0;
    virtual int64_t cached_rows() const = 0; // of such a sequence, at most

    virtual Cost step_cost(int64_t B) const = 0; // of one accumulate()
    virtual int64_t vocab() const = 0;
    virtual int64_t context() const = 0;
    virtual Tensors& tensors() = 0;
    virtual uint64_t file_bytes() const = 0;
    virtual std::string write_file(FileWriter& file) = 0; // model.bin; returns the first tensor that is not finite
    virtual std::string describe() const = 0;             // "124M: L 12, C 768, …"
    virtual const Family& family() const = 0;
};
