// Files: bounds of readers, files cut while they are read, writers against short writes, signals, full disks and size
// limits, whole renames, globs.
#include <doctest/doctest.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>

#include "../runtime/base/errors.h"
#include "../runtime/files/files.h"
#include "scratch.h"

namespace {

std::string random_bytes(size_t n, uint64_t seed) {
    std::mt19937_64 rng(seed);
    std::string bytes(n, '\0');
    for (char& c : bytes) c = static_cast<char>(rng());
    return bytes;
}

void write_through(const std::string& path, const std::string& bytes) {
    FileWriter writer(path);
    writer.write(bytes.data(), bytes.size());
    writer.close();
}

} // namespace

TEST_CASE("a reader and a small file give the bytes of their file and refuse what lies outside") {
    ScratchFolder folder;
    std::string bytes = random_bytes(10000, 1), path = folder / "data", got(10000, '\0');
    put_file(path, bytes);
    FileReader file(path);
    SmallFile small(path, 10000);
    CHECK(file.path() == path);
    CHECK(file.size() == bytes.size());
    CHECK(small.size() == bytes.size());
    file.expect_random_reads();
    file.read(0, got.data(), got.size());
    CHECK(got == bytes);
    CHECK(std::memcmp(small.at(0, bytes.size()), bytes.data(), bytes.size()) == 0);
    file.read(9999, got.data(), 1);
    CHECK(got[0] == bytes[9999]);
    CHECK(*small.at(9999, 1) == static_cast<unsigned char>(bytes[9999]));
    CHECK_NOTHROW(file.read(10000, got.data(), 0));
    CHECK_NOTHROW(small.at(10000, 0));
    for (auto [offset, count] : std::vector<std::pair<size_t, size_t>>{
             {9999, 2}, {10000, 1}, {10001, 0}, {0, 10001}, {1, SIZE_MAX}, {SIZE_MAX, 1}, {SIZE_MAX, SIZE_MAX}}) {
        for (const std::string& said : {message_of<BadInput>([&] { file.read(offset, got.data(), count); }),
                                        message_of<BadInput>([&] { small.at(offset, count); })}) {
            CHECK(contains(said, path));
            CHECK(contains(said, std::to_string(offset)));
            CHECK(contains(said, "10000"));
        }
    }
    CHECK(contains(message_of<BadInput>([&] { SmallFile(path, 9999); }), "9999"));

    FileReader moved(std::move(file));
    CHECK(moved.size() == bytes.size());
    put_file(folder / "other", "abc");
    FileReader other(folder / "other");
    other = std::move(moved);
    other.read(100, got.data(), 50);
    CHECK(std::memcmp(got.data(), bytes.data() + 100, 50) == 0);
    CHECK(other.path() == path);
}

TEST_CASE("a file that is cut while it is open fails the reader by name, and is no signal") {
    ScratchFolder folder;
    std::string path = folder / "data", bytes = random_bytes(100000, 5), got(100000, '\0');
    put_file(path, bytes);
    FileReader file(path);
    REQUIRE(truncate(path.c_str(), 50000) == 0);
    std::string said = message_of<RunFailed>([&] { file.read(0, got.data(), got.size()); });
    CHECK(contains(said, path));
    CHECK(contains(said, "50000 of its 100000 bytes"));
    CHECK_THROWS_AS(file.read(99999, got.data(), 1), RunFailed);
    file.read(0, got.data(), 50000);
    CHECK(got.compare(0, 50000, bytes, 0, 50000) == 0);
}

TEST_CASE("what is no readable file is refused by name") {
    ScratchFolder folder;
    CHECK(contains(message_of<BadInput>([&] { FileReader(folder / "absent"); }), folder / "absent"));
    CHECK(contains(message_of<BadInput>([&] { FileReader(folder.path()); }), "is a folder"));
    REQUIRE(mkfifo((folder / "fifo").c_str(), 0600) == 0);
    CHECK(contains(message_of<BadInput>([&] { FileReader(folder / "fifo"); }), "no regular file")); // and no hang
    CHECK(contains(message_of<BadInput>([&] { file_sum(folder / "absent"); }), folder / "absent"));
    put_file(folder / "empty", "");
    FileReader empty(folder / "empty");
    char byte;
    CHECK(empty.size() == 0);
    CHECK_NOTHROW(empty.read(0, &byte, 0));
    CHECK_THROWS_AS(empty.read(0, &byte, 1), BadInput);
}

