// Preloaded by test_signals.py: sends signals to every thread of the process by its id, as profilers and timers do,
// from a thread of its own. Handlers are empty; what matters is where they run.
//
// SIGNAL_STORM_MICROSECONDS between two rounds of PROF and ALRM to each thread; unset: none
// SIGNAL_STORM_HANG         fsync() of files whose path holds this never returns, as on a network disk that has gone
// SIGNAL_STORM_REPORT       file that gets "sent N handled M" at exit
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_long sent, handled;

static void on_signal(int number) {
    (void)number;
    handled++;
}

static int threads(int* ids, int most) {
    int count = 0;
    DIR* folder = opendir("/proc/self/task");
    if (!folder) return 0;
    for (struct dirent* entry; count < most && (entry = readdir(folder));) {
        int id = atoi(entry->d_name);
        if (id > 0 && id != (int)syscall(SYS_gettid)) ids[count++] = id;
    }
    closedir(folder);
    return count;
}

static void send(int thread, int number) {
    if (syscall(SYS_tgkill, getpid(), thread, number) == 0) sent++;
}

static void* storm(void* unused) {
    (void)unused;
    const char* pause = getenv("SIGNAL_STORM_MICROSECONDS");
    int ids[1024];
    pthread_setname_np(pthread_self(), "storm");
    while (pause) {
        int count = threads(ids, 1024);
        for (int i = 0; i < count; i++) send(ids[i], SIGPROF), send(ids[i], SIGALRM);
        usleep(atol(pause));
    }
    return NULL;
}

int fsync(int fd) {
    const char* hang = getenv("SIGNAL_STORM_HANG");
    char name[64], path[4096] = "";
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    while (hang && readlink(name, path, sizeof path - 1) > 0 && strstr(path, hang)) pause();
    return (int)syscall(SYS_fsync, fd);
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGPROF, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    pthread_t thread;
    pthread_create(&thread, NULL, storm, NULL);
}

__attribute__((destructor)) static void end(void) {
    const char* path = getenv("SIGNAL_STORM_REPORT");
    FILE* file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "sent %ld handled %ld\n", sent, handled);
    fclose(file);
}
