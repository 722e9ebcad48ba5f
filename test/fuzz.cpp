// Harmed and hostile variants of every file that a trainer reads: each is read correctly or refused with a Failure, and
// no reader takes memory because a header says so. Seeds are fixed: a failure names its variant and comes again. It is
// meant to run under the address and undefined-behaviour sanitizers (build/cpu-asan/test_fuzz), and runs without.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <vector>

// What the trainers include, so that only their own parts land in these namespaces: both call them alike.
#include "../kernels/attention.h"
#include "../kernels/embedding.h"
#include "../kernels/layernorm.h"
#include "../kernels/matmul.h"
#include "../kernels/rotary.h"
#include "../runtime/base/errors.h"
#include "../runtime/base/random.h"
#include "../runtime/loop/loop.h"
#include "../runtime/loop/process.h"
#include "../runtime/model/rope.h"
#include "../runtime/model/transformer.h"
#include "../runtime/plan/plan.h"

#define main trainer_main
namespace gpt2 {
#include "../train_gpt2.cu"
}
namespace pythia {
#include "../train_pythia.cu"
}
#undef main

#include "../runtime/files/checkpoint.h"
#include "../runtime/files/shards.h"
#include "../runtime/files/tokenizer.h"
#include "scratch.h"

// Bytes asked of operator new since somebody last set it to 0: a reader has no state that could tell. The sanitizers
// see through to malloc. Not inlined: g++ would pair one of these with the library's other half and warn.
static std::atomic<size_t> bytes_requested{0};

