# `make` builds both trainers for this machine; `make demo` and `make test` are the two commands of the README.
# Objects of each build land in build/NAME/, so that builds never mix.

CXX ?= g++
# A folder of header-only packages (doctest, CLI11, nlohmann-json, xxhash) for machines without apt: dev/deps.sh DIR.
DEPS ?=
# fp32 or bf16; what is not said is fp32 on the CPU and bf16 on a GPU.
PRECISION ?=
# GPU architectures: the one at hand, or all, or a list such as "80 90a".
ARCHS ?= $(or $(GPU_ARCH),all)
VENV = .venv
PYTHON = $(VENV)/bin/python

# Tests spend most of their time compiling; what they check are the kernels' objects at -O3. doctest's fast asserts are
# calls of functions in place of code at each CHECK. Tests that compute little take -O1 (under sanitizers, where the
# compiler takes longer than the test, -O0); the others have an oracle and their common headers precompiled, with the
# flags that they have themselves. Undefined behaviour is looked for in what is tested (fuzz.cpp includes the trainers),
# which halves the time of the tests' own sources.
TEST_FLAGS = -O2 $(FAST_ASSERTS)
TEST_CHECKS = $(if $(findstring asan,$@),$(if $(filter fuzz,$(*F)),,-fno-sanitize=undefined))
LOW = $(if $(findstring asan,$@),-O0,-O1)
FAST_ASSERTS = -DDOCTEST_CONFIG_SUPER_FAST_ASSERTS
LIGHT_TESTS = $(TEST_SUPPORT) main arena checkpoint control files fuzz launch log options% outliers plan schedule shards signals target \
	tokenizer
TEST_MODE = $(if $(filter $(LIGHT_TESTS),$(*F)),$(LOW),-include $(@D)/precompiled.h) $(TEST_CHECKS)
# Sources of runtime/ that are slow to compile, with JSON and command lines, and take no time of a run: in a folder of
# objects they are one source, cold.cpp, which takes a third of what they take one by one.
COLD = files/checkpoint files/dataset files/log files/run_folder files/shards files/tokenizer loop/evaluation \
	loop/loop loop/outliers loop/training options/option_table options/options options/toml plan/plan plan/plan_report
# Kernels lean on contraction into FMAs and on sqrt without errno; nothing here needs -ffast-math, which would break the
# NaN and Inf checks.
CXXFLAGS ?= -O3 -march=native
# --param: g++ collects garbage from half a gigabyte on only, which few sources reach: a tenth less time for most.
LONGHAND_FLAGS = -std=c++20 -Wall -Wextra -Werror=return-type -fopenmp -ffp-contract=fast -fno-math-errno -MMD -MP $(DEPS:%=-I%) \
	--param ggc-min-heapsize=500000
LIBS = -ldnnl -fopenmp

