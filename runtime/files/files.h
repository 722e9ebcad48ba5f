// Files that cannot lie: reading with checked bounds, writing with every error caught, fsynced and renamed whole. All
// offsets are 64-bit.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

// Every file of weights, tokens or a tokenizer of llm.c's manner begins with 256 int32.
constexpr int kHeaderInts = 256;
using Header = std::array<int32_t, kHeaderInts>;
constexpr size_t kHeaderBytes = sizeof(Header);

// A file that is read in pieces, and never mapped: a file that is cut under a mapping, or a disk that fails, is a
// SIGBUS there and an exception here. Throws BadInput naming the file if it cannot be opened or is no regular file.
// Move-only.
class FileReader {
public:
    // What read() asks for, where somebody else has the file.
    using Source = std::function<void(size_t offset, void* to, size_t bytes)>;

    explicit FileReader(const std::string& path);
    FileReader(const std::string& path, size_t size, Source source);
    ~FileReader();
    FileReader(FileReader&& other) noexcept;
    FileReader& operator=(FileReader&& other) noexcept;

    const std::string& path() const { return path_; }
    // As they were when it was opened: bytes, and the time of the last change in nanoseconds.
    size_t size() const { return size_; }
    int64_t modified() const { return modified_; }
    // Threads may read side by side. Throws BadInput naming the file and the numbers if the file is shorter, RunFailed
    // if it was cut since it was opened or cannot be read.
    void read(size_t offset, void* to, size_t bytes) const;
    // For small ranges in no order: no reading ahead of what was asked for.
    void expect_random_reads() const;

private:
    std::string path_;
    int fd_ = -1;
    size_t size_ = 0;
    int64_t modified_ = 0;
    Source source_;
};

// A small file in memory, whose bytes are taken with checked bounds. Throws BadInput as read_small_file() does.
class SmallFile {
public:
    SmallFile(const std::string& path, size_t most);
    const std::string& path() const { return path_; }
    size_t size() const { return bytes_.size(); }
    // `bytes` bytes at `offset`; throws BadInput naming the file and both numbers if the file is shorter.
    const unsigned char* at(size_t offset, size_t bytes) const;

private:
    std::string path_, bytes_;
};

// Buffered writing to one new file; hashes what it writes. Every failure (disk full included) throws RunFailed naming
// the file. close() flushes and fsyncs; a file destroyed without close() is an unfinished one and is removed.
// A process with a file size limit (ulimit -f) must ignore SIGXFSZ to get the error and not the signal.
class FileWriter {
public:
    explicit FileWriter(const std::string& path);
    ~FileWriter();
    FileWriter(const FileWriter&) = delete;
    FileWriter& operator=(const FileWriter&) = delete;

    void write(const void* data, size_t bytes);
    void close();
    uint64_t bytes() const { return bytes_; }
    uint64_t hash() const; // XXH3 of everything written so far

private:
    struct Hasher;

    std::string path_;
    int fd_ = -1;
    uint64_t bytes_ = 0;
    size_t unsynced_ = 0;
    std::vector<unsigned char> buffer_; // what no system call has taken yet
    std::unique_ptr<Hasher> hasher_;
    void flush();
    void sync();
    void write_out(const unsigned char* data, size_t bytes);
};

// Disk space without a name, for what does not fit into memory: zeroed, reserved whole at once so that a full disk
// shows before a run begins and not inside it, and gone with the object however the process ends. Every failure throws
// RunFailed naming the folder.
class UnnamedFile {
public:
    UnnamedFile(const std::string& folder, size_t bytes); // bytes > 0
    ~UnnamedFile();
    UnnamedFile(const UnnamedFile&) = delete;
    UnnamedFile& operator=(const UnnamedFile&) = delete;

    // Copies that leave no page of the file in this process, and that threads may make side by side.
    void write(size_t offset, const void* from, size_t bytes);
    void read(size_t offset, void* to, size_t bytes) const;
    // The same bytes as memory. Pages touched there count as the process's until drop_pages().
    char* data() const { return data_; }
    void drop_pages() const;

private:
    std::string folder_;
    size_t size_;
    int fd_ = -1;
    char* data_ = nullptr; // (size_)
};

// XXH3, 64 bits.
uint64_t bytes_hash(const void* data, size_t bytes);

// Size and XXH3 of a file. A disk error is BadInput: a harmed checkpoint must not take the run down with it.
struct FileSum {
    uint64_t bytes, hash;
};
FileSum file_sum(const std::string& path);

// A whole small file. Throws BadInput if it cannot be read or is larger than `most` bytes.
std::string read_small_file(const std::string& path, size_t most);

// Writes text beside `path`, fsyncs, renames it there and fsyncs the folder.
void write_file_whole(const std::string& path, const std::string& text);

// rename() that throws RunFailed.
void rename_path(const std::string& from, const std::string& to);

// fsync of a folder, so that a rename in it survives a power cut.
void sync_folder(const std::string& path);

// Bytes that an unprivileged writer can still put on the file system that holds `path`.
uint64_t free_disk_bytes(const std::string& path);

// Paths that match a shell glob, sorted; a file that has exactly this name is taken as it is, even if it holds glob
// characters. Throws BadInput if nothing matches.
std::vector<std::string> expand_glob(const std::string& pattern);