[[gnu::noinline]] void* operator new(size_t bytes) {
    bytes_requested += bytes;
    if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
    bytes_requested += bytes;
    return std::malloc(bytes ? bytes : 1);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

using nlohmann::json;

// What a reader may ask for in all: a few buffers, and a table or a tree in proportion to the file.
size_t allowed_bytes(size_t file_bytes) { return (size_t(4) << 20) + 256 * file_bytes; }

constexpr int kHangSeconds = 120; // a whole target takes a few

// A file format under attack. Each has its own TEST_CASE below, which makes a good file and a read() that judges.
struct Victim {
    const char* name;
    std::string whole; // a good file
    int header_ints;   // int32 at its beginning to be attacked one by one
    int variants;      // random ones
    // Stores the variant and reads it. Throws Failure if it is refused, anything else if it is misread.
    std::function<void(const std::string&)> read;
};

int32_t int_at(const std::string& bytes, size_t i) {
    int32_t value = 0;
    if (4 * i + 4 <= bytes.size()) std::memcpy(&value, bytes.data() + 4 * i, 4);
    return value;
}

std::string with_int(std::string bytes, size_t i, int32_t value) {
    if (4 * i + 4 <= bytes.size()) std::memcpy(bytes.data() + 4 * i, &value, 4);
    return bytes;
}

// Lies that a header can tell: extremes, near misses, and what overflows when doubled or taken as bytes.
std::vector<int32_t> lies(int32_t truth, size_t file_bytes) {
    uint32_t t = static_cast<uint32_t>(truth), n = static_cast<uint32_t>(file_bytes);
    std::vector<int32_t> list;
    for (uint32_t lie : {0u,
                         1u,
                         2u,
                         3u,
                         UINT32_MAX,
                         uint32_t(INT_MAX),
                         uint32_t(INT_MIN),
                         uint32_t(INT_MIN) + 1,
                         uint32_t(INT_MAX) - 1,
                         t + 1,
                         t - 1,
                         2 * t,
                         t / 2,
                         -t,
                         ~t,
                         t + 0x80000000u,
                         n,
                         n - 1024,
                         n + 1,
                         0x40000000u,
                         0x10000u,
                         0xffffu,
                         0x10001u})
        list.push_back(static_cast<int32_t>(lie));
    return list;
}

// One to four changes of a random kind.
std::string variant_of(const std::string& whole, std::mt19937_64& rng) {
    std::string bytes = whole;
    auto below = [&](size_t n) { return n ? rng() % n : 0; };
    // Half of all places lie in the header, or in the first bytes of a text.
    auto place = [&] { return rng() % 2 ? below(std::min<size_t>(bytes.size(), 32)) : below(bytes.size()); };
    for (size_t change = 0, changes = 1 + below(4); change < changes; change++) {
        switch (rng() % 7) {
        case 0: // flip bits
            for (size_t n = 1 + below(8); n > 0 && !bytes.empty(); n--) bytes[place()] ^= char(1u << rng() % 8);
            break;
        case 1: // any byte
            if (!bytes.empty()) bytes[place()] = static_cast<char>(rng());
            break;
        case 2: // cut off
            bytes.resize(below(bytes.size() + 1));
            break;
        case 3: // append
            for (size_t n = 1 + below(100); n > 0; n--) bytes += static_cast<char>(rng());
            break;
        case 4: { // splice: a piece of itself elsewhere
            std::string piece = bytes.substr(below(bytes.size() + 1), below(200));
            bytes.insert(below(bytes.size() + 1), piece);
            break;
        }
        case 5: // take a piece out
            bytes.erase(below(bytes.size() + 1), below(200));
            break;
        case 6: { // a lie in an int, or in what lies where one could be
            size_t i = below(8);
            std::vector<int32_t> values = lies(int_at(bytes, i), bytes.size());
            bytes = with_int(bytes, i, values[below(values.size())]);
            break;
        }
        }
    }
    return bytes;
}

struct Tally {
    int read = 0, refused = 0;
};

// Reads one variant; false with a message if anything but the right reading or a Failure came of it.
bool survives(const Victim& target, const std::string& bytes, const std::string& which, Tally& tally) {
    std::string wrong;
    bytes_requested = 0;
    try {
        target.read(bytes);
        tally.read++;
    } catch (const Failure& e) {
        tally.refused++;
        if (std::strlen(e.what()) < 10) wrong = "a refusal that says nothing";
    } catch (const std::exception& e) {
        wrong = e.what();
    }
    if (wrong.empty() && bytes_requested > allowed_bytes(bytes.size()))
        wrong = std::to_string(bytes_requested) + " bytes of memory for a file of " + std::to_string(bytes.size());
    std::string said = std::string(target.name) + ", " + which + ": " + wrong;
    CHECK_MESSAGE(wrong.empty(), said);
    return wrong.empty();
}

void attack(const Victim& target) {
    alarm(kHangSeconds); // a hang ends the program by SIGALRM
    Tally tally;
    REQUIRE(survives(target, target.whole, "the good file", tally));
    REQUIRE(tally.read == 1);
    int left = 5; // failures to print before giving up
    for (int i = 0; i < target.header_ints && left > 0; i++)
        for (int32_t lie : lies(int_at(target.whole, i), target.whole.size()))
            left -= !survives(target, with_int(target.whole, i, lie),
                              "header[" + std::to_string(i) + "] = " + std::to_string(lie), tally);
    for (int seed = 0; seed < target.variants && left > 0; seed++) {
        std::mt19937_64 rng(seed);
        left -= !survives(target, variant_of(target.whole, rng), "seed " + std::to_string(seed), tally);
    }
    CHECK(tally.refused > tally.read); // most variants are harmed for good
    alarm(0);
}

std::string scratch_parent() {
    return access("/dev/shm", W_OK) == 0 ? "/dev/shm" : std::filesystem::temp_directory_path().string();
}

std::string file_of_ints(std::vector<int32_t> header) {
    header.resize(256, 0);
    return std::string(reinterpret_cast<const char*>(header.data()), 1024);
}

} // namespace

