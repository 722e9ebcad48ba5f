// The memory plan: what a run needs where, whether it fits, how long a step would take, and the choice of what the user
// left open.
#pragma once
#include <functional>
#include <memory>

#include "options.h"
#include "transformer.h"

// The model that options describe, on a device that may be a Device(target): then it is a plan.
using MakeModel = std::function<std::unique_ptr<Transformer>(const Device&, const Options&)>;

// Fills in what `options` leaves open of --recompute, --chunk, --head-group and --offload. With --plan or --plan-json
// prints the plan and returns true: there is nothing more to do. Throws Failure(kDoesNotFit) where nothing fits.
bool plan_memory(Options& options, const MakeModel& make);