TEST_CASE("offsets past 4 GiB") {
    ScratchFolder folder;
    std::string path = folder / "huge";
    int fd = open(path.c_str(), O_RDWR | O_CREAT, 0600);
    REQUIRE(fd >= 0);
    const int64_t far = (int64_t(1) << 32) + 12345;
    if (ftruncate(fd, far + 8) != 0 || pwrite(fd, "far away", 8, far) != 8) {
        MESSAGE("skipped: this file system has no sparse files of 4 GiB");
        close(fd);
        return;
    }
    close(fd);
    FileReader file(path);
    CHECK(file.size() == static_cast<size_t>(far) + 8);
    char got[8];
    file.read(far, got, 8);
    CHECK(std::memcmp(got, "far away", 8) == 0);
    CHECK_THROWS_AS(file.read(far + 1, got, 8), BadInput);
    file.read(12345, got, 1);
    CHECK(got[0] == 0); // the same offset mod 2^32
}

TEST_CASE("a writer writes what it was given, in pieces of any size, and hashes it") {
    ScratchFolder folder;
    std::string bytes = random_bytes(6000000, 2), path = folder / "out";
    std::mt19937_64 rng(3);
    FileWriter writer(path);
    size_t done = 0;
    while (done < bytes.size()) {
        size_t n = rng() % 4 == 0 ? rng() % 3000000 : rng() % 5000;
        n = std::min(n, bytes.size() - done);
        writer.write(bytes.data() + done, n);
        done += n;
        REQUIRE(writer.bytes() == done);
    }
    writer.close();
    CHECK(get_file(path) == bytes);
    CHECK(writer.hash() == bytes_hash(bytes.data(), bytes.size()));
    FileSum sum = file_sum(path);
    CHECK(sum.bytes == bytes.size());
    CHECK(sum.hash == writer.hash());
    CHECK_THROWS_AS(writer.write("x", 1), RunFailed); // closed
    CHECK(get_file(path) == bytes);

    // XXH3 of nothing is a published constant: the hash is the one that other tools compute.
    CHECK(bytes_hash("", 0) == 0x2d06800538d394c2u);
    bytes[1234567] ^= 1;
    CHECK(bytes_hash(bytes.data(), bytes.size()) != sum.hash);
}

TEST_CASE("an unfinished file is removed, an existing one is replaced") {
    ScratchFolder folder;
    std::string path = folder / "out";
    {
        FileWriter writer(path);
        writer.write("half", 4);
    }
    CHECK(!std::filesystem::exists(path));
    put_file(path, "something longer than the new text");
    write_through(path, "new");
    CHECK(get_file(path) == "new");
    CHECK(contains(message_of<RunFailed>([&] { FileWriter(folder / "no/such/folder"); }), folder / "no/such/folder"));
}

// A pipe takes 64 KiB and a signal every millisecond interrupts the writer while it waits: writes come back short, or
// with EINTR.
TEST_CASE("short writes and signals lose nothing") {
    ScratchFolder folder;
    std::string path = folder / "fifo", bytes = random_bytes(size_t(3) << 20, 4), got;
    REQUIRE(mkfifo(path.c_str(), 0600) == 0);
    struct sigaction handler {
    }, before;
    handler.sa_handler = [](int) {}; // no SA_RESTART
    sigaction(SIGALRM, &handler, &before);
    std::jthread reader([&] {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, nullptr); // the signals are for the writer
        int fd = open(path.c_str(), O_RDONLY);
        std::vector<char> chunk(100000);
        for (ssize_t n; (n = read(fd, chunk.data(), chunk.size())) > 0;) {
            got.append(chunk.data(), static_cast<size_t>(n));
            std::this_thread::sleep_for(std::chrono::milliseconds(3));
        }
        close(fd);
    });
    {
        FileWriter writer(path);
        itimerval every{{0, 1000}, {0, 1000}}, never{};
        setitimer(ITIMER_REAL, &every, nullptr);
        writer.write(bytes.data(), bytes.size());
        writer.close(); // a pipe cannot be fsynced, which is no error
        setitimer(ITIMER_REAL, &never, nullptr);
    }
    reader.join();
    sigaction(SIGALRM, &before, nullptr);
    CHECK(got.size() == bytes.size());
    CHECK((got == bytes));
}