TEST_CASE("token shards") {
    ScratchFolder folder(scratch_parent());
    const int64_t T = 16, V = 500, tokens = 200;
    std::string whole = file_of_ints({20240520, 1, tokens});
    for (int i = 0; i < tokens; i++) {
        uint16_t token = static_cast<uint16_t>(i * 7 % V);
        whole.append(reinterpret_cast<const char*>(&token), 2);
    }
    // Judged here from the bytes alone: the reader must agree about what is good, and then about every token.
    auto read = [&](const std::string& bytes) {
        put_file(folder / "a.bin", bytes);
        int64_t count = int_at(bytes, 2);
        bool good = int_at(bytes, 0) == 20240520 && int_at(bytes, 1) == 1 && count > T &&
                    static_cast<int64_t>(bytes.size()) == 1024 + 2 * count;
        std::vector<uint16_t> truth(good ? static_cast<size_t>(count) : 0);
        if (good) std::memcpy(truth.data(), bytes.data() + 1024, 2 * truth.size());
        size_t used = good ? static_cast<size_t>((count - 1) / T * T + 1) : 0;
        good = good && std::all_of(truth.begin(), truth.begin() + used, [](uint16_t token) { return token < V; });

        std::vector<int32_t> inputs(T), targets(T);
        try {
            Windows windows(folder / "a.bin", T, V);
            for (int64_t w = 0; w < windows.count(); w++) {
                windows.read(w, inputs.data(), targets.data());
                for (int64_t t = 0; good && t < T; t++)
                    demand(inputs[t] == truth[w * T + t] && targets[t] == truth[w * T + t + 1], "the tokens are right");
            }
            Loader loader({{folder / "a.bin"}}, T, V, 1);
            for (int64_t w = 0; w < 2 * windows.count(); w++) loader.next(inputs.data(), targets.data(), 1);
        } catch (const Failure&) {
            demand(!good, "a good shard is read");
            throw;
        }
        demand(good, "a bad shard is refused");
    };
    attack({"shard", whole, 8, 3000, read});
}

TEST_CASE("tokenizer tables") {
    ScratchFolder folder(scratch_parent());
    for (int version : {1, 2, 3}) {
        const int V = 300;
        const size_t length_bytes = version == 3 ? 4 : 1;
        std::string whole = file_of_ints({20240328, version, V, version == 1 ? 0 : V - 1});
        for (int i = 0; i < V; i++) {
            std::string length{char(1 + i % 20), 0, 0, 0};
            whole += length.substr(0, length_bytes) + std::string(1 + i % 20, static_cast<char>(i));
        }
        auto read = [&](const std::string& bytes) {
            put_file(folder / "tokenizer.bin", bytes);
            Tokenizer tokenizer(folder / "tokenizer.bin");
            int32_t size = int_at(bytes, 2);
            demand(tokenizer.size() == size, "as many tokens as the header says");
            demand(tokenizer.end_of_text() >= -1 && tokenizer.end_of_text() < size, "the end of text is a token");
            std::string all, truth;
            for (int32_t id = -1; id <= size; id++) all += tokenizer.decode({id});
            size_t width = int_at(bytes, 1) == 3 ? 4 : 1;
            for (size_t at = 1024; at < bytes.size();) {
                uint32_t length = 0;
                std::memcpy(&length, bytes.data() + at, width);
                truth += bytes.substr(at + width, length);
                at += width + length;
            }
            demand(all == truth, "every token decodes to its bytes");
            tokenizer.decode({INT_MIN, INT_MAX, size});
            valid_utf8(all);
        };
        attack({"tokenizer", whole, 8, 1500, read});
    }
}

// Attacks a weights file of about 0.01 everywhere. open(file, V, C) reads its header and gives the model it makes.
template <class Open>
void attack_weights(const std::string& folder, const std::string& header, int64_t count, int changed, Open open) {
    std::string tensors(count * sizeof(float), 0);
    std::mt19937_64 rng(1);
    for (size_t i = 0; i < tensors.size(); i++) tensors[i] = i % 4 == 3 ? 0x3c : static_cast<char>(rng());
    auto read = [&](const std::string& bytes) {
        put_file(folder + "/model.bin", bytes);
        FileReader file(folder + "/model.bin");
        auto [type, model] = open(file);
        demand(int_at(bytes, 0) == int_at(header, 0), "the header is the model's");
        size_t at = 1024;
        for (const Tensor& t : model->tensors().list) {
            size_t n = t.count * sizeof(float);
            demand(sizeof(real) < 4 || type != FileType::fp32 || !memcmp(t.param, &bytes[at], n),
                   "the weights are right");
            at += n;
        }
    };
    attack({"weights", header + tensors, changed, 1500, read});
}

