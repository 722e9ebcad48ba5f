#include "setup.h"

#include <algorithm>
#include <filesystem>

#include "../../kernels/attention.h"
#include "../base/errors.h"

void check_sizes(const ModelSizes& s, const std::string& where) {
    if (!attention_supports(s.D()))
        throw BadInput(where + ": head dim " + std::to_string(s.D()) + " (width " + std::to_string(s.C) + " over " +
                       std::to_string(s.H) + " heads) has no kernel; 32, 64, 80, 128 and 256 have");
    if (s.V > 65536)
        throw BadInput(where + ": vocabulary of " + std::to_string(s.V) + ", but shards hold 16-bit tokens");
}

ModelSizes read_sizes(const FileReader& file, int32_t magic, const char* family, Header& header) {
    header = read_header(file);
    auto refuse = [&](const std::string& what) { throw BadInput(file.path() + ": " + what); };
    if (header[0] != magic)
        refuse(std::string("not a ") + family + " weights file (magic " + std::to_string(header[0]) +
               "); scripts/convert_hf.py makes one of a HuggingFace model");
    ModelSizes s{header[2], header[3], header[7], header[4], header[5], header[6]};
    for (int64_t size : {s.maxT, s.V, s.Vp, s.L, s.H, s.C})
        if (size < 1) refuse("a size of " + std::to_string(size) + " in its header");
    // Bounds far beyond any model, so that no product of a lying header overflows.
    if (s.L > 10000 || s.C > 1000000 || s.Vp > 10000000) refuse("absurd sizes in its header");
    if (s.V > s.Vp) refuse("V " + std::to_string(s.V) + " > padded V " + std::to_string(s.Vp));
    if (s.C % s.H) refuse(std::to_string(s.H) + " heads do not divide width " + std::to_string(s.C));
    check_sizes(s, file.path());
    return s;
}

Header make_header(int32_t magic, const ModelSizes& s, FileType type) {
    Header header{};
    int64_t values[] = {magic, type == FileType::fp32 ? 3 : 5, s.maxT, s.V, s.L, s.H, s.C, s.Vp};
    std::transform(std::begin(values), std::end(values), header.begin(), [](int64_t x) { return int32_t(x); });
    return header;
}

static TrainingMemory training_memory(const Options& options) {
    TrainingMemory memory;
    if (options.optimizer == "lion") memory.rule = Rule::lion;
    if (options.state != "fp32") memory.state = options.state == "bf16" ? StateType::bf16 : StateType::int8;
    memory.int8_embeddings = options.state_embeddings == "int8";
    memory.master = options.master == "fp32";
    memory.bf16_grads = options.grad == "bf16";
    memory.host_states = waits_on_host(options, "state");
    memory.host_master = waits_on_host(options, "master");
    memory.seed = options.seed;
    return memory;
}

static ActivationMemory activation_memory(const Options& options) {
    ActivationMemory memory;
    if (!options.recompute.empty() && options.recompute != "none")
        memory.recompute = options.recompute == "block" ? Recompute::block : Recompute::full;
    memory.chunk = options.chunk;
    memory.head_group = options.head_group;
    memory.offload = waits_on_host(options, "residual");
    if (options.logits_rows) memory.logits_rows = options.logits_rows;
    return memory;
}

Setup make_setup(const Options& options, int64_t T) {
    Setup setup{options.batch, T, options.eval.empty()};
    const int64_t prompt = std::max<int64_t>(1, options.prompt_tokens.size());
    if (options.eval == "logits") setup.cached_rows = prompt;
    if (options.eval == "sample" || (setup.training && options.sample_every))
        setup.cached_rows = prompt + options.sample_tokens;
    setup.cached_rows = std::min(setup.cached_rows, T);
    setup.deterministic = options.deterministic == "on";
    setup.weights = training_memory(options);
    setup.activations = activation_memory(options);
    // --out is made when the run begins, and what is offloaded is no file of the run: any folder of that disk will
    // do.
    std::error_code error; // a path that cannot be is refused where the run begins
    std::filesystem::path folder = std::filesystem::absolute(options.out.empty() ? "." : options.out, error);
    while (!std::filesystem::is_directory(folder, error) && folder != folder.parent_path())
        folder = folder.parent_path();
    setup.folder = folder.string();
    return setup;
}
