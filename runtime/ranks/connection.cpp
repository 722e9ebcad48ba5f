#include "connection.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include <fcntl.h>
#include <linux/sockios.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../base/errors.h"

namespace {

constexpr size_t kHead = 5;

struct Addresses {
    addrinfo* list = nullptr;
    int error;
    Addresses(const char* host, int port, int flags) {
        addrinfo hints{};
        hints.ai_socktype = SOCK_STREAM, hints.ai_flags = flags | AI_NUMERICSERV;
        error = getaddrinfo(host, std::to_string(port).c_str(), &hints, &list);
    }
    ~Addresses() {
        if (list) freeaddrinfo(list);
    }
    Addresses(const Addresses&) = delete;
    Addresses& operator=(const Addresses&) = delete;
};

void prepare(int fd) {
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
}

} // namespace

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Socket::reset(int fd) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
}

Socket listen_at(const std::string& address, int port) {
    const bool loopback = address == "127.0.0.1" || address == "localhost";
    std::string why = "no address";
    for (const char* host : {loopback ? "127.0.0.1" : "::", loopback ? nullptr : "0.0.0.0"}) {
        if (!host) break;
        const Addresses addresses(host, port, AI_PASSIVE | AI_NUMERICHOST);
        for (const addrinfo* at = addresses.list; at; at = at->ai_next) {
            Socket listener(socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
            const int on = 1, off = 0;
            setsockopt(listener.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
            if (at->ai_family == AF_INET6) setsockopt(listener.fd(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
            if (listener && bind(listener.fd(), at->ai_addr, at->ai_addrlen) == 0 && listen(listener.fd(), 1024) == 0)
                return listener;
            why = strerror(errno);
        }
    }
    throw RunFailed("rank 0 cannot listen on port " + std::to_string(port) + ": " + why +
                    "; LONGHAND_PORT chooses another, on all ranks alike");
}

Socket connect_to(const std::string& address, int port, double until, std::string& why) {
    const Addresses addresses(address.c_str(), port, 0);
    if (addresses.error) why = gai_strerror(addresses.error);
    for (const addrinfo* at = addresses.list; at; at = at->ai_next) {
        Socket one(socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
        if (!one) continue;
        fcntl(one.fd(), F_SETFL, O_NONBLOCK);
        int error = 0;
        if (connect(one.fd(), at->ai_addr, at->ai_addrlen) != 0) {
            error = errno;
            pollfd ready{one.fd(), POLLOUT, 0};
            const double left = std::min(5.0, until - seconds_now());
            if (error == EINPROGRESS && poll(&ready, 1, std::max(0, int(left * 1000))) == 1) {
                socklen_t size = sizeof error;
                getsockopt(one.fd(), SOL_SOCKET, SO_ERROR, &error, &size);
            }
        }
        if (error == 0) {
            prepare(one.fd());
            return one;
        }
        why = strerror(error == EINPROGRESS ? ETIMEDOUT : error);
    }
    return Socket();
}

Socket accept_from(const Socket& listener) {
    Socket one(accept(listener.fd(), nullptr, nullptr));
    if (one) prepare(one.fd());
    return one;
}

void Connection::put(char kind, const std::string& text) {
    const uint32_t size = static_cast<uint32_t>(text.size());
    out_ += kind;
    for (int shift = 0; shift < 32; shift += 8) out_ += static_cast<char>(size >> shift);
    out_ += text;
}

bool Connection::flush() {
    while (!out_.empty()) {
        const ssize_t sent = ::send(socket_.fd(), out_.data(), out_.size(), MSG_NOSIGNAL);
        if (sent < 0) return errno == EAGAIN || errno == EINTR;
        out_.erase(0, static_cast<size_t>(sent));
    }
    return true;
}

bool Connection::in_flight() const {
    int bytes = 0;
    return ioctl(socket_.fd(), SIOCOUTQ, &bytes) == 0 && bytes > 0;
}

bool Connection::fill() {
    char piece[65536];
    while (in_.size() < kHead + most_) {
        const ssize_t got = recv(socket_.fd(), piece, sizeof piece, 0);
        if (got == 0) return false;
        if (got < 0) return errno == EAGAIN || errno == EINTR;
        in_.append(piece, static_cast<size_t>(got));
    }
    return true;
}

bool Connection::next(char& kind, std::string& text) {
    if (in_.size() < kHead) return false;
    uint32_t size = 0;
    for (int i = 0; i < 4; i++) size |= uint32_t(static_cast<unsigned char>(in_[1 + i])) << 8 * i;
    if (size > most_) return broken_ = true, false;
    if (in_.size() < kHead + size) return false;
    kind = in_[0], text = in_.substr(kHead, size);
    in_.erase(0, kHead + size);
    return true;
}

short Connection::events() const { return out_.empty() ? POLLIN : POLLIN | POLLOUT; }
