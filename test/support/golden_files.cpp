// Reading the files of test/golden: apart from golden.h, so that its users do not compile a JSON parser each.
#include "../golden.h"

#include <fstream>
#include <stdexcept>

#include <nlohmann/json.hpp>

namespace golden {

using nlohmann::json;

json read(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error("cannot open " + path + ": run the tests from the root of the repository");
    return json::parse(file);
}

static Config config_of(const json& j) {
    int64_t V = j.at("V");
    Config c{j.at("seed"),          j.at("L"),    j.at("C"), j.at("H"), V,
             (V + 127) / 128 * 128, j.at("maxT"), j.at("B"), j.at("T")};
    if (!j.contains("rope")) return c;
    const json& rope = j.at("rope");
    c.family = Family::pythia;
    c.parallel = j.at("parallel");
    c.gelu = j.at("gelu") == "erf" ? Gelu::erf : Gelu::tanh;
    c.rope = {parse_rope_mode(rope.at("mode")), rope.at("dims"), rope.at("original"), rope.at("base"),
              rope.at("scale")};
    return c;
}

static Fingerprint fingerprint_of(const json& j) {
    auto error = [&](const char* precision) {
        return Error{j.at(precision).at("error"), j.at(precision).at("worst_element")};
    };
    return {j.at("n"), j.at("norm"), j.at("projections"), j.at("samples"), error("fp32"), error("bf16")};
}

Golden load(const std::string& path) {
    json j = read(path);
    Golden made{config_of(j.at("config")),
                {j.at("loss").at("fp64"), j.at("loss").at("fp32"), j.at("loss").at("bf16")},
                fingerprint_of(j.at("logits")),
                fingerprint_of(j.at("losses")),
                {}};
    for (const Recipe& r : tensors(made.config)) made.gradients.push_back(fingerprint_of(j.at("gradients").at(r.name)));
    return made;
}

Training load_training(const std::string& path) {
    json j = read(path), o = j.at("optimizer");
    auto curve = [&](const char* p) { return Training::Curve{j.at(p).at("losses"), j.at(p).at("grad_norms")}; };
    return {config_of(j.at("config")),
            {o.at("steps"), o.at("lr"), o.at("beta1"), o.at("beta2"), o.at("eps"), o.at("weight_decay"), o.at("clip")},
            curve("fp64"),
            curve("fp32")};
}

} // namespace golden
