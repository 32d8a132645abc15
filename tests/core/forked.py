"""Programs in processes of their own, which need not import first what takes ten seconds: torch and transformers.

Each is forked from a process that was itself forked when the tests had been collected: it has imported what they
import, has run none of them, and has one thread. A program starts with its own arguments, environment, streams and
generators, and has a number to send signals to. What only a new interpreter shows (that a command starts, what it
imports) is tested with one.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

_channel: socket.socket | None = None
_server = 0


def start() -> None:
    """Forks the process that programs are forked from. To be called when all is imported, before any thread runs."""
    global _channel, _server
    _channel, theirs = socket.socketpair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of xdist's own thread, which the child does not meet
        _server = os.fork()
    if _server == 0:
        _serve(theirs)
    theirs.close()


def stop() -> None:
    global _channel
    if _channel is not None:
        _channel.close()
        os.waitpid(_server, 0)
        _channel = None


class Program:
    """`python WORDS` with the interface of subprocess.Popen, as far as tests need it. WORDS: `-m MODULE ...`,
    `-c CODE ...` or `FILE ...`; stdout and stderr: file descriptors, nothing by default."""

    def __init__(
        self, *words: object, stdout: int | None = None, stderr: int | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        assert _channel is not None, "forked.start() was not called: conftest.py does when the tests are collected"
        self.returncode: int | None = None
        told = {"words": [str(word) for word in words], "cwd": str(Path.cwd()), "env": dict(env or os.environ)}
        text = json.dumps(told).encode()
        nothing = os.open(os.devnull, os.O_RDWR)
        self._ended, theirs = os.pipe()
        streams = [nothing, *(nothing if stream is None else stream for stream in (stdout, stderr)), theirs]
        socket.send_fds(_channel, [struct.pack("i", len(text))], streams)
        _channel.sendall(text)
        os.close(nothing)
        os.close(theirs)
        (self.pid,) = struct.unpack("i", os.read(self._ended, 4))

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        return self.wait(0.0, patient=False)

    def wait(self, seconds: float = 400.0, *, patient: bool = True) -> int | None:
        if self.returncode is None:
            if select.select([self._ended], [], [], seconds)[0]:
                (self.returncode,) = struct.unpack("i", os.read(self._ended, 4))
                os.close(self._ended)
            elif patient:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"a program ran for over {seconds} s")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def run(
    *words: object, env: Mapping[str, str] | None = None, seconds: float = 400.0
) -> subprocess.CompletedProcess[str]:
    """A program from start to end, and what it said."""
    return together(*words, envs=[env or os.environ], seconds=seconds)[0]


def together(
    *words: object, envs: list[Mapping[str, str]], seconds: float = 400.0
) -> list[subprocess.CompletedProcess[str]]:
    """The same program in several environments at once. None outlives this call."""
    with tempfile.TemporaryDirectory() as folder:
        said = [[Path(folder) / f"{number}.{name}" for name in ("out", "err")] for number in range(len(envs))]
        running = [_begun(words, *files, env) for files, env in zip(said, envs, strict=True)]
        end = time.monotonic() + seconds
        try:
            for program in running:
                program.wait(max(0.1, end - time.monotonic()))
        finally:
            for program in running:
                program.send_signal(signal.SIGKILL)
        texts = [[file.read_text(errors="backslashreplace") for file in files] for files in said]
    return [
        subprocess.CompletedProcess(words, program.returncode or 0, *text)
        for program, text in zip(running, texts, strict=True)
    ]


def _begun(words: tuple[object, ...], out: Path, err: Path, env: Mapping[str, str]) -> Program:
    with out.open("wb") as stdout, err.open("wb") as stderr:
        return Program(*words, stdout=stdout.fileno(), stderr=stderr.fileno(), env=env)


def ranks(count: int, **more: str) -> list[Mapping[str, str]]:
    """What `torchrun --standalone --nproc-per-node COUNT` tells each process, beside this environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    return [os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | more for rank in range(count)]


# -- in the process that is forked from, and in those that are forked ----------------------------------------------


def _serve(channel: socket.socket) -> NoReturn:
    """Until nobody is left to ask. Pytest's streams, and xdist's wire to the process that collects, are let go."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    _close_others(channel.fileno())
    while True:
        head, streams, _, _ = socket.recv_fds(channel, 4, 4)
        if not head:
            _reap(os.WNOHANG)
            os._exit(0)
        text = bytearray()
        while len(text) < struct.unpack("i", head)[0]:
            text += channel.recv(1 << 16)
        if os.fork() == 0:
            channel.close()
            _watch(json.loads(text), *streams)
        for stream in streams:
            os.close(stream)
        _reap(os.WNOHANG)


def _reap(options: int) -> None:
    try:
        while os.waitpid(-1, options)[0]:
            pass
    except ChildProcessError:
        pass


def _close_others(*kept: int) -> None:
    first = 3
    for last in (*sorted(kept), 1 << 14):
        os.closerange(first, last)
        first = last + 1


def _watch(told: dict[str, Any], stdin: int, stdout: int, stderr: int, ended: int) -> NoReturn:
    """Tells the program's number when it begins, and its exit code when it has ended."""
    child = os.fork()
    if child == 0:
        for number, stream in enumerate((stdin, stdout, stderr)):
            os.dup2(stream, number)
        _close_others()
        _become(**told)
    for stream in (stdin, stdout, stderr):
        os.close(stream)
    os.write(ended, struct.pack("i", child))
    _, status = os.waitpid(child, 0)
    os.write(ended, struct.pack("i", os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _become(words: list[str], cwd: str, env: dict[str, str]) -> NoReturn:
    """Runs the words as a new interpreter would, and ends as it would."""
    code: Any = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        _as_new()
        _execute(words)
        code = 0
    except SystemExit as end:
        code = end.code
        if not (code is None or isinstance(code, int)):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code or 0)


def _as_new() -> None:
    """What pytest has set, and what was drawn or registered while the tests were collected."""
    import numpy
    import torch

    atexit._clear()
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    sys.excepthook, sys.unraisablehook, threading.excepthook = (
        sys.__excepthook__, sys.__unraisablehook__, threading.__excepthook__,
    )  # fmt: skip
    warnings.showwarning = _show_warning  # pytest collects them
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    logging.getLogger().handlers.clear()
    for logger in map(logging.getLogger, list(logging.root.manager.loggerDict)):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)
    random.seed()
    numpy.random.seed()
    torch.default_generator.manual_seed(67280421310721)  # what it begins with in every process
    torch.set_num_threads(1)


def _show_warning(*told: Any) -> None:
    sys.stderr.write(warnings.formatwarning(*told[:4]))


def _execute(words: list[str]) -> None:
    first, *rest = words
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = list(rest)
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