TEST_CASE("Pythia weights") {
    ScratchFolder folder(scratch_parent());
    Device device(0);
    pythia::PythiaConfig tiny;
    static_cast<ModelSizes&>(tiny) = {4, 3, 128, 1, 1, 32};
    std::string header =
        file_of_ints({20261124, 3, 4, 3, 1, 1, 32, 128, 8, 1, 2, 4, 0, 4, 0, 0x40c38800, 0, 0x40000000});
    attack_weights(folder.path(), header, pythia_tensors(tiny).count(), 18, [&](const FileReader& file) {
        pythia::PythiaConfig config;
        FileType type = read_config(file, config);
        demand(config.rope.dims <= config.D() && config.rope.base >= 1 && config.rope.scale >= 1, "the rope can be");
        auto model = std::make_unique<pythia::Pythia>(device, config, Setup{1, 1, false});
        model->allocate();
        model->read_file(file, type);
        return std::pair(type, std::move(model));
    });
}

TEST_CASE("GPT-2 weights and optimizer states") {
    ScratchFolder folder(scratch_parent());
    Device device(0);
    gpt2::Gpt2Config tiny{{4, 3, 128, 1, 1, 32}};
    std::string header = file_of_ints({20240326, 3, 4, 3, 1, 1, 32, 128, 1, 9});
    attack_weights(folder.path(), header, gpt2_tensors(tiny).count(), 10, [&](const FileReader& file) {
        gpt2::Gpt2Config config;
        FileType type = read_config(file, config);
        demand(config.tied >= 0, "the rule can be");
        auto model = std::make_unique<gpt2::Gpt2>(device, config, Setup{1, 1, false});
        model->allocate();
        model->read_file(file, type, config, Options());
        return std::pair(type, std::move(model));
    });

    for (StateType type : {StateType::fp32, StateType::bf16, StateType::int8})
        for (Rule rule : {Rule::adamw, Rule::lion}) {
            Setup setup{1, 1, true};
            setup.weights.rule = rule, setup.weights.state = type;
            gpt2::Gpt2 model(device, tiny, setup);
            model.allocate();
            std::string whole(state_bytes(model.tensors()), 0x3c);
            {
                FileWriter writer(folder / "whole.bin");
                write_state(device, writer, model.tensors());
                writer.close();
            }
            whole.replace(0, 1024, get_file(folder / "whole.bin").substr(0, 1024));
            std::filesystem::remove(folder / "whole.bin");
            auto read_states = [&](const std::string& bytes) {
                put_file(folder / "optimizer.bin", bytes);
                read_state(device, FileReader(folder / "optimizer.bin"), model.tensors());
                demand(!memcmp(model.tensors().list[0].states.m, &bytes[1024], 128 * 32 * 2), "the moments are right");
            };
            attack({"states", whole, 20, 300, read_states});
        }
}

namespace {

const json kMeta = {{"loss", 3.5}, {"tokens", 12345678901}, {"text", "a\n"}, {"list", {1, -2, 3.25}}};

void save_two(const std::string& run) {
    for (int64_t step : {1, 2})
        save_checkpoint(run, step,
                        {{"model.bin", 300, [](FileWriter& f) { f.write(std::string(300, 'm').data(), 300); }},
                         {"state.bin", 0, [](FileWriter&) {}}},
                        kMeta, 0);
}

// Reads the run folder in both ways; they must agree, and step 1 must be the way out.
void read_run(const std::string& run) {
    bool warned = false;
    auto found = newest_checkpoint(run, [&](const std::string& line) {
        demand(contains(line, "step_00000002"), "a warning names the folder: " + line);
        warned = true;
    });
    demand(found && found->step == (warned ? 1 : 2), "the newest, or else the one before");
    demand(warned || found->meta == kMeta, "meta data are what was saved");
    open_checkpoint(run + "/step_00000002"); // throws if newest_checkpoint() warned
    demand(!warned, "both ways agree");
}

} // namespace

