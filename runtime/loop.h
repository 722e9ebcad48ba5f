// What both trainers do around their model: the loop of steps and its habits (validation, samples, checkpoints, skipped
// updates, stopping), and the modes that evaluate and exit. The model itself is all in its trainer.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "../kernels/optimizer.h"
#include "checkpoint.h"
#include "device.h"
#include "options.h"
#include "tensors.h"

// What the loop asks of a model. B is at most options.batch, T is the run's context.
struct Model {
    virtual ~Model() = default;

    virtual void allocate() = 0; // before anything else

    // Forward and backward over one micro-batch: gradients += factor · d(Σ losses), loss += factor · Σ losses.
    // tokens, targets (B,T) on the host.
    virtual void accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) = 0;
    // Forward alone: loss += factor · Σ losses.
    virtual void evaluate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) = 0;
    virtual void clear_loss() = 0;
    // Clears loss, gradients and counts; the step's number is part of what noise it draws.
    virtual void begin_step(int64_t step) = 0;
    // Norm of all gradients, and the scale that clips them, both left on the device for update().
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
    virtual void write_file(FileWriter& file) = 0; // model.bin
    virtual std::string describe() const = 0;      // "124M: L 12, C 768, …"
    virtual const Family& family() const = 0;
};

// Where a run's weights come from: the checkpoint that --resume found, the file that --init names (in a run folder its
// newest whole checkpoint), or neither: from scratch.
struct Start {
    std::optional<Checkpoint> resume;
    std::string weights; // path of a model.bin, or empty
};
Start find_start(const Options& options);

// Trains as the options say, or evaluates and returns; throws Failure otherwise. Training reads the optimizer's state
// and the data position from start.resume.
void run(Options& options, const Device& device, Model& model, const Start& start);

// Runs a trainer's body and turns what it throws into one line on stderr and the exit code.
int run_program(const char* name, const std::function<void()>& body);

// The vocabulary for a new model: --vocab, else the tokenizer's size, else the family's own.
int64_t choose_vocab(const Options& options, int64_t family_vocab);
// Refuses a --vocab that is not the weights file's V.
void check_vocab(const Options& options, int64_t V, const std::string& path);
