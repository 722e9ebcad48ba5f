#include "files.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

// AVX2 hashes faster than memory delivers; g++ 12 finds uninitialised values in its own AVX-512 intrinsics.
#if defined(__AVX512F__)
#define XXH_VECTOR XXH_AVX2
#endif
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../base/errors.h"
#include "../base/progress.h"

namespace {

// One system call for 1 MiB costs less than a thousandth of copying it, and a writer's buffer stays small beside a
// model.
constexpr size_t kBufferBytes = size_t(1) << 20;

// Linux moves at most 2^31 - 4096 bytes a call; a round number below that.
constexpr size_t kLargestCall = size_t(1) << 30;

// What a file writer leaves to the system at once: to bring all of a large file to the disk at its end may take as long
// as all that came before.
constexpr size_t kUnsynced = size_t(256) << 20;

const char* advice(int error) {
    switch (error) {
    case ENOSPC:
    case EDQUOT:
        return "free some space there, or write elsewhere";
    case EFBIG:
        return "raise the file size limit (ulimit -f), or use a file system for larger files";
    case EIO:
        return "check the disk";
    case EACCES:
    case EPERM:
    case EROFS:
        return "check the permissions";
    case EMFILE:
    case ENFILE:
        return "raise the limit of open files (ulimit -n)";
    case ENOENT:
        return "check the path";
    default:
        return nullptr;
    }
}

std::string with_reason(const std::string& what, int error) {
    std::string said = what + ": " + std::strerror(error);
    if (const char* remedy = advice(error)) said += std::string("; ") + remedy;
    return said;
}

[[noreturn]] void fail(const std::string& what, int error) { throw RunFailed(with_reason(what, error)); }
[[noreturn]] void refuse(const std::string& what, int error) { throw BadInput(with_reason(what, error)); }

template <class Call> auto retried(Call call) {
    auto result = call();
    while (result < 0 && errno == EINTR) result = call();
    return result;
}

// Some file systems cannot fsync folders or special files and say EINVAL; there is nothing more to do for those.
bool sync_descriptor(int fd) {
    return retried([&] { return fsync(fd); }) == 0 || errno == EINVAL || errno == ENOTSUP;
}

struct Descriptor {
    int fd;
    explicit Descriptor(int open_fd) : fd(open_fd) {}
    Descriptor(Descriptor&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
    ~Descriptor() {
        if (fd >= 0) close(fd);
    }
};

// O_NONBLOCK: opening a FIFO that nobody writes to must not hang; regular files do not care.
Descriptor open_to_read(const std::string& path, struct stat& info) {
    Descriptor file(retried([&] { return open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); }));
    if (file.fd < 0) refuse("cannot open " + path, errno);
    if (fstat(file.fd, &info) != 0) refuse("cannot look at " + path, errno);
    if (!S_ISREG(info.st_mode))
        throw BadInput(path + (S_ISDIR(info.st_mode) ? " is a folder" : " is no regular file") + "; name a file");
    return file;
}

} // namespace

// Throws BadInput unless the range lies in a file of `size` bytes.
static void check_range(const std::string& path, size_t size, size_t offset, size_t bytes) {
    if (offset > size || bytes > size - offset)
        throw BadInput(path + " is too short: " + std::to_string(bytes) + " bytes wanted at offset " +
                       std::to_string(offset) + ", but the file has " + std::to_string(size) +
                       "; it may be cut off, make or copy it again");
}

FileReader::FileReader(const std::string& path) : path_(path) {
    struct stat info;
    Descriptor file = open_to_read(path, info);
    size_ = static_cast<size_t>(info.st_size);
    modified_ = int64_t(info.st_mtim.tv_sec) * 1000000000 + info.st_mtim.tv_nsec;
    fd_ = std::exchange(file.fd, -1);
}

FileReader::FileReader(const std::string& path, size_t size, Source source)
    : path_(path), size_(size), source_(std::move(source)) {}

FileReader::~FileReader() {
    if (fd_ >= 0) close(fd_);
}

FileReader::FileReader(FileReader&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), size_(std::exchange(other.size_, 0)),
      modified_(other.modified_), source_(std::move(other.source_)) {}

FileReader& FileReader::operator=(FileReader&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(fd_, other.fd_);
    std::swap(size_, other.size_);
    std::swap(modified_, other.modified_);
    std::swap(source_, other.source_);
    return *this;
}

void FileReader::read(size_t offset, void* to, size_t bytes) const {
    check_range(path_, size_, offset, bytes);
    if (source_) return source_(offset, to, bytes);
    for (size_t done = 0; done < bytes;) {
        ssize_t got = retried([&] {
            return pread(fd_, static_cast<char*>(to) + done, std::min(bytes - done, kLargestCall),
                         static_cast<off_t>(offset + done));
        });
        if (got < 0) fail("cannot read " + path_, errno);
        if (got == 0)
            throw RunFailed(path_ + " was cut to " + std::to_string(offset + done) + " of its " +
                            std::to_string(size_) + " bytes while it was read; make or copy it again");
        done += static_cast<size_t>(got);
        sign_of_progress();
    }
}

