// doctest's own code and main, compiled once and linked into every test program.
#define DOCTEST_CONFIG_IMPLEMENT
#include <csignal>
#include <cstdlib>

#include <doctest/doctest.h>

int main(int argc, char** argv) {
    // On a GPU every launch then waits until its kernel is done, so that tests read results as they are on a CPU. Tests
    // that wait where a program must include asynchronous.h, which has set it already.
    setenv("CUDA_LAUNCH_BLOCKING", "1", 0);
    // A test that calls a trainer's main is linked with what blocks signals for it; nobody takes them here.
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    doctest::Context context(argc, argv);
    // Of a run of several ranks the first says how many tests passed, the others what failed.
    for (const char* name : {"OMPI_COMM_WORLD_RANK", "RANK"})
        if (const char* rank = getenv(name)) {
            context.setOption("no-colors", true); // mpirun gives its ranks a terminal
            if (atoi(rank) > 0) context.setOption("minimal", true);
        }
    return context.run();
}
