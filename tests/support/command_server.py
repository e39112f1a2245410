"""Carries commands out, each in a process of its own that is forked from the one that serves: it has imported all they need.

It has no threads: OMP_NUM_THREADS is 1.
"""

import contextlib
import io
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from pathlib import Path


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(point, run, log):
    """SIGKILL before the `point`-th write, fsync or rename in folder `run` or one within, or in the midst of a write; `log`
    names each."""
    done = 0

    def passing(name):
        nonlocal done
        done += 1
        with open(log, "a") as file:
            os.write(file.fileno(), (name + "\n").encode())
        return done == point

    def inside(path):
        return os.path.abspath(path).startswith(run + os.sep)

    class Torn:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self._file.__exit__(*exc)

        def write(self, data):
            name = os.path.basename(str(self._file.name))
            if passing("write " + name):
                die()
            if passing("half write " + name):
                self._file.write(data[: len(data) // 2])
                self._file.flush()
                die()
            return self._file.write(data)

    opened, replaced, synced = io.open, os.replace, os.fsync

    def open_(file, mode="r", *rest, **options):
        found = opened(file, mode, *rest, **options)
        return Torn(found) if not isinstance(file, int) and inside(file) and set(mode) & set("wax+") else found

    def replace_(a, b, **options):
        if inside(b) and passing("rename " + os.path.basename(b)):
            die()
        replaced(a, b, **options)

    def fsync_(fd):
        if passing("fsync"):
            die()
        synced(fd)

    io.open, os.replace, os.rename, os.fsync = open_, replace_, replace_, fsync_


def send_signal(pid, metrics, lines, delay, number):
    """A process that sends a signal to another some time after `metrics` has that many lines."""
    killer = os.fork()
    if killer == 0:
        while not (os.path.exists(metrics) and Path(metrics).read_bytes().count(b"\n") >= lines):
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(pid, number)
        os._exit(0)
    return killer


def child(job, out, err):
    from fedkseed.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out, 1), os.dup2(err, 2)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    if job["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
    if job["nobody"] and os.getuid() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    if job["kill"]:
        kill_at(*job["kill"])
    sys.argv = ["fedkseed", *job["args"]]
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def carried_out(job):
    """The exit code of a job, its standard output and its standard error."""
    pipes = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        child(job, pipes[0][1], pipes[1][1])
    heard, still = [b"", b""], selectors.DefaultSelector()
    for i, (read, write) in enumerate(pipes):
        os.close(write)
        still.register(read, selectors.EVENT_READ, i)
    killer = send_signal(pid, *job["send"]) if job["send"] else None
    while still.get_map():
        for key, _ in still.select():
            data = os.read(key.fd, 1 << 16)
            heard[key.data] += data
            if not data:
                still.unregister(key.fd)
                os.close(key.fd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if killer is not None:
        os.kill(killer, signal.SIGKILL)
        os.waitpid(killer, 0)
    return code, heard[0].decode(), heard[1].decode()


def serve(connection):
    """Jobs come as `CommandLine.__call__` sends them; back go the exit code, the standard output and the standard error."""
    with contextlib.suppress(EOFError):
        while True:
            connection.send(carried_out(connection.recv()))
