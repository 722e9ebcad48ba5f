#include "share.h"

#include <algorithm>
#include <cstring>
#include <memory>

void share(Control& control, void* data, size_t bytes) {
    constexpr size_t kPiece = size_t(1) << 20, kPieces = 32; // before rank 0 waits for the others to have come so far
    for (size_t first = 0, count = 0; first < bytes; first += kPiece) {
        const size_t n = std::min(kPiece, bytes - first);
        char* at = static_cast<char*>(data) + first;
        const std::string piece = control.broadcast(control.rank() ? "" : std::string(at, n));
        if (control.rank()) memcpy(at, piece.data(), n);
        control.progress();
        if (++count % kPieces == 0) control.barrier();
    }
    control.barrier();
}

FileReader share_reader(Control& control, std::optional<FileReader> own) {
    const std::string path = control.broadcast(own ? own->path() : "");
    const size_t size = std::stoull(control.broadcast(own ? std::to_string(own->size()) : ""));
    const auto file = own ? std::make_shared<FileReader>(std::move(*own)) : nullptr;
    return FileReader(path, size, [file, &control](size_t offset, void* to, size_t bytes) {
        if (file) file->read(offset, to, bytes);
        share(control, to, bytes);
    });
}
