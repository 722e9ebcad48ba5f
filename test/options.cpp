// runtime/options/options.h and runtime/options/toml.h: what is parsed, what is refused, what a resume may change, and
// that options.toml reads back exactly.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <map>
#include <random>
#include <regex>
#include <set>
#include <sstream>

#include "../kernels/types.h"
#include "../runtime/base/errors.h"
#include "../runtime/options/options.h"
#include "../runtime/options/toml.h"
#include "scratch.h"

namespace {

using Words = std::vector<std::string>;

const Family kFamily = {
    "train_gpt2", "GPT-2", "Trains GPT-2.", {{"124M", {12, 768, 12}}, {"355M", {24, 1024, 16}}}, false};
const Family kPythia = {"train_pythia", "Pythia", "Trains Pythia.", {{"70m", {6, 512, 8}}}, true};

Target fp32_target(const Options&) { return {.cuda = false, .real_bytes = 4, .threads = 2}; }
Target bf16_target(const Options&) { return {.cuda = false, .real_bytes = 2, .threads = 2}; }

Options parse(Words words, const Family& family = kFamily, TargetOf target = fp32_target) {
    words.insert(words.begin(), family.program);
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    return parse_options(static_cast<int>(argv.size()), argv.data(), family, target);
}

std::string refusal(const Words& words, TargetOf target = fp32_target) {
    return message_of<BadInput>([&] { parse(words, kFamily, target); });
}

Words operator+(Words a, const Words& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

Words words_of(const std::string& line) {
    std::istringstream stream(line);
    return {std::istream_iterator<std::string>(stream), {}};
}

// The names in an options.toml.
Words keys(const std::string& toml) {
    Words names;
    for (const TomlItem& item : parse_toml(toml, "options.toml")) names.push_back(item.key);
    return names;
}

// A text of each kind that a careless writer would break.
std::string nasty_text(std::mt19937_64& random) {
    static const Words pieces = {
        "a",    " ",    "\"",      "'",    "\\", "#",  "=",    ",",      "[",   "]",
        "\n",   "\t",   "\r",      "\\n",  "é",  "漢", "🙂", "\"\"\"", "'''", "data/*.bin:0.5",
        "\x01", "\x7f", "\\u0041", "true", "1e3"};
    std::string text;
    for (uint64_t n = random() % 6; n > 0; n--) text += pieces[random() % pieces.size()];
    return text;
}

// Of any size that a float has, but not so large that products of two overflow; and no float itself.
double positive_double(std::mt19937_64& random) {
    for (;;) {
        double x = std::bit_cast<double>(random() & ~(uint64_t(1) << 63));
        if (x > 0x1p-126 && x < 0x1p60) return x;
    }
}

double fraction(std::mt19937_64& random) { return double(random() >> 11) * 0x1p-53; }

const Words kFresh = {"--model", "tiny", "--train", "x.bin", "--out", "/nonexistent/longhand"};

} // namespace

TEST_CASE("every option reaches its field") {
    Options want;
    want.model = "6,384,6", want.vocab = 5000;
    want.train = "a b.bin:2,c.bin", want.val = "v*.bin", want.tokenizer = "t.bin", want.prompt_tokens = {12, 55, 3};
    want.out = "/nonexistent/run", want.resume = true, want.steps = 7, want.seed = 18446744073709551615u;
    want.threads = 3, want.context = 64, want.batch = 2, want.tokens_per_step = 256;
    want.lr = 1e-3, want.warmup = 5, want.schedule = "wsd", want.decay_steps = 4, want.final_lr = 0.25;
    want.weight_decay = 0.2, want.beta1 = 0.8, want.beta2 = 0.99, want.eps = 1e-6, want.clip = 0.5, want.skip_z = 4;
    want.max_skips = 6, want.val_every = 9, want.val_tokens = 1000, want.sample_every = 11, want.sample_tokens = 13;
    want.temperature = 0.5, want.top_k = 15, want.save_every = 17, want.keep = 19, want.max_hours = 1.5;
    want.recompute = "block", want.chunk = 2048, want.head_group = 3, want.logits_rows = 700,
    want.offload = "residual,state";
    want.memory = "16GiB", want.host_memory = "100GB";
    const Words words =
        Words{"--train", "a b.bin:2,c.bin"} +
        words_of("--model 6,384,6 --vocab 5000 --val v*.bin --tokenizer t.bin --prompt-tokens 12,55,3 --out "
                 "/nonexistent/run --resume --steps 7 --seed 18446744073709551615 --threads 3 --context 64 "
                 "--batch 2 --tokens-per-step 256 --lr 1e-3 --warmup 5 --schedule wsd --decay-steps 4 "
                 "--final-lr 0.25 --weight-decay 0.2 --beta1 0.8 --beta2 0.99 --eps 1e-6 --clip 0.5 --skip-z "
                 "4 --max-skips 6 --val-every 9 --val-tokens 1000 --sample-every 11 --sample-tokens 13 "
                 "--temperature 0.5 --top-k 15 --save-every 17 --keep 19 --max-hours 1.5 --recompute block "
                 "--chunk 2048 --head-group 3 --logits-rows 700 --offload residual,state --memory 16GiB --host-memory "
                 "100GB");
    CHECK(parse(words) == want);

    Options evaluation;
    evaluation.init = "w.bin", evaluation.val = "v.bin", evaluation.eval = "loss";
    CHECK(parse({"--init", "w.bin", "--val=v.bin", "--eval", "loss"}) == evaluation);
}

TEST_CASE("defaults, and values in every form") {
    Options o = parse(kFresh);
    Options want;
    want.model = "tiny", want.train = "x.bin", want.out = "/nonexistent/longhand";
    CHECK(o == want);
    CHECK(parse(kFresh + Words{"--val="}).val.empty());
    CHECK(parse(kFresh + Words{"--val=", "--batch", "3"}).batch == 3);
    CHECK(parse(kFresh + Words{"--val", "", "--batch=3"}).batch == 3);
    CHECK(parse(kFresh + Words{"--val", "[ab].bin"}).val == "[ab].bin");
    CHECK(parse(kFresh + Words{"--val", "a,b c"}).val == "a,b c");
    CHECK(parse(kFresh + Words{"--steps", "-1"}).steps == -1);
    CHECK(parse(kFresh + Words{"--prompt-tokens", ""}).prompt_tokens.empty());
    CHECK(parse({"--steps", "0", "--init", "w.bin", "--out", "/nonexistent/run"}).steps == 0);
    CHECK(parse({"--eval", "sample", "--init", "w.bin"}).eval == "sample");
    CHECK(!std::filesystem::exists("/nonexistent"));
}

TEST_CASE("bad values are refused by name") {
    struct Case {
        Words words;
        std::string said;
    };
    for (const Case& c : std::vector<Case>{
             {{"--batch", "0"}, "--batch: 0 is out of range, it must be at least 1"},
             {{"--batch", "x"}, "--batch: 'x' is not a whole number"},
             {{"--batch", "1.5"}, "--batch: '1.5' is not a whole number"},
             {{"--batch", "1e3"}, "--batch: '1e3' is not a whole number"},
             {{"--batch", ""}, "--batch: '' is not a whole number"},
             {{"--batch", " 4"}, "--batch: ' 4' is not a whole number"},
             {{"--batch", "99999999999999999999"}, "--batch: 99999999999999999999 is out of range"},
             {{"--batch"}, "--batch"},
             {{"--batch", "2", "--batch", "3"}, "--batch"},
             {{"--context", "-1"}, "--context: -1 is out of range"},
             {{"--steps", "-2"}, "--steps: -2"},
             {{"--steps", "100000000"},
              "--steps: 100000000 is out of range, it must be at least -1 and at most 99999999"},
             {{"--seed", "-1"}, "--seed: '-1'"},
             {{"--seed", "18446744073709551616"}, "--seed: 18446744073709551616 is out of range"},
             {{"--lr", "0"}, "--lr: 0 is out of range, it must be above 0"},
             {{"--lr", "nan"}, "--lr: nan is not a finite number"},
             {{"--lr", "inf"}, "--lr: inf is not a finite number"},
             {{"--lr", "1e-3x"}, "--lr: '1e-3x' is not a number"},
             {{"--beta1", "1"}, "--beta1: 1 is out of range, it must be at least 0 and below 1"},
             {{"--beta2", "-0.1"}, "--beta2: -0.1"},
             {{"--eps", "0"}, "--eps: 0 is out of range, it must be above 0"},
             {{"--clip", "-1"}, "--clip: -1"},
             {{"--final-lr", "1.1"}, "--final-lr: 1.1 is out of range, it must be at least 0 and at most 1"},
             {{"--temperature", "-0.1"}, "--temperature: -0.1"},
             {{"--top-k", "-1"}, "--top-k: -1"},
             {{"--max-skips", "0"}, "--max-skips: 0"},
             {{"--max-hours", "-1"}, "--max-hours: -1"},
             {{"--threads", "-1"}, "--threads: -1"},
             {{"--schedule", "cosin"}, "--schedule: 'cosin' is not one of cosine, wsd, constant, linear"},
             {{"--eval", "los"}, "--eval: 'los' is not one of loss, sample"},
             {{"--recompute", "some"}, "--recompute: 'some' is not one of none, block, full"},
             {{"--chunk", "-1"}, "--chunk: -1 is out of range"},
             {{"--offload", "states"}, "--offload: 'states' is not one of residual, state, master"},
             {{"--offload", "state,"}, "--offload: '' is not one of residual, state, master"},
             {{"--offload", "none,state"}, "--offload: 'none' is not one of residual, state, master"},
             {{"--memory", "much"}, "--memory: 'much' is not a size such as 16GiB"},
             {{"--memory", "0"}, "--memory: '0' is not a size"},
             {{"--memory", "-1GiB"}, "--memory: '-1GiB' is not a size"},
             {{"--memory", "16Gb"}, "--memory: '16Gb' is not a size"},
             {{"--host-memory", "16 GiB"}, "--host-memory: '16 GiB' is not a size"},
             {{"--host-memory", "nan"}, "--host-memory: 'nan' is not a size"},
             {{"--gpu", "h100"}, "--gpu h100 is for --plan"},
             {{"--plan", "--gpu", "b100"}, "--gpu: 'b100' is not one of a100-40, "},
             {{"--plan-for", "cuda"}, "--plan-for cuda is for --plan"},
             {{"--prompt-tokens", "1,,2"}, "--prompt-tokens: ''"},
             {{"--prompt-tokens", "1,-2"}, "--prompt-tokens: -2"},
             {{"--prompt-tokens", "2147483648"}, "--prompt-tokens: 2147483648 is out of range"},
             {{"--sample_every", "3"}, "unknown option --sample_every"},
             {{"--vers"}, "unknown option --vers"},
             {{"--ba\ntch"}, "unknown option --ba tch"},
             {{"more.bin"}, "unexpected argument more.bin"},
             {{"--config", "/nonexistent/c.toml"}, "/nonexistent/c.toml"}}) {
        std::string said = refusal(kFresh + c.words);
        CAPTURE(c.words.back());
        CAPTURE(said);
        CHECK(contains(said, c.said));
        CHECK(!contains(said, "\n"));
    }
}

TEST_CASE("options that need each other") {
    const Words out = {"--out", "/nonexistent/run"}, train = {"--train", "x.bin"}, tiny = {"--model", "tiny"};
    CHECK(contains(refusal(tiny + train), "--out DIR is needed"));
    CHECK(contains(refusal(tiny + out), "--train GLOB is needed"));
    CHECK(contains(refusal(train + out), "--model NAME"));
    CHECK(contains(refusal({}), "--model NAME"));
    CHECK(contains(refusal(tiny + train + out + Words{"--init", "w.bin"}), "--model and --init are both given"));
    CHECK(contains(refusal({"--model", "99M"}), "'99M' is none of 124M, 355M, tiny"));
    CHECK(contains(refusal({"--eval", "loss", "--val", "v.bin"}), "--eval loss needs --init"));
    CHECK(contains(refusal({"--eval", "loss", "--model", "tiny", "--val", "v.bin"}), "--eval loss needs --init"));
    CHECK(contains(refusal({"--eval", "loss", "--init", "w.bin"}), "--eval loss needs --val"));
    CHECK(contains(refusal({"--eval", "sample"}), "--eval sample needs --init"));
    CHECK(contains(refusal({"--eval", "sample", "--init", "w", "--resume"}), "--resume and --eval exclude"));
    CHECK(contains(refusal({"--resume"}), "--resume needs --out"));
    CHECK(contains(refusal({"--steps", "0", "--model", "tiny"}), "--out DIR is needed"));

    ModelSize size = parse_model_size("6,384,12");
    CHECK(size.L == 6);
    CHECK(size.C == 384);
    CHECK(size.H == 12);
    for (const char* bad : {"6,384", "6,384,6,1", "6,384,", "0,384,6", "6,-384,6", "6,385,6", "6,384,0", "a,b,c", ""})
        CHECK(message_of<BadInput>([&] { parse_model_size(bad); }) != "");
}

TEST_CASE("options.toml reads back exactly") {
    ScratchFolder folder;
    std::string path = folder / "o.toml";
    std::mt19937_64 random(5);
    for (int i = 0; i < (kSanitized ? 40 : 400); i++) {
        Options o;
        // A model's name is checked; any other string may be anything, so long as the two are not both given.
        if (i % 2)
            o.model = i % 4 == 1 ? "124M" : "2,64,4";
        else
            o.init = nasty_text(random) + "w";
        o.vocab = int64_t(random() % (1 << 24));
        o.train = nasty_text(random) + "t", o.val = nasty_text(random), o.tokenizer = nasty_text(random);
        for (uint64_t n = random() % 4; n > 0; n--) o.prompt_tokens.push_back(int32_t(random() & 0x7fffffff));
        o.out = folder / "run";
        o.steps = int64_t(random() % 1000) - 1, o.seed = random(), o.threads = int64_t(random() % 100);
        o.context = int64_t(random() % (1u << 31)), o.batch = 1 + int64_t(random() % 1000);
        o.tokens_per_step = int64_t(random() % (uint64_t(1) << 36));
        o.lr = positive_double(random), o.warmup = int64_t(random() % 100) - 1;
        o.schedule = Words{"cosine", "wsd", "constant", "linear"}[random() % 4];
        o.decay_steps = int64_t(random() % 100) - 1, o.final_lr = fraction(random);
        o.weight_decay = positive_double(random), o.beta1 = fraction(random), o.beta2 = fraction(random);
        o.eps = positive_double(random), o.clip = positive_double(random), o.skip_z = positive_double(random);
        o.max_skips = 1 + int64_t(random() % 100), o.val_every = int64_t(random() % 100);
        o.val_tokens = int64_t(random() % 100), o.sample_every = int64_t(random() % 100);
        o.sample_tokens = int64_t(random() % 100), o.temperature = positive_double(random);
        o.top_k = int64_t(random() % 100), o.save_every = int64_t(random() % 100), o.keep = int64_t(random() % 100);
        o.max_hours = fraction(random) * 100;
        o.optimizer = random() % 2 ? "lion" : "adamw", o.state = Words{"fp32", "bf16", "int8"}[random() % 3];
        if (o.state == "int8" && random() % 2) o.state_embeddings = "int8";
        if (o.state == "int8" && o.optimizer == "adamw" && random() % 2) o.state_floor = "off";
        if (random() % 2) o.master = "none";
        o.grad = random() % 2 ? "fp32" : "bf16", o.deterministic = random() % 2 ? "on" : "off";
        o.recompute = Words{"", "none", "block", "full"}[random() % 4], o.chunk = int64_t(random() % 5000);
        o.offload = Words{"", "none", "state", "state,master", "residual"}[random() % 5];
        if (o.recompute == "none" && o.offload == "residual") o.offload = "none";
        if (o.recompute != "none") o.head_group = int64_t(random() % 20);
        o.logits_rows = int64_t(random() % 5000);
        o.memory = Words{"", "16GiB", "123456789"}[random() % 3], o.host_memory = Words{"", "1.5TB"}[random() % 2];

        const Family& family = i / 4 % 2 ? kPythia : kFamily;
        if (&family == &kFamily) {
            o.positions = Words{"", "tile", "tied", "interpolate", "fresh"}[random() % 5];
        } else {
            if (!o.model.empty()) o.model = "70m";
            o.gelu = Words{"", "erf", "tanh"}[random() % 3];
            o.rope = Words{"", "none", "linear", "ntk", "dynamic", "yarn"}[random() % 6];
            o.rope_scale = fraction(random), o.rope_base = fraction(random) * 1e6;
            o.rope_temperature = Words{"", "rotary", "softmax"}[random() % 3];
        }

        put_file(path, options_toml(o, family));
        CHECK(parse({"--config", path, "--out", o.out}, family, bf16_target) == o);

        std::filesystem::create_directory(o.out);
        put_file(o.out + "/options.toml", options_toml(o, family));
        o.resume = true;
        CHECK(parse({"--resume", "--out", o.out}, family, bf16_target) == o);
        std::filesystem::remove_all(o.out);
    }
}

TEST_CASE("the command line wins over --config, --config over the defaults") {
    ScratchFolder folder;
    std::string path = folder / "c.toml";
    put_file(
        path,
        "# mine\nmodel = \"124M\"\ntrain = 'a#b\\c.bin' # literal\nlr = 3e-4\r\nbatch = 4\n"
        "\"tokens-per-step\" = 524_288\nprompt-tokens = [1,\n  2, # two\n 3,]\nval = \"\\u00e9\\t\\\"\"\nclip = +2");
    Options o = parse({"--config", path, "--batch", "2", "--out", folder / "run"});
    CHECK(o.model == "124M");
    CHECK(o.train == "a#b\\c.bin");
    CHECK(o.lr == 3e-4);
    CHECK(o.batch == 2);
    CHECK(o.tokens_per_step == 524288);
    CHECK(o.prompt_tokens == std::vector<int32_t>{1, 2, 3});
    CHECK(o.val == "é\t\"");
    CHECK(o.clip == 2);
    CHECK(o.seed == 1337);

    // Of --model and --init the one nearer to the command line holds.
    o = parse({"--config", path, "--init", "w.bin", "--out", folder / "run"});
    CHECK(o.model == "");
    CHECK(o.init == "w.bin");
    CHECK(!std::filesystem::exists(folder / "run"));
}

TEST_CASE("a bad --config is refused with its line") {
    ScratchFolder folder;
    std::string path = folder / "c.toml";
    struct Case {
        std::string text, said;
    };
    for (const Case& c : std::vector<Case>{{"batch = 4\nbatches = 4", ":2: batches: train_gpt2 has no such option"},
                                           {"config = \"x\"", ":1: config: train_gpt2 has no such option"},
                                           {"help = true", ":1: help: train_gpt2 has no such option"},
                                           {"\n\nbatch = 0", ":3: batch: 0 is out of range"},
                                           {"batch = \"4\"", ":1: batch: takes no quotes"},
                                           {"batch = [4]", ":1: batch: takes one value"},
                                           {"schedule = wsd", ":1: schedule: takes a string"},
                                           {"schedule = \"wsd", ":1: a string is not closed"},
                                           {"schedule = \"wsd\" x", ":1: more after the value"},
                                           {"schedule = \"\"\"wsd\"\"\"", ":1: strings of several lines"},
                                           {"schedule = \"\\q\"", ":1: unknown escape \\q"},
                                           {"val = \"\\ud800\"", ":1: \\u names no character"},
                                           {"val = \"\\u12\"", ":1: \\u and \\U need"},
                                           {"lr = ", ":1: 'lr' has no value"},
                                           {"lr", ":1: 'lr' has no '='"},
                                           {"lr = 1\nlr = 1", ":2: 'lr' comes twice"},
                                           {"lr = 1 2", ":1: more after the value"},
                                           {"lr = nan", ":1: lr: nan is not a finite number"},
                                           {"resume = 1", ":1: resume: '1' is neither true nor false"},
                                           {"= 3", ":1: expected the name"},
                                           {"[run]\nlr = 1", ":1: sections have no place"},
                                           {"prompt-tokens = [1, 2", ":1: the array of 'prompt-tokens' is not closed"},
                                           {"prompt-tokens = [1 2]", ":1: expected ',' or ']'"}}) {
        put_file(path, c.text);
        std::string said = refusal(kFresh + Words{"--config", path});
        CAPTURE(said);
        CHECK(contains(said, path + c.said));
    }
    CHECK(contains(refusal(kFresh + Words{"--config", folder.path()}), folder.path()));
}

TEST_CASE("a run is refused without --resume, and goes on with it") {
    ScratchFolder folder;
    std::string out = folder / "run";
    const Words fresh = {"--model", "tiny", "--train", "x.bin", "--out", out, "--seed", "7"};
    Options o = parse(fresh + Words{"--resume"}); // nothing there: afresh
    CHECK(o.seed == 7);
    CHECK(contains(refusal({"--resume", "--out", out}), "--model NAME")); // nothing there, and nothing to start from

    std::filesystem::create_directory(out);
    CHECK(parse(fresh).seed == 7); // an empty folder is no run
    put_file(out + "/notes.txt", "");
    CHECK(parse(fresh).seed == 7);
    for (const char* name : {"options.toml", "log.jsonl", "step_00000000"}) {
        put_file(out + "/" + name, "");
        CHECK(contains(refusal(fresh), "--out " + out + " holds a run already: add --resume"));
        std::filesystem::remove(out + "/" + name);
    }
    CHECK(contains(refusal({"--model", "tiny", "--train", "x", "--out", out + "/notes.txt"}), "is a file"));

    o.lr = 0.125;
    put_file(out + "/options.toml", options_toml(o, kFamily));
    Options resumed = parse({"--resume", "--out", out});
    CHECK(resumed == o);
    // The folder may have moved since.
    std::filesystem::rename(out, folder / "moved");
    resumed = parse({"--resume", "--out", folder / "moved", "--steps", "99"});
    CHECK(resumed.out == folder / "moved");
    CHECK(resumed.steps == 99);
    CHECK(resumed.lr == 0.125);
    CHECK(parse({"--eval", "sample", "--init", "w", "--out", folder / "moved"}).resume == false);
    // What belongs to a command is not taken from a run, even if somebody wrote it there.
    put_file(folder / "moved/options.toml",
             options_toml(o, kFamily) + "eval = \"loss\"\nout = \"elsewhere\"\nresume = false\n");
    resumed = parse({"--resume", "--out", folder / "moved"});
    CHECK(resumed.eval == "");
    CHECK(resumed.out == folder / "moved");
    CHECK(resumed.resume);
}

TEST_CASE("what a resume may change") {
    const std::set<std::string> fixed = {"model",
                                         "init",
                                         "vocab",
                                         "train",
                                         "seed",
                                         "context",
                                         "tokens-per-step",
                                         "weight-decay",
                                         "beta1",
                                         "beta2",
                                         "eps",
                                         "clip",
                                         "skip-z",
                                         "positions",
                                         "optimizer",
                                         "state",
                                         "state-embeddings",
                                         "state-floor",
                                         "master",
                                         "grad",
                                         "deterministic"};
    ScratchFolder folder;
    std::string out = folder / "run";
    Options o;
    o.model = "tiny", o.vocab = 300, o.train = "x.bin", o.val = "v.bin", o.context = 64, o.tokens_per_step = 64;
    o.schedule = "wsd";
    std::filesystem::create_directory(out);
    std::filesystem::create_directories(out + "/step_00000001"); // without a checkpoint nothing binds yet
    put_file(out + "/options.toml", options_toml(o, kFamily));

    size_t seen = 0;
    for (const TomlItem& item : parse_toml(options_toml(o, kFamily), "")) {
        std::string was = item.values.empty() ? "" : item.values[0];
        std::string other = item.key == "schedule" ? "cosine" : item.string ? "other" : item.array ? "5" : "0.5";
        if (item.key == "model") other = "124M";
        const std::map<std::string, std::string> choices = {
            {"positions", "tile"},  {"optimizer", "lion"}, {"state", "int8"},     {"state-embeddings", "int8"},
            {"state-floor", "off"}, {"master", "none"},    {"grad", "bf16"},      {"recompute", "full"},
            {"offload", "state"},   {"memory", "8G"},      {"host-memory", "9G"}, {"deterministic", "off"}};
        if (choices.count(item.key)) other = choices.at(item.key);
        if (!item.string && !item.array && was.find('.') == std::string::npos && was.find('e') == std::string::npos)
            other = "127"; // a whole number
        const Words words = {"--resume", "--out", out, "--" + item.key, other};
        CAPTURE(item.key);
        if (fixed.count(item.key)) {
            seen++;
            std::string said = refusal(words);
            CHECK(contains(said, "--" + item.key + ": the run in " + out + " has "));
            if (item.key == "context") CHECK(contains(said, "has 64 and cannot go on with 127"));
            put_file(folder / "c.toml", item.key + " = " + (item.string ? "\"" + other + "\"" : other));
            CHECK(contains(refusal({"--resume", "--out", out, "--config", folder / "c.toml"}), "the run in "));
            if (was != "") // as it was is no change
                CHECK(refusal({"--resume", "--out", out, "--" + item.key, was}) == "");
        } else {
            CHECK(options_toml(parse(words), kFamily) != options_toml(o, kFamily));
            CHECK(options_toml(parse({"--resume", "--out", out}), kFamily) == options_toml(o, kFamily));
        }
    }
    CHECK(seen == fixed.size());

    // What leaves the choice to the program keeps the run's own.
    Options resumed = parse({"--resume", "--out", out, "--context", "0", "--vocab", "0", "--tokens-per-step", "0"});
    CHECK(resumed.context == 64);
    CHECK(resumed.vocab == 300);
    CHECK(resumed.tokens_per_step == 64);
    // The same number written differently is no change.
    CHECK(refusal({"--resume", "--out", out, "--weight-decay", "1e-1"}) == "");

    // A run of --steps 0 gets its data when it goes on, and only then.
    o.train = "", o.steps = 0;
    put_file(out + "/options.toml", options_toml(o, kFamily));
    CHECK(parse({"--resume", "--out", out, "--train", "y.bin", "--steps", "5"}).train == "y.bin");

    put_file(out + "/options.toml", "batch = 0\n");
    CHECK(contains(refusal({"--resume", "--out", out}), out + "/options.toml:1: batch: 0 is out of range"));
}

TEST_CASE("options that would do nothing are refused") {
    const Words run = {"--model", "tiny", "--train", "x.bin", "--out", "/nowhere/run"};
    CHECK(refusal(run + Words{"--state", "int8", "--state-embeddings", "int8", "--state-floor", "off"}) == "");
    CHECK(refusal(run + Words{"--state-embeddings", "int8"}) == "--state-embeddings int8 is for --state int8 alone");
    CHECK(refusal(run + Words{"--state", "bf16", "--state-floor", "off"}) ==
          "--state-floor off is for --state int8 alone");
    CHECK(contains(refusal(run + Words{"--optimizer", "lion", "--state", "int8", "--state-floor", "off"}),
                   "Lion has no second moment"));
    CHECK(contains(refusal(run + Words{"--master", "none"}), "in an fp32 build there are no other weights"));
    CHECK(refusal(run + Words{"--master", "none"}, bf16_target) == "");
}

TEST_CASE("sizes of memory") {
    const std::pair<const char*, int64_t> sizes[] = {{"16GiB", int64_t(16) << 30},
                                                     {"16G", int64_t(16) << 30},
                                                     {"16GB", 16000000000},
                                                     {"512MiB", 512 << 20},
                                                     {"1.5KiB", 1536},
                                                     {"2TB", 2000000000000},
                                                     {"123456", 123456},
                                                     {"7B", 7}};
    for (const auto& [text, bytes] : sizes) CHECK(parse_size(text, "--memory") == bytes);
}

TEST_CASE("memory options that exclude each other, and what a plan needs") {
    const std::string none = "--recompute none excludes ";
    CHECK(contains(refusal(kFresh + Words{"--recompute", "none", "--offload", "state,residual"}),
                   none + "--offload residual"));
    CHECK(contains(refusal(kFresh + Words{"--recompute", "none", "--head-group", "2"}), none + "--head-group"));
    CHECK(refusal(kFresh + Words{"--recompute", "none", "--offload", "state"}) == "");

    const Words tiny = {"--model", "tiny"};
    CHECK(refusal(tiny + Words{"--plan"}) == "");
    CHECK(refusal(tiny + Words{"--plan-json", "--gpu", "h100"}) == "");
    CHECK(contains(refusal({"--plan"}), "give --model NAME"));
    CHECK(contains(refusal({"--plan", "--init", "w", "--eval", "sample"}), "--plan and --eval exclude each other"));
    CHECK(contains(refusal(tiny + Words{"--plan", "--gpu", "h100", "--plan-for", "cpu"}),
                   "--gpu h100 and --plan-for cpu exclude each other"));
}

TEST_CASE("a resume keeps what was chosen of its memory, until another of its options says more") {
    ScratchFolder folder;
    const std::string out = folder / "run";
    Options o = parse(kFresh);
    o.memory = "16GiB", o.recompute = "block", o.chunk = 4096, o.head_group = 2, o.logits_rows = 1024,
    o.offload = "residual";
    std::filesystem::create_directories(out + "/step_00000001");
    put_file(out + "/options.toml", options_toml(o, kFamily));
    auto resumed = [&](const Words& words) { return parse(Words{"--resume", "--out", out} + words); };
    CHECK(resumed({}).chunk == 4096);
    CHECK(resumed({"--memory", "16GiB", "--lr", "1"}).offload == "residual"); // no change of what counts
    for (const Words& change : {Words{"--memory", "8GiB"}, Words{"--host-memory", "8GiB"}, Words{"--batch", "2"}}) {
        const Options open = resumed(change);
        CHECK(open.recompute == "");
        CHECK(open.chunk == 0);
        CHECK(open.head_group == 0);
        CHECK(open.logits_rows == 0);
        CHECK(open.offload == "");
    }
    const Options kept = resumed({"--recompute", "none", "--chunk", "64"});
    CHECK(kept.recompute == "none");
    CHECK(kept.chunk == 64);
    CHECK(kept.head_group == 0);
    CHECK(kept.offload == "");
    CHECK(kept.memory == "16GiB");
}

TEST_CASE("--help names what exists, all of it, and nothing else") {
    for (const Family& family : {kFamily, kPythia}) {
        std::string help = options_help(family);
        Words named = keys(options_toml(Options(), family));
        for (const char* name : {"out", "resume", "eval", "config", "help", "plan", "plan-json", "plan-for", "gpu"})
            named.push_back(name);
        CHECK(named.size() == (family.name == "GPT-2" ? 59 : 63));
        for (const std::string& name : named) {
            CAPTURE(name);
            CHECK(std::regex_search(help, std::regex("\n[* ] --" + name + "( |\n)")));
        }
        std::set<std::string> known(named.begin(), named.end());
        std::regex option("--([a-z0-9-]+)");
        for (std::sregex_iterator i(help.begin(), help.end(), option), end; i != end; ++i)
            CHECK(known.count((*i)[1]) == 1);
    }
    CHECK(contains(refusal({"--model", "tiny", "--rope", "yarn"}), "unknown option --rope"));
    std::string help = options_help(kFamily);
    CHECK(contains(help, "124M, 355M, tiny"));
    CHECK(contains(help, "Exit codes: 0 done; 1 "));
    CHECK(contains(help, "a100-80,"));
    CHECK(contains(help, "[0.95]"));

    ScratchFolder folder;
    for (const char* flag : {"--help", "-h"}) {
        std::string path = folder / "help.txt";
        CHECK(run_in_child([&] {
                  demand(freopen(path.c_str(), "w", stdout) != nullptr, "stdout opens");
                  if (!parse({flag, "--batch", "2", "--no-such"}).help) throw 9;
              }) == 0);
        CHECK(get_file(path) == help);
    }
}