void FileReader::expect_random_reads() const { posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM); }

SmallFile::SmallFile(const std::string& path, size_t most) : path_(path), bytes_(read_small_file(path, most)) {}

const unsigned char* SmallFile::at(size_t offset, size_t bytes) const {
    check_range(path_, bytes_.size(), offset, bytes);
    return reinterpret_cast<const unsigned char*>(bytes_.data()) + offset;
}

struct FileWriter::Hasher {
    XXH3_state_t state;
};

FileWriter::FileWriter(const std::string& path) : path_(path), hasher_(std::make_unique<Hasher>()) {
    XXH3_64bits_reset(&hasher_->state);
    fd_ = retried([&] { return open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666); });
    if (fd_ < 0) fail("cannot create " + path, errno);
}

FileWriter::~FileWriter() {
    if (fd_ < 0) return;
    ::close(fd_);
    unlink(path_.c_str());
}

void FileWriter::write(const void* data, size_t bytes) {
    if (fd_ < 0) throw RunFailed("cannot write " + path_ + ": it is closed already");
    const unsigned char* from = static_cast<const unsigned char*>(data);
    XXH3_64bits_update(&hasher_->state, from, bytes);
    bytes_ += bytes;
    if (buffer_.size() + bytes > kBufferBytes) flush();
    if (bytes >= kBufferBytes)
        write_out(from, bytes);
    else
        buffer_.insert(buffer_.end(), from, from + bytes);
}

void FileWriter::flush() {
    write_out(buffer_.data(), buffer_.size());
    buffer_.clear();
}

void FileWriter::write_out(const unsigned char* data, size_t bytes) {
    while (bytes > 0) {
        ssize_t taken = retried([&] { return ::write(fd_, data, std::min(bytes, kUnsynced)); });
        if (taken < 0) fail("cannot write " + path_, errno);
        if (taken == 0) fail("cannot write " + path_, EIO); // would loop for ever
        data += taken;
        bytes -= static_cast<size_t>(taken);
        unsynced_ += static_cast<size_t>(taken);
        if (unsynced_ >= kUnsynced) sync();
        sign_of_progress();
    }
}

void FileWriter::sync() {
    if (!sync_descriptor(fd_)) fail("cannot bring " + path_ + " to the disk", errno);
    unsynced_ = 0;
    sign_of_progress();
}

void FileWriter::close() {
    if (fd_ < 0) return;
    flush();
    sync();
    // Network file systems report a full disk as late as here. After close() the descriptor is gone, whatever it says.
    if (::close(std::exchange(fd_, -1)) != 0 && errno != EINTR) {
        int error = errno;
        unlink(path_.c_str());
        fail("cannot close " + path_, error);
    }
}

uint64_t FileWriter::hash() const { return XXH3_64bits_digest(&hasher_->state); }

// O_TMPFILE where the file system has it, else a file that loses its name at once.
static int open_unnamed(const std::string& folder) {
    int fd = retried([&] { return open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600); });
    if (fd >= 0) return fd;
    std::string name = folder + "/offload_XXXXXX";
    fd = mkostemp(name.data(), O_CLOEXEC);
    if (fd >= 0) unlink(name.c_str());
    return fd;
}

UnnamedFile::UnnamedFile(const std::string& folder, size_t bytes) : folder_(folder), size_(bytes) {
    const std::string what = "cannot reserve " + std::to_string(bytes) + " bytes of disk in " + folder;
    Descriptor file(open_unnamed(folder));
    if (file.fd < 0) fail("cannot create a file in " + folder, errno);
    // Asked first: posix_fallocate() would fill the disk for others before it gave up.
    if (uint64_t free = free_disk_bytes(folder); bytes > free)
        fail(what + ", where " + std::to_string(free) + " are free", ENOSPC);
    int error;
    while ((error = posix_fallocate(file.fd, 0, static_cast<off_t>(bytes))) == EINTR) {
    }
    if (error) fail(what, error);
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd, 0);
    if (mapped == MAP_FAILED) fail("cannot map " + std::to_string(bytes) + " bytes of a file in " + folder, errno);
    data_ = static_cast<char*>(mapped);
    fd_ = std::exchange(file.fd, -1);
}

UnnamedFile::~UnnamedFile() {
    munmap(data_, size_);
    close(fd_);
}