TEST_CASE("checkpoints") {
    ScratchFolder run(scratch_parent());
    save_two(run.path());
    for (const char* name : {"manifest.json", "model.bin"}) {
        std::string path = run / "step_00000002/" + name, whole = get_file(path);
        auto read = [&](const std::string& bytes) {
            put_file(path, bytes);
            read_run(run.path());
            demand(bytes == whole, "any change is seen");
        };
        attack({name, whole, 0, 2000, read});
        put_file(path, whole);
    }
}

// A checksum keeps harm out, not malice: manifests that say wrong things and are signed properly.
TEST_CASE("manifests with a right checksum and wrong content") {
    ScratchFolder run(scratch_parent());
    save_two(run.path());
    std::string path = run / "step_00000002/manifest.json", whole = get_file(path);
    auto signed_text = [](json body) {
        body.erase("checksum");
        std::string canonical = body.dump();
        char checksum[17];
        std::snprintf(checksum, sizeof checksum, "%016llx",
                      static_cast<unsigned long long>(bytes_hash(canonical.data(), canonical.size())));
        body["checksum"] = checksum;
        return body.dump(2) + "\n";
    };
    REQUIRE(signed_text(json::parse(whole)) == whole); // signs as the writer does
    put_file(run / "outside.bin", std::string(300, 'm'));

    const std::vector<json> junk = {nullptr,
                                    true,
                                    0,
                                    -1,
                                    2.5,
                                    1e300,
                                    UINT64_MAX,
                                    "",
                                    "x",
                                    INT64_MIN,
                                    json::array(),
                                    json::object(),
                                    "..",
                                    "/",
                                    {{}},
                                    {{"a", 1}},
                                    "../outside.bin",
                                    "manifest.json"};
    std::vector<std::pair<std::string, std::string>> variants; // what, text
    for (const char* place : {"/format", "/step", "/meta", "/parts", "/parts/0", "/parts/0/name", "/parts/0/bytes",
                              "/parts/0/xxh3", "/parts/1/name", "/parts/1/bytes"})
        for (const json& value : junk) {
            json body = json::parse(whole);
            body[json::json_pointer(place)] = value;
            variants.emplace_back(std::string(place) + " = " + value.dump(), signed_text(body));
        }
    for (const char* key : {"format", "step", "meta", "parts"}) {
        json body = json::parse(whole);
        body.erase(key);
        variants.emplace_back(std::string("without ") + key, signed_text(body));
    }
    for (const json& value : junk) variants.emplace_back("whole = " + value.dump(), value.dump(2) + "\n");
    for (size_t depth : {10, 1000, 300000})
        for (const char* ends : {"[]", "{}"}) {
            std::string nested;
            for (size_t i = 0; i < depth; i++) nested += ends[0] == '{' ? "{\"a\":" : "[";
            nested += "1" + std::string(depth, ends[1]);
            variants.emplace_back("nested " + std::to_string(depth), nested);
            variants.emplace_back("meta data nested " + std::to_string(depth),
                                  "{\"checksum\":\"\",\"meta\":" + nested + "}");
            variants.emplace_back("open " + std::to_string(depth), nested.substr(0, nested.size() - depth));
        }

    alarm(kHangSeconds);
    Tally tally;
    for (const auto& [what, text] : variants) {
        Victim target{"manifest", whole, 0, 0, [&](const std::string& bytes) {
                          put_file(path, bytes);
                          Checkpoint opened = open_checkpoint(run / "step_00000002");
                          // Whatever was accepted is true: the step, and each part a file of this folder.
                          json body = json::parse(bytes);
                          demand(opened.step == 2 && body.at("step") == 2 && opened.meta == body.at("meta"),
                                 "step and meta data");
                          demand(body.at("format") == "longhand checkpoint", "the format");
                          for (const json& part : body.at("parts")) {
                              std::string name = part.at("name");
                              demand(name == "model.bin" || name == "state.bin", "the name of a part: " + name);
                              demand(get_file(opened.part(name)).size() == part.at("bytes"), "the size of " + name);
                          }
                      }};
        survives(target, text, what, tally);
    }
    CHECK(tally.read >= 15); // meta data may be anything
    CHECK(tally.refused > 150);
    alarm(0);
}
