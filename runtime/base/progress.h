// Long work on the host says with each piece that it goes on: a run of several ranks ends when one of them shows no
// sign of progress (ranks/control.h). From any thread; in a run of one rank nobody listens.
#pragma once
#include <functional>

inline std::function<void()> on_progress; // set while no other thread is there to call it

inline void sign_of_progress() {
    if (on_progress) on_progress();
}
