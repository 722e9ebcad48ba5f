// TCP connections that never block, and frames on them.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

double seconds_now(); // of a clock that only goes forward

class Socket {
public:
    explicit Socket(int fd = -1) : fd_(fd) {}
    Socket(Socket&& other) noexcept : fd_(other.release()) {}
    Socket& operator=(Socket&& other) noexcept {
        reset(other.release());
        return *this;
    }
    ~Socket() { reset(); }
    int fd() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    void reset(int fd = -1); // closes the one it had
    int release() { return std::exchange(fd_, -1); }

private:
    int fd_;
};

// On the loopback alone if that is the address: then no other machine has to reach it. Throws RunFailed.
Socket listen_at(const std::string& address, int port);
// Those that wait to be let in, one a call; empty: nobody.
Socket accept_from(const Socket& listener);
// Tried until then, at most; an empty socket: nobody answers there, for the reason `why`.
Socket connect_to(const std::string& address, int port, double until, std::string& why);

// What goes over a connection is frames: a byte of its kind, the text's bytes (4, little endian), the text.
class Connection {
public:
    static constexpr size_t kMost = 1 << 26; // bytes of a frame
    explicit Connection(Socket socket, size_t most = kMost) : socket_(std::move(socket)), most_(most) {}
    void set_most(size_t bytes = kMost) { most_ = bytes; }
    int fd() const { return socket_.fd(); }
    bool open() const { return bool(socket_); }
    void close() { socket_.reset(); }

    void put(char kind, const std::string& text);
    bool pending() const { return !out_.empty(); }
    // Sent and not yet at the other end's system: lost if this end closes with something unread.
    bool in_flight() const;
    short events() const; // to poll() for
    // Send and receive what can be at once, of what has come no more than a frame; false once the other end has gone.
    bool flush();
    bool fill();
    // The next whole frame of what has come; false if there is none. A size that is no frame's makes it `broken`.
    bool next(char& kind, std::string& text);
    bool broken() const { return broken_; }
    char first() const { return in_.empty() ? 0 : in_[0]; } // kind of the next frame, or 0

private:
    Socket socket_;
    size_t most_;
    std::string in_, out_;
    bool broken_ = false;
};
