"""A Python interpreter that is ready before it is asked: it imports modules once and forks for each run.

Runs in the sandbox as `python3 -c <this file> module...`, started by the guest daemon, which is its only client; see
PROTOCOL.md, section 7. One thread. A fork runs the caller's code as `python3 -c` would: the server unwinds to the
last lines of this file, so that the end of the program (exit codes, atexit, threads, flushing) is Python's own.
"""

# ruff: noqa: S102, T201, SIM105, SIM108, RUF063 -- it speaks by print, runs code by trade, and starts with few imports.

import array
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import types

MAX_REQUEST = 8 << 20


class Server:
    """Requests wait in `pending` until their line is complete; `children` maps a pid to its daemon connection."""

    def __init__(self, path):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen(256)
        self.wake_out, self.wake_in = socket.socketpair()
        self.wake_out.setblocking(False)
        self.wake_in.setblocking(False)
        self.children = {}
        self.exited = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.wake_out, selectors.EVENT_READ)
        signal.set_wakeup_fd(self.wake_in.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self):
        """Never returns in the server. In a fork it returns the request to run."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    request = self.accept()
                    if request is not None:
                        return request
                elif key.fileobj is self.wake_out:
                    self.drain()
                    self.report()
                else:
                    self.acknowledged(key.fileobj)

    def accept(self):
        connection, _ = self.listener.accept()
        descriptors = []
        try:
            # The daemon sends the whole line at once; the deadline is for a daemon that died half way.
            connection.settimeout(5)
            line, descriptors = receive(connection)
            request = json.loads(line)
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
        except (OSError, ValueError):
            for descriptor in descriptors:
                os.close(descriptor)
            connection.close()
            return None
        if pid == 0:
            self.become(request, descriptors, connection)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        self.children[pid] = connection
        self.report()  # It may have ended already.
        return None

    def become(self, request, descriptors, connection):
        """In the fork: take the identity of the run, tell the daemon, and let go of all that is the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            os.setsid()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            for descriptor in descriptors:
                os.close(descriptor)
            os.setgroups(request["groups"])
            os.setgid(request["gid"])
            os.setuid(request["uid"])
            os.chdir(request["cwd"])
            answer = {"pid": os.getpid()}
        except OSError as error:
            answer = {"error": str(error), "errno": error.errno}
        connection.sendall(json.dumps(answer).encode() + b"\n")
        if "error" in answer:
            os._exit(1)
        self.selector.close()
        for held in [self.listener, self.wake_out, self.wake_in, connection, *self.children.values(), *self.exited]:
            held.close()

    def report(self):
        """Tell the daemon of children that ended. They stay zombies until it hangs up: till then it may signal them."""
        for pid, connection in list(self.children.items()):
            try:
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            except ChildProcessError:
                ended = None
            if ended is None:
                continue
            if ended.si_code == os.CLD_EXITED:
                status = ended.si_status << 8
            else:
                status = ended.si_status
            del self.children[pid]
            self.exited[connection] = pid
            self.selector.register(connection, selectors.EVENT_READ)
            try:
                connection.sendall(b'{"status": %d}\n' % status)
            except OSError:
                pass  # The daemon restarted; the end of file below reaps the child.

    def acknowledged(self, connection):
        self.selector.unregister(connection)
        connection.close()
        try:
            os.waitpid(self.exited.pop(connection), os.WNOHANG)
        except ChildProcessError:
            pass

    def drain(self):
        try:
            while self.wake_out.recv(4096):
                pass
        except BlockingIOError:
            pass


def receive(connection):
    """One line and the three descriptors that came with its first bytes."""
    descriptors = array.array("i")
    line = b""
    while not line.endswith(b"\n"):
        data, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(3 * descriptors.itemsize))
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        line += data
        if not data or len(line) > MAX_REQUEST:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ValueError("no request")
    if len(descriptors) != 3:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ValueError("no descriptors")
    return line, list(descriptors)


def run(request):
    """Run the code in a fresh `__main__`. Returns as a program ends; SystemExit goes through."""
    code = request["code"]
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["-c"]
    sys.orig_argv = ["python3", "-c", code]
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # `random` reseeds itself after a fork, numpy does not.
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    main.__dict__["__loader__"] = sys.modules["_frozen_importlib"].BuiltinImporter
    if sys.version_info < (3, 14):
        main.__dict__["__annotations__"] = {}
    sys.modules["__main__"] = main
    try:
        exec(compile(code, "<string>", "exec", dont_inherit=True), main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        # Shown without our own frame, as if it had been the only one.
        trace = error.__traceback__.tb_next
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        if isinstance(error, KeyboardInterrupt):
            interrupted()
        raise SystemExit(1) from None


def interrupted():
    """Die by SIGINT after the usual end of a program, as Python does, so that a shell's loop stops too."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def prepare():
    for name in sys.argv[1:]:
        try:
            importlib.import_module(name)
        except Exception as error:
            # A module that is missing costs speed only.
            print(f"pandastack: {name} was not loaded: {error}", file=sys.stderr, flush=True)
    server = Server(os.environ["PANDASTACK_WARM_SOCKET"])
    gc.collect()
    gc.freeze()  # Collections in a fork must not touch, and so copy, what the forks share.
    print("ready", flush=True)
    return server


_own = sys.modules["__main__"]  # Kept alive: the code runs with another `__main__`.
run(prepare().serve())
