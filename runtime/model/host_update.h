// The optimizer's step over a tensor whose states or master weights are offloaded: piece by piece they come to the
// device, are updated by the same kernels as elsewhere, and go back. To update on the host instead would bring the
// gradients there and the weights back, 6 bytes a parameter for int8's 4.
#pragma once
#include "../../kernels/optimizer.h"
#include "../device/host_store.h"
#include "tensors.h"

// Device memory that update_from_host() needs; 0 where nothing is offloaded.
size_t host_update_bytes(const TrainingMemory& memory);

// As optimizer_update() of all of the tensor. `store` holds what waits, `pieces` is host_update_bytes() of device
// memory.
void update_from_host(const Device& device, HostStore& store, char* pieces, const TrainingMemory& memory,
                      const Tensor& tensor, Gradients gradients, const float* scale, OptimizerCounts* counts,
                      Optimizer options);