TRAINERS = train_gpt2 train_pythia
# Besides the layers, kernels/ has one source that every build compiles: scratch.cpp.
LAYERS = embedding layernorm matmul rotary attention gelu classifier accumulate global_norm optimizer
# comm_mpi.cpp is a library of its own beside the programs, which those that are one of several ranks load. mpicxx
# compiles nothing else; where it is missing they say so.
MPICXX ?= $(shell command -v mpicxx)
RUNTIME = $(patsubst runtime/%.cpp,%,$(filter-out %_cuda.cpp %_mpi.cpp,$(wildcard runtime/*/*.cpp)))
# The ladder has steps for tensor cores only: its bench is one of the bf16 cuda build's.
NO_BENCHES = %_cpu.cpp %/main.cpp $(if $(filter cuda,$(BEST_BUILD)),,%/ladder.cpp)
# A build's objects are where the least of its flags says: what no precision changes is compiled once, into build/common;
# what the precision changes but no backend (the rest of runtime/, the trainers, nearly all tests) into build/fp32 and
# build/bf16; kernels, *_cpu.cpp and *_cuda.cpp into the build's own. cpu-asan has all of its own. Tests of common sources
# run once. dev/lint.py holds the sources to this.
COMMON = base/% files/% options/% ranks/connection ranks/control ranks/launch ranks/share device/host_memory loop/outliers loop/process loop/sampler loop/schedule
TEST_SUPPORT = $(basename $(notdir $(wildcard test/support/*.cpp)))
PRECISION_OF_cuda = bf16
PRECISION_OF_cuda-sm90a = bf16
precision = $(if $(filter %-asan,$(1)),$(1),$(or $(PRECISION_OF_$(1)),$(if $(filter %-bf16,$(1)),bf16,fp32)))
home = $(if $(filter %_cpu %_cuda,$(2)),$(1),$(if $(filter %-asan,$(1)),$(1),$(if $(filter $(COMMON),$(2)),common,$(precision))))
object = build/$(call home,$(1),$(2))/runtime/$(if $(filter $(COLD),$(2)),cold,$(2)).o
runtime_objects = $(sort $(foreach name,$(2),$(call object,$(1),$(name))))
mpi = $(if $(MPICXX),$(filter build/cpu/% build/cpu-bf16/%,build/$(1)/comm_mpi.so))
BENCHES = $(basename $(notdir $(filter-out $(NO_BENCHES),$(wildcard dev/bench/*.cpp))))
LADDER = $(basename $(notdir $(wildcard dev/ladder/*.cu)))

comma = ,
ifneq ($(filter-out fp32 bf16,$(PRECISION)),)
$(error PRECISION=$(PRECISION): fp32 or bf16)
endif
CPU_BUILD = $(if $(filter bf16,$(PRECISION)),cpu-bf16,cpu)
SIMT_BUILD = $(if $(filter bf16,$(PRECISION)),simt-bf16,simt)
CUDA_BUILD = $(if $(filter fp32,$(PRECISION)),cuda-fp32,cuda)
NVCC := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
# "90a" for a GPU of compute capability 9.0; empty without a GPU that has bf16 tensor cores.
GPU_CAPABILITY := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
GPU_ARCH := $(shell echo $(GPU_CAPABILITY) | awk '$$1 >= 8 { sub(/\./, ""); print $$0 == 90 ? "90a" : $$0 }')
$(if $(GPU_ARCH),,$(if $(GPU_CAPABILITY),$(warning the GPU has compute capability $(GPU_CAPABILITY), and bf16 tensor \
	cores need 8.0 or later: it is not used)))
BEST_BUILD = $(if $(and $(NVCC),$(GPU_ARCH)),$(CUDA_BUILD),$(CPU_BUILD))

TEST_COMMON = build/common/test/main.o build/common/libtest.a
.PHONY: all cpu cuda simt demo test test-cpu test-simt test-ranks test-cuda test-python test-long bench simt-profile lint format clean
all: $(TRAINERS:%=build/$(BEST_BUILD)/%) $(call mpi,$(BEST_BUILD))
	@ln -sf $(TRAINERS:%=build/$(BEST_BUILD)/%) .

cpu: $(TRAINERS:%=build/$(CPU_BUILD)/%) $(call mpi,$(CPU_BUILD))
simt: $(TRAINERS:%=build/$(SIMT_BUILD)/%)
cuda: $(TRAINERS:%=build/$(CUDA_BUILD)/%)

# One set of rules per folder of objects: its name, its flags. $(eval) so that each has its own pattern rules.
define PRECISION_RULES
build/$(1)/scratch.o: kernels/scratch.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -c $$< -o $$@
build/$(1)/runtime/%.o: runtime/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -c $$< -o $$@
build/$(1)/test/%.h.gch: test/%.h Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(TEST_FLAGS) $(2) $$(TEST_CHECKS) -x c++-header $$< -o $$@
build/$(1)/test/%.o: test/%.cpp build/$(1)/test/precompiled.h.gch Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(TEST_FLAGS) $(2) $$(TEST_MODE) -c $$< -o $$@
build/$(1)/trainer_%.o: train_%.cu Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -x c++ -c $$< -o $$@
endef
# A folder of objects, its cold sources, its flags.
define COLD_RULES
build/$(1)/cold.cpp: Makefile
	@mkdir -p $$(@D)
	@printf '#include "../../runtime/%s.cpp"\n' $(2) >$$@
build/$(1)/runtime/cold.o: build/$(1)/cold.cpp
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(3) -c $$< -o $$@
endef
ASAN_FLAGS = -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=null
$(eval $(call PRECISION_RULES,fp32,))
$(eval $(call PRECISION_RULES,bf16,-DPRECISION_BF16=1))
$(eval $(call PRECISION_RULES,cpu-asan,$$(ASAN_FLAGS)))
$(eval $(call COLD_RULES,common,$(filter $(COMMON),$(COLD)),-O1))
$(eval $(call COLD_RULES,fp32,$(filter-out $(COMMON),$(COLD)),-O1))
$(eval $(call COLD_RULES,bf16,$(filter-out $(COMMON),$(COLD)),-O1 -DPRECISION_BF16=1))
$(eval $(call COLD_RULES,cpu-asan,$(COLD),$(ASAN_FLAGS) -O0))

define CPU_RULES
build/$(1)/%.o: kernels/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -c $$< -o $$@
build/$(1)/runtime/%_cpu.o: runtime/%_cpu.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -c $$< -o $$@
build/$(1)/bench/%.o: dev/bench/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -c $$< -o $$@
build/$(1)/liblonghand.a: $(LAYERS:%=build/$(1)/%.o) build/$(precision)/scratch.o $(call runtime_objects,$(1),$(RUNTIME))
	@rm -f $$@
	ar rcs $$@ $$^
build/$(1)/comm_mpi.so: runtime/ranks/comm_mpi.cpp Makefile
	@mkdir -p $$(@D)
	$(MPICXX) -std=c++20 -O2 -Wall -Wextra -MMD -MP -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX -fPIC -shared $$< -o $$@
build/$(1)/train_%: build/$(precision)/trainer_%.o build/$(1)/liblonghand.a
	$(CXX) $(2) $$^ $(LIBS) -o $$@
build/$(1)/test_%: build/$(precision)/test/%.o $(TEST_COMMON) build/common/without_simulator.o build/$(1)/liblonghand.a
	$(CXX) $(2) $$^ $(LIBS) -o $$@
build/$(1)/bench_%: build/$(1)/bench/%.o build/$(1)/bench/main.o build/$(1)/bench/backend_cpu.o build/$(1)/liblonghand.a
	$(CXX) $(2) $$^ $(LIBS) -o $$@
endef
build/common/runtime/%.o: runtime/%.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) -c $< -o $@
build/common/test/%.h.gch: test/%.h Makefile
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(TEST_FLAGS) -x c++-header $< -o $@
build/common/test/%.o: test/%.cpp build/common/test/precompiled.h.gch Makefile
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(TEST_FLAGS) $(TEST_MODE) -c $< -o $@
build/common/liblonghand.a: $(call runtime_objects,common,$(filter $(COMMON),$(RUNTIME)))
	@rm -f $@
	ar rcs $@ $^
# What tests share that is slow to compile.
build/common/libtest.a: $(TEST_SUPPORT:%=build/common/test/support/%.o)
	@rm -f $@
	ar rcs $@ $^
build/common/test_%: build/common/test/%.o build/common/test/main.o build/common/libtest.a build/common/liblonghand.a
	$(CXX) $^ -fopenmp -o $@
build/common/without_simulator.o: dev/simt/without_simulator.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(TEST_FLAGS) -c $< -o $@
.SECONDARY:
$(eval $(call CPU_RULES,cpu,))
$(eval $(call CPU_RULES,cpu-bf16,-DPRECISION_BF16=1))
$(eval $(call CPU_RULES,cpu-asan,$$(ASAN_FLAGS)))
# The simt builds: the CUDA kernels on the CPU, compiled by g++ against dev/simt. Only kernels and the tests of dev/simt
# are instrumented: every access calls a function of dev/simt/hooks.cpp. No vectors, no merged stores: each access stays
# as the source has it. No tail calls: a report's line is that of the call's return address.
KERNELS = $(basename $(notdir $(wildcard kernels/*.cu)))
CUDA_RUNTIME = $(patsubst runtime/%.cpp,%,$(filter-out %_cpu.cpp %_mpi.cpp,$(wildcard runtime/*/*.cpp)))
SIMT = $(filter-out without_simulator,$(basename $(notdir $(wildcard dev/simt/*.cpp))))
SIMT_TESTS = $(filter-out simt_ladder,$(basename $(notdir $(wildcard test/simt*.cpp))))
SIMT_FLAGS = -DLONGHAND_SIMT=1 -Idev/simt/include
# Lines are enough for a report; locals are a quarter of the compiler's time.
SIMT_KERNEL_OPTIMIZE ?= -O2 -g1
SIMT_KERNEL_FLAGS = $(SIMT_KERNEL_OPTIMIZE) -march=native -Wno-unknown-pragmas -fsanitize=thread \
	--param tsan-instrument-func-entry-exit=0 -fno-optimize-sibling-calls -fno-tree-vectorize -fno-tree-slp-vectorize \
	-fno-store-merging $(FAST_ASSERTS)
SIMT_LIBS = -lboost_context -ldnnl -fopenmp

build/common/simt/%.o: dev/simt/%.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(SIMT_FLAGS) -c $< -o $@
define SIMT_RULES
build/$(1)/%.o: kernels/%.cu Makefile
	@mkdir -p $$(@D)
	$(CXX) $(LONGHAND_FLAGS) $(SIMT_KERNEL_FLAGS) $(SIMT_FLAGS) $(2) -x c++ -c $$< -o $$@
build/$(1)/ladder/%.o: dev/ladder/%.cu Makefile
	@mkdir -p $$(@D)
	$(CXX) $(LONGHAND_FLAGS) $(SIMT_KERNEL_FLAGS) $(SIMT_FLAGS) $(2) -x c++ -c $$< -o $$@
build/$(1)/runtime/%_cuda.o: runtime/%_cuda.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(SIMT_FLAGS) $(2) -c $$< -o $$@
$(SIMT_TESTS:%=build/$(1)/test/%.o) build/$(1)/test/simt_ladder.o: build/$(1)/test/%.o: test/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(LONGHAND_FLAGS) $(SIMT_KERNEL_FLAGS) $(SIMT_FLAGS) $(2) -c $$< -o $$@
build/$(1)/liblonghand.a: $(KERNELS:%=build/$(1)/%.o) build/$(precision)/scratch.o $(call runtime_objects,$(1),$(CUDA_RUNTIME)) $(SIMT:%=build/common/simt/%.o)
	@rm -f $$@
	ar rcs $$@ $$^
build/$(1)/train_%: build/$(precision)/trainer_%.o build/$(1)/liblonghand.a
	$(CXX) $$^ $(SIMT_LIBS) -o $$@
build/$(1)/test_%: build/$(precision)/test/%.o $(TEST_COMMON) build/$(1)/liblonghand.a
	$(CXX) $$^ $(SIMT_LIBS) -o $$@
$(SIMT_TESTS:%=build/$(1)/test_%): build/$(1)/test_%: build/$(1)/test/%.o $(TEST_COMMON) build/$(1)/liblonghand.a
	$(CXX) $$^ $(SIMT_LIBS) -o $$@
build/$(1)/test_simt_ladder: build/$(1)/test/simt_ladder.o $(TEST_COMMON) $(LADDER:%=build/$(1)/ladder/%.o) build/$(1)/liblonghand.a
	$(CXX) $$^ $(SIMT_LIBS) -o $$@
endef
$(eval $(call SIMT_RULES,simt,))
$(eval $(call SIMT_RULES,simt-bf16,-DPRECISION_BF16=1))

# The cuda builds: kernels by nvcc, everything else by g++. All that dev/assemble.py says of spills holds for these flags.
ALL_ARCHS = $(filter $(patsubst sm_%,%,$(shell $(NVCC) --list-gpu-code)),80 86 89 90 120)
ARCH_LIST = $(patsubst 90,90a,$(if $(filter all,$(ARCHS)),$(ALL_ARCHS),$(ARCHS)))
GENCODE = $(foreach arch,$(ARCH_LIST),-gencode arch=compute_$(arch)$(comma)code=sm_$(arch)) \
	$(if $(filter all,$(ARCHS)),-gencode arch=compute_80$(comma)code=compute_80)
NVCC_FLAGS = -std=c++20 -O3 --expt-relaxed-constexpr -lineinfo -MMD -MP $(DEPS:%=-I%)
# Debian's own nvcc keeps its headers in /usr/include, which g++ knows already.
CUDA_HOME = $(filter-out /usr,$(patsubst %/bin/nvcc,%,$(realpath $(NVCC))))
CUDA_FLAGS = $(CUDA_HOME:%=-isystem %/include)
CUDA_LIBS = -lcublasLt -Xcompiler -fopenmp

define CUDA_RULES
build/$(1)/%.o: kernels/%.cu Makefile | nvcc
	@mkdir -p $$(@D)
	$(NVCC) $$(NVCC_FLAGS) $$(GENCODE) $(2) -c $$< -o $$@ $$(SAID)
build/$(1)/ladder/%.o: dev/ladder/%.cu Makefile | nvcc
	@mkdir -p $$(@D)
	$(NVCC) $$(NVCC_FLAGS) $$(GENCODE) $(2) -c $$< -o $$@ $$(SAID)
build/$(1)/runtime/%_cuda.o: runtime/%_cuda.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $$(CUDA_FLAGS) $(2) -c $$< -o $$@
build/$(1)/bench/%.o: dev/bench/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $$(CUDA_FLAGS) $(2) -c $$< -o $$@
build/$(1)/bench/%.o: dev/bench/%.cu Makefile | nvcc
	@mkdir -p $$(@D)
	$(NVCC) $$(NVCC_FLAGS) $$(GENCODE) $(2) -c $$< -o $$@ $$(SAID)
build/$(1)/liblonghand.a: $(KERNELS:%=build/$(1)/%.o) build/$(precision)/scratch.o $(call runtime_objects,$(1),$(CUDA_RUNTIME))
	@rm -f $$@
	ar rcs $$@ $$^
build/$(1)/train_%: build/$(precision)/trainer_%.o build/$(1)/liblonghand.a
	$(NVCC) $$(GENCODE) $$^ $(CUDA_LIBS) -o $$@
build/$(1)/test_%: build/$(precision)/test/%.o $(TEST_COMMON) build/common/without_simulator.o build/$(1)/liblonghand.a
	$(NVCC) $$(GENCODE) $$^ $(CUDA_LIBS) -o $$@
build/$(1)/bench_%: build/$(1)/bench/%.o build/$(1)/bench/main.o build/$(1)/bench/backend_cuda.o build/$(1)/liblonghand.a
	$(NVCC) $$(GENCODE) $$^ $(CUDA_LIBS) -o $$@
build/$(1)/bench_ladder: build/$(1)/bench/ladder.o build/$(1)/bench/main.o build/$(1)/bench/backend_cuda.o $(LADDER:%=build/$(1)/ladder/%.o) \
		build/$(1)/liblonghand.a
	$(NVCC) $$(GENCODE) $$^ $(CUDA_LIBS) -o $$@
endef
$(eval $(call CUDA_RULES,cuda,-DPRECISION_BF16=1))
$(eval $(call CUDA_RULES,cuda-fp32,))
# Of one architecture, and apart from what users build: `make test` compiles and links it, GPU or not. Beside NAME.o lies its
# machine code, NAME.cubin, and what the assembler said, NAME.o.said (dev/assemble.py).
$(eval $(call CUDA_RULES,cuda-sm90a,-DPRECISION_BF16=1))
build/cuda-sm90a/%: override ARCHS = 90a
build/cuda-sm90a/%.o: NVCC_FLAGS += -Werror all-warnings -Xptxas -v --keep --keep-dir $(@D)
build/cuda-sm90a/%.o: SAID = >$@.said 2>&1 || { cat $@.said; exit 1; }
.PHONY: nvcc nvcc-flags
nvcc-flags:
	@echo $(filter-out -MMD -MP,$(NVCC_FLAGS))
nvcc:
	$(if $(NVCC),,$(error no nvcc on PATH or in /usr/local/cuda/bin: install the CUDA toolkit, or use make cpu))
-include $(wildcard build/*/*.d build/*/*/*.d build/*/*/*/*.d)

demo:
	@dev/setup.sh demo
	@$(MAKE) --no-print-directory -j$$(nproc) all
	@scripts/demo.sh "$(TEXT)"

test:
	@dev/setup.sh test
	@python3 test/run.py
test-cpu:
	@dev/setup.sh test
	@python3 test/run.py common cpu cpu-bf16 asan
test-simt:
	@dev/setup.sh test
	@python3 test/run.py simt
test-ranks:
	@dev/setup.sh test
	@python3 test/run.py ranks
test-cuda:
	@dev/setup.sh test
	@python3 test/run.py nvcc cuda
test-python:
	@dev/setup.sh test
	@python3 test/run.py python
test-long:
	@dev/setup.sh test
	@python3 test/run.py --long

# What kernels move and how they meet the banks, counted by dev/simt. KERNEL is a layer, at the size at which
# test/simt_bytes.cpp holds it to its contract, or any other test.
KERNEL ?= gelu
COUNTED = $(filter $(KERNEL),$(filter-out matmul,$(LAYERS)))
PROFILED = build/simt-bf16/test_$(if $(COUNTED),simt_bytes,$(KERNEL))
simt-profile: $(PROFILED)
	@SIMT_PROFILE=$(PROFILED).txt $(PROFILED) $(COUNTED:%=-tc="%*") >$(PROFILED).log || { cat $(PROFILED).log; exit 1; }
	@cat $(PROFILED).txt

bench: $(BENCHES:%=build/$(BEST_BUILD)/bench_%)
	@for bench in $^; do $$bench || exit 1; done

lint:
	@python3 dev/lint.py
format:
	clang-format -i $$(git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu')
clean:
	rm -rf build $(TRAINERS)