TEST_CASE("a full disk and a size limit are errors with a name and a remedy") {
    ScratchFolder folder;
    SUBCASE("full disk") {
        int status = run_in_child([&] {
            enter_small_disk(folder.path(), size_t(1) << 20);
            std::string path = folder / "out";
            std::string said = message_of<RunFailed>([&] { write_through(path, std::string(3 << 20, 'x')); });
            demand(contains(said, path) && contains(said, "No space left on device") && contains(said, "free some"),
                   "the message names file, cause and remedy: " + said);
            demand(!std::filesystem::exists(path), "nothing is left of the file");
            // Small writes reach the disk at close() only.
            put_file(folder / "filler", std::string(1 << 20, 'x'));
            said = message_of<RunFailed>([&] { write_through(path, std::string(100000, 'x')); });
            demand(contains(said, "No space left on device"), "close() reports a full disk: " + said);
            demand(!std::filesystem::exists(path), "nothing is left of the small file");
            put_file(folder / "filler", std::string((1 << 20) - 4096, 'x'));
            put_file(path, "old");
            said = message_of<RunFailed>([&] { write_file_whole(path, std::string(100000, 'x')); });
            demand(contains(said, "No space left on device"), "write_file_whole() reports a full disk: " + said);
            demand(get_file(path) == "old", "the old text is still there");
            demand(!std::filesystem::exists(path + ".tmp"), "nothing is left beside it");
        });
        if (status == kChildSkipped) MESSAGE("skipped: no tmpfs can be mounted here");
        CHECK((status == 0 || status == kChildSkipped));
    }
    SUBCASE("size limit") {
        int status = run_in_child([&] {
            limit_file_size(100000);
            std::string path = folder / "out";
            std::string said = message_of<RunFailed>([&] { write_through(path, std::string(3 << 20, 'x')); });
            demand(contains(said, path) && contains(said, "File too large") && contains(said, "ulimit -f"), said);
            demand(!std::filesystem::exists(path), "nothing is left of the file");
            write_through(path, std::string(100000, 'x')); // exactly the limit
        });
        CHECK(status == 0);
    }
    SUBCASE("a device that takes nothing") {
        // /dev/full answers every write with ENOSPC; a link to it, so that the destructor's unlink removes the link.
        std::filesystem::create_symlink("/dev/full", folder / "full");
        std::string said = message_of<RunFailed>([&] { write_through(folder / "full", "x"); });
        CHECK(contains(said, "No space left on device"));
        CHECK(std::filesystem::exists("/dev/full"));
    }
}

TEST_CASE("write_file_whole replaces whole") {
    ScratchFolder folder;
    std::string path = folder / "options.toml";
    write_file_whole(path, "first");
    CHECK(get_file(path) == "first");
    put_file(path + ".tmp", "left by a kill");
    write_file_whole(path, "second");
    CHECK(get_file(path) == "second");
    CHECK(!std::filesystem::exists(path + ".tmp"));
    std::filesystem::create_directories(folder / "taken/inside");
    CHECK(contains(message_of<RunFailed>([&] { write_file_whole(folder / "taken", "text"); }), folder / "taken"));
    CHECK(!std::filesystem::exists(folder / "taken.tmp"));
    CHECK_THROWS_AS(sync_folder(folder / "absent"), RunFailed);
}

TEST_CASE("small files are read whole or refused") {
    ScratchFolder folder;
    put_file(folder / "text", "0123456789");
    CHECK(read_small_file(folder / "text", 10) == "0123456789");
    std::string said = message_of<BadInput>([&] { read_small_file(folder / "text", 9); });
    CHECK(contains(said, folder / "text"));
    CHECK(contains(said, "10 bytes"));
    CHECK_THROWS_AS(read_small_file(folder / "absent", 9), BadInput);
    CHECK_THROWS_AS(read_small_file(folder.path(), 9), BadInput);
}

TEST_CASE("free space is the file system's") {
    ScratchFolder folder;
    CHECK_THROWS_AS(free_disk_bytes(folder / "absent"), RunFailed);
    int status = run_in_child([&] {
        enter_small_disk(folder.path(), size_t(1) << 20);
        uint64_t before = free_disk_bytes(folder.path());
        demand(before <= (1 << 20) && before >= (1 << 19), "free: " + std::to_string(before));
        put_file(folder / "filler", std::string(500000, 'x'));
        uint64_t after = free_disk_bytes(folder.path());
        demand(before - after >= 500000 && before - after <= 520000, "taken: " + std::to_string(before - after));
    });
    CHECK((status == 0 || status == kChildSkipped));
}

TEST_CASE("globs are sorted by bytes, and a file's own name wins") {
    ScratchFolder folder;
    for (const char* name : {"b_2.bin", "b_10.bin", "B.bin", "a.bin", "a.txt", "x[1].bin", "x1.bin"})
        put_file(folder / name, "");
    using Paths = std::vector<std::string>;
    CHECK(expand_glob(folder / "*_*.bin") == Paths{folder / "b_10.bin", folder / "b_2.bin"});
    CHECK(expand_glob(folder / "[abB]*.bin") ==
          Paths{folder / "B.bin", folder / "a.bin", folder / "b_10.bin", folder / "b_2.bin"});
    CHECK(expand_glob(folder / "a.bin") == Paths{folder / "a.bin"});
    CHECK(expand_glob(folder / "x[1].bin") == Paths{folder / "x[1].bin"});
    CHECK(contains(message_of<BadInput>([&] { expand_glob(folder / "*.zip"); }), folder / "*.zip"));
    CHECK_THROWS_AS(expand_glob(folder / "absent.bin"), BadInput);
    CHECK_THROWS_AS(expand_glob(""), BadInput);
}
