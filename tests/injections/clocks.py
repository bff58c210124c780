"""A wall clock that jumps."""

import os
import subprocess
import sys
from pathlib import Path

from injections.bench import EVERY, Bench, different_runs, finish, newest
from injections.table import Fault, NotInjected, Outcome, require

# Every tenth of a second the wall clock is another one; the monotonic clock is left alone.
JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static int (*next_clock)(clockid_t, struct timespec *);

static long jump(void) {
  static const long seconds[] = {0, 86400, -86400, -3600};
  struct timespec now;
  if (!next_clock) next_clock = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  next_clock(CLOCK_MONOTONIC, &now);
  return seconds[(now.tv_sec * 10 + now.tv_nsec / 100000000) % 4];
}

int clock_gettime(clockid_t id, struct timespec *now) {
  long seconds = jump();
  int status = next_clock(id, now);
  if (status == 0 && id == CLOCK_REALTIME) now->tv_sec += seconds;
  return status;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec precise;
  int status = clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return status;
}

time_t time(time_t *now) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  if (now) *now = precise.tv_sec;
  return precise.tv_sec;
}
"""
PROBE = "import time; t = [(time.sleep(0.02), time.time())[1] for _ in range(30)]; print(max(t) - min(t) > 9e4)"


def jumping(bench: Bench, folder: Path) -> Outcome:
    library = folder / "clock.so"
    (folder / "clock.c").write_text(JUMPING_CLOCK)
    command = ["cc", "-shared", "-fPIC", "-o", library, folder / "clock.c", "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotInjected("there is no C compiler for the library that makes it jump") from error
    environment = {"LD_PRELOAD": str(library)}
    probe = subprocess.run([sys.executable, "-c", PROBE], env=os.environ | environment, capture_output=True, text=True)
    if probe.stdout.strip() != "True":
        raise NotInjected("the system doesn't load the library that makes it jump")
    workdir = folder / "run"
    finish(bench.train(workdir, {"train.num-steps": 3 * EVERY}, **environment))
    for age, step in enumerate((EVERY, 2 * EVERY, 3 * EVERY)):  # the newest looks the oldest
        os.utime(workdir / "checkpoints" / str(step), (1e9 - 1e6 * age, 1e9 - 1e6 * age))
    errors = finish(bench.train(workdir, **environment))
    require(f"from step {3 * EVERY}" in errors, errors)
    require(newest(workdir) > 3 * EVERY, f"newest checkpoint {newest(workdir)}")
    require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome("resumed from the highest step, not from the newest file; end bit-equal", "nothing")


FAULTS = (
    Fault(
        "clock-jumps",
        "LD_PRELOAD: the wall clock jumps by -1 day ... +1 day ten times a second; times of the checkpoints reversed",
        "nothing depends on the wall clock",
        jumping,
    ),
)
