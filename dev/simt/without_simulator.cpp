// What tests find of the simulator in builds that have none: settings that nobody reads, and no traffic.
#include "simt.h"

namespace simt {

constinit const bool kPresent = false;

Settings& settings() {
    static Settings unused{};
    return unused;
}

std::function<std::vector<uint64_t>(uint64_t)> some_blocks(uint64_t, std::vector<uint64_t>) { return {}; }

Traffic traffic_of(const std::string&) { return {}; }
void reset_traffic() {}

} // namespace simt
