#include "errors.h"

#include <filesystem>
#include <new>

namespace {

std::string explain(const std::filesystem::filesystem_error& error) {
    std::string what = error.what();
    const std::string prefix = "filesystem error: ";
    if (what.rfind(prefix, 0) == 0) what = what.substr(prefix.size());
    return what + "; check that the path is right and can be reached";
}

} // namespace

Failure failure_of(const std::exception& error) {
    if (auto* failure = dynamic_cast<const Failure*>(&error)) return *failure;
    if (auto* files = dynamic_cast<const std::filesystem::filesystem_error*>(&error)) {
        const bool disk = files->code() == std::errc::io_error || files->code() == std::errc::no_space_on_device;
        return Failure(disk ? kRunFailed : kBadInput, explain(*files));
    }
    if (dynamic_cast<const std::bad_alloc*>(&error))
        return RunFailed("out of memory: the system, or a limit of this process (ulimit -v, -d), refuses more; lower "
                         "--context, --batch or --memory");
    return RunFailed(error.what());
}
