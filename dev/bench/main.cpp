#include <cstdio>

#include "../../runtime/base/errors.h"
#include "../../runtime/device/device.h"
#include "backend.h"

int main(int argc, char** argv) {
    try {
        check_machine();
        bench::run(argc > 1 ? argv[1] : "");
    } catch (const Failure& failure) {
        fprintf(stderr, "%s\n", failure.what());
        return failure.exit_code;
    }
    return 0;
}
