#include "plan.h"

bool plan_memory(Options&, const MakeModel&) { return false; }
