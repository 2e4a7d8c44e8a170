"""A clock that is wrong: a library that, loaded before others, shifts the time of the day of a process."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long shift;

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv("FAULT_CLOCK_S");
    shift = text ? atol(text) : 0;
}

void shift_clock(long seconds) { shift += seconds; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(now, zone);
    if (!failed) now->tv_sec += shift;
    return failed;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}
"""


def missing() -> str | None:
    return None if shutil.which("gcc") else "gcc not found: it makes the library that shifts a process's clock"


def built(folder: Path) -> Path:
    """The library, for LD_PRELOAD; ``FAULT_CLOCK_S`` is its first shift in seconds, ``shift_clock`` adds to it."""
    library, source = folder / "clock.so", folder / "clock.c"
    if not library.exists():
        source.write_text(SOURCE)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library