void UnnamedFile::write(size_t offset, const void* from, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t taken = retried([&] {
            return pwrite(fd_, static_cast<const char*>(from) + done, std::min(bytes - done, kLargestCall),
                          static_cast<off_t>(offset + done));
        });
        if (taken <= 0) fail("cannot write to a file without a name in " + folder_, taken < 0 ? errno : EIO);
        sign_of_progress();
        done += static_cast<size_t>(taken);
    }
}

void UnnamedFile::read(size_t offset, void* to, size_t bytes) const {
    for (size_t done = 0; done < bytes;) {
        ssize_t got = retried([&] {
            return pread(fd_, static_cast<char*>(to) + done, std::min(bytes - done, kLargestCall),
                         static_cast<off_t>(offset + done));
        });
        if (got <= 0) fail("cannot read from a file without a name in " + folder_, got < 0 ? errno : EIO);
        sign_of_progress();
        done += static_cast<size_t>(got);
    }
}

void UnnamedFile::drop_pages() const { madvise(data_, size_, MADV_DONTNEED); }

uint64_t bytes_hash(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

FileSum file_sum(const std::string& path) {
    struct stat info;
    Descriptor file = open_to_read(path, info);
    auto state = std::make_unique<XXH3_state_t>();
    XXH3_64bits_reset(state.get());
    posix_fadvise(file.fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    std::vector<unsigned char> buffer(std::clamp(static_cast<size_t>(info.st_size), size_t(4096), kBufferBytes));
    uint64_t bytes = 0;
    for (;;) {
        ssize_t got = retried([&] { return read(file.fd, buffer.data(), buffer.size()); });
        if (got < 0) refuse("cannot read " + path, errno);
        if (got == 0) return {bytes, XXH3_64bits_digest(state.get())};
        XXH3_64bits_update(state.get(), buffer.data(), static_cast<size_t>(got));
        sign_of_progress();
        bytes += static_cast<uint64_t>(got);
    }
}

std::string read_small_file(const std::string& path, size_t most) {
    struct stat info;
    Descriptor file = open_to_read(path, info);
    if (static_cast<uint64_t>(info.st_size) > most)
        throw BadInput(path + " has " + std::to_string(info.st_size) + " bytes, more than the " + std::to_string(most) +
                       " that such a file can have; it is something else");
    std::string text(static_cast<size_t>(info.st_size), '\0');
    size_t have = 0;
    while (have < text.size()) {
        ssize_t got = retried([&] { return read(file.fd, text.data() + have, text.size() - have); });
        if (got < 0) refuse("cannot read " + path, errno);
        if (got == 0) break; // somebody cuts it at this moment: what is left will be judged by its content
        have += static_cast<size_t>(got);
    }
    text.resize(have);
    return text;
}

void write_file_whole(const std::string& path, const std::string& text) {
    std::string beside = path + ".tmp";
    FileWriter writer(beside);
    writer.write(text.data(), text.size());
    writer.close();
    try {
        rename_path(beside, path);
    } catch (...) {
        unlink(beside.c_str());
        throw;
    }
    std::string folder = std::filesystem::path(path).parent_path().string();
    sync_folder(folder.empty() ? "." : folder);
}

void rename_path(const std::string& from, const std::string& to) {
    if (std::rename(from.c_str(), to.c_str()) != 0) fail("cannot rename " + from + " to " + to, errno);
}

void sync_folder(const std::string& path) {
    Descriptor folder(retried([&] { return open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
    if (folder.fd < 0) fail("cannot open the folder " + path, errno);
    if (!sync_descriptor(folder.fd)) fail("cannot bring the folder " + path + " to the disk", errno);
}

uint64_t free_disk_bytes(const std::string& path) {
    struct statvfs info;
    if (retried([&] { return statvfs(path.c_str(), &info); }) != 0)
        fail("cannot ask for the free space at " + path, errno);
    return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

std::vector<std::string> expand_glob(const std::string& pattern) {
    struct stat info;
    if (!pattern.empty() && stat(pattern.c_str(), &info) == 0) return {pattern};
    glob_t found{};
    int result = glob(pattern.c_str(), GLOB_TILDE | GLOB_NOSORT, nullptr, &found);
    std::vector<std::string> paths;
    if (result == 0) paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
    if (result == GLOB_NOSPACE) throw RunFailed("out of memory while looking for files that match '" + pattern + "'");
    if (paths.empty()) {
        const std::string folder = std::filesystem::path(pattern).parent_path().string();
        if (!folder.empty() && access(folder.c_str(), R_OK | X_OK) != 0 && errno != ENOENT)
            throw BadInput("no file matches '" + pattern + "': " + folder + ": " + strerror(errno));
        throw BadInput("no file matches '" + pattern + "'; check the path, and quote it in the shell");
    }
    std::sort(paths.begin(), paths.end()); // by bytes: glob's own order depends on the locale
    return paths;
}
