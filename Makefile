# `make` builds the trainer for this machine; `make demo` and `make test` are the two commands of the README.
# Objects of each build land in build/NAME/, so that builds never mix.

CXX ?= g++
DEPS ?=
PRECISION ?= fp32
VENV = .venv
PYTHON = $(VENV)/bin/python

# Tests compile faster at -O2, and spend most of their time compiling; what they check are the kernels' objects at -O3.
TEST_FLAGS = -O2
# Kernels lean on contraction into FMAs and on sqrt without errno; nothing here needs -ffast-math, which would break the
# NaN and Inf checks.
CXXFLAGS ?= -O3 -march=native
LONGHAND_FLAGS = -std=c++20 -Wall -Wextra -Werror=return-type -fopenmp -ffp-contract=fast -fno-math-errno -MMD -MP $(DEPS:%=-I%)
LIBS = -ldnnl -fopenmp

LAYERS = embedding layernorm matmul attention gelu classifier global_norm adamw
RUNTIME = $(basename $(notdir $(filter-out %_cuda.cpp,$(wildcard runtime/*.cpp))))
BENCHES = $(basename $(notdir $(wildcard dev/bench/*.cpp)))

comma = ,
BUILD_fp32 = cpu
BUILD_bf16 = cpu-bf16

.PHONY: all cpu demo test test-cpu test-simt test-python test-long bench lint format clean
all: cpu
	@ln -sf build/$(BUILD_$(PRECISION))/train_gpt2 train_gpt2

cpu: build/$(BUILD_$(PRECISION))/train_gpt2

# One set of rules per build: its directory, its flags. $(eval) so that each build has its own pattern rules.
define BUILD_RULES
build/$(1)/%.o: kernels/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -c $$< -o $$@
build/$(1)/runtime/%.o: runtime/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -c $$< -o $$@
build/$(1)/test/%.o: test/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(TEST_FLAGS) $(2) -c $$< -o $$@
build/$(1)/bench/%.o: dev/bench/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -c $$< -o $$@
build/$(1)/trainer_%.o: train_%.cu Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(2) -x c++ -c $$< -o $$@
build/$(1)/liblonghand.a: $(LAYERS:%=build/$(1)/%.o) $(RUNTIME:%=build/$(1)/runtime/%.o)
	@rm -f $$@
	ar rcs $$@ $$^
build/$(1)/train_%: build/$(1)/trainer_%.o build/$(1)/liblonghand.a
	$(CXX) $(2) $$^ $(LIBS) -o $$@
build/$(1)/test_%: build/$(1)/test/%.o build/$(1)/test/main.o build/$(1)/liblonghand.a
	$(CXX) $(2) $$^ $(LIBS) -o $$@
build/$(1)/bench_%: build/$(1)/bench/%.o build/$(1)/liblonghand.a
	$(CXX) $(2) $$^ $(LIBS) -o $$@
endef
.SECONDARY:
$(eval $(call BUILD_RULES,cpu,))
$(eval $(call BUILD_RULES,cpu-bf16,-DPRECISION_BF16=1))
$(eval $(call BUILD_RULES,cpu-asan,-O1 -g -fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined))
# The simt builds: the CUDA kernels on the CPU, compiled by g++ against dev/simt. Only kernels and the tests of dev/simt
# are instrumented: every access calls a function of dev/simt/hooks.cpp. No vectors, no merged stores: each access stays
# as the source has it. No tail calls: a report's line is that of the call's return address.
KERNELS = $(basename $(notdir $(wildcard kernels/*.cu)))
CUDA_RUNTIME = $(basename $(notdir $(filter-out %_cpu.cpp,$(wildcard runtime/*.cpp))))
SIMT = $(basename $(notdir $(wildcard dev/simt/*.cpp)))
SIMT_FLAGS = -DLONGHAND_SIMT=1 -g -Idev/simt/include
SIMT_KERNEL_OPTIMIZE ?= -O2
SIMT_KERNEL_FLAGS = $(SIMT_KERNEL_OPTIMIZE) -march=native -Wno-unknown-pragmas -fsanitize=thread \
	--param tsan-instrument-func-entry-exit=0 -fno-optimize-sibling-calls -fno-tree-vectorize -fno-tree-slp-vectorize \
	-fno-store-merging
SIMT_LIBS = -lboost_context -ldnnl -fopenmp

define SIMT_RULES
build/$(1)/simt/%.o: dev/simt/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(SIMT_FLAGS) $(2) -c $$< -o $$@
build/$(1)/%.o: kernels/%.cu Makefile
	@mkdir -p $$(@D)
	$(CXX) $(LONGHAND_FLAGS) $(SIMT_KERNEL_FLAGS) $(SIMT_FLAGS) $(2) -x c++ -c $$< -o $$@
build/$(1)/runtime/%.o: runtime/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(SIMT_FLAGS) $(2) -c $$< -o $$@
build/$(1)/test/simt.o build/$(1)/test/simt_ptx.o build/$(1)/test/simt_matmul.o: build/$(1)/test/%.o: test/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(LONGHAND_FLAGS) $(SIMT_KERNEL_FLAGS) $(SIMT_FLAGS) $(2) -c $$< -o $$@
build/$(1)/test/%.o: test/%.cpp Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(TEST_FLAGS) $(SIMT_FLAGS) $(2) -c $$< -o $$@
build/$(1)/trainer_%.o: train_%.cu Makefile
	@mkdir -p $$(@D)
	$(CXX) $(CXXFLAGS) $(LONGHAND_FLAGS) $(SIMT_FLAGS) $(2) -x c++ -c $$< -o $$@
build/$(1)/liblonghand.a: $(KERNELS:%=build/$(1)/%.o) $(CUDA_RUNTIME:%=build/$(1)/runtime/%.o) $(SIMT:%=build/$(1)/simt/%.o)
	@rm -f $$@
	ar rcs $$@ $$^
build/$(1)/train_%: build/$(1)/trainer_%.o build/$(1)/liblonghand.a
	$(CXX) $$^ $(SIMT_LIBS) -o $$@
build/$(1)/test_%: build/$(1)/test/%.o build/$(1)/test/main.o build/$(1)/liblonghand.a
	$(CXX) $$^ $(SIMT_LIBS) -o $$@
endef
$(eval $(call SIMT_RULES,simt,))
$(eval $(call SIMT_RULES,simt-bf16,-DPRECISION_BF16=1))
-include $(wildcard build/*/*.d build/*/*/*.d)

demo:
	@dev/setup.sh demo
	@$(MAKE) --no-print-directory -j$$(nproc) all
	@scripts/demo.sh "$(TEXT)"

test:
	@dev/setup.sh test
	@python3 test/run.py
test-cpu:
	@dev/setup.sh test
	@python3 test/run.py cpu cpu-bf16 asan
test-simt:
	@dev/setup.sh test
	@python3 test/run.py simt
test-python:
	@dev/setup.sh test
	@python3 test/run.py python
test-long:
	@dev/setup.sh test
	@python3 test/run.py --long

bench: $(BENCHES:%=build/$(BUILD_$(PRECISION))/bench_%)
	@for bench in $^; do $$bench || exit 1; done

lint:
	@python3 dev/lint.py
format:
	clang-format -i $$(git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu')
clean:
	rm -rf build train_gpt2
