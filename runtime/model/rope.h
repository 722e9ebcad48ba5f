// How a rotary model's positions are stretched beyond the window that it was trained on: from a mode to frequencies.
//
// With d = dims, ω_i = base^(−2i/d) for i < d/2, s = scale, T0 = original, T = the context of the run:
//
//   none      ω_i
//   linear    ω_i / s                                        position interpolation (Chen et al. 2023)
//   ntk       ω_i with base·s^(d/(d−2))                      "NTK-aware" (bloc97 2023)
//   dynamic   ω_i with base·(s·T/T0 − s + 1)^(d/(d−2)) where T > T0, else ω_i
//   yarn      ω_i / s where it makes less than one rotation over T0, ω_i where it makes more than 32, a ramp between
//             (Peng et al. 2023); f = 0.1·ln s + 1
//
// YaRN's temperature, in its paper f² on every score, can only be on the rotated dimensions where it is put on cos and
// sin, as transformers does. That is the default, so that exported models agree; `softmax_temperature` is the paper's.
#pragma once
#include <cstdint>
#include <string>

#include "../../kernels/rotary.h"

enum class RopeMode { none, linear, ntk, dynamic, yarn }; // as files number them (data/FORMATS.md)

struct Rope {
    RopeMode mode = RopeMode::none;
    int64_t dims = 0;     // rotated dimensions of a head, even
    int64_t original = 0; // T0
    double base = 10000, scale = 1;
    bool softmax_temperature = false; // yarn alone
};

// Throws BadInput for a name that is not a mode's.
RopeMode parse_rope_mode(const std::string& name);
const char* rope_mode_name(RopeMode mode);

// Throws BadInput, `where` before it, unless the numbers can be: dims even and within 256, base above 1 and scale at
// least 1, both far from where powers overflow; ntk and dynamic need more than 2 dims, dynamic and yarn an original
// context.
void check_rope(const Rope& rope, const std::string& where);

// Frequencies for a run whose sequences have T tokens, of a rope that check_rope() takes.
Rotary make_rotary(const Rope& rope, int64_t T);

// What the softmax scale is multiplied with: f² with softmax_temperature, else 1.
double rope_score_factor(const Rope& rope);
