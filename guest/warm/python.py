"""A Python interpreter that is ready before it is asked: it imports modules once and forks for each run.

Runs in the sandbox as `python3 -c <this file> module...`, started by the guest daemon, which is its only client; see
PROTOCOL.md, section 7. The server keeps one spare fork, which takes a request by itself; so no fork and no shared page
is copied while somebody waits. The code then runs as with `python3 -c`, up to its end: `finish` does what users see of
Python's own end, but leaves the heap that all forks share alone.

server: forks a spare -> waits until it is taken -> forks the next when that run has ended, or it lasts, or others wait
spare: rehearses -> waits for a request -> tells server and daemon -> runs it -> ends (a zombie until the daemon knows)
"""

# ruff: noqa: S102, S110, T201, SIM105, RUF063 -- it speaks by print, runs code by trade, and starts with few imports.

import array
import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import types

MAX_REQUEST = 8 << 20
LONG_RUN_S = 0.1  # A run that lasts longer no longer holds up the next spare.
MAX_LOST = 3  # So many spares in a row died untaken: the daemon does better without us.
UNDELIVERED = 120  # Python's exit code when stdout could not be flushed.

try:
    import ctypes

    libc = ctypes.PyDLL(None)  # Calls keep the interpreter's lock, so that daemon threads stand still in `exit`.
except Exception:
    libc = None


class Server:
    """`children` maps the pid of a run to its daemon connection, `exited` the connection of an ended run to its pid."""

    def __init__(self, path):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen(256)
        self.wake_out, self.wake_in = socket.socketpair()
        self.wake_out.setblocking(False)
        self.wake_in.setblocking(False)
        self.marks = marks()
        self.children = {}
        self.exited = {}
        self.spare = self.tether = None
        self.due = 0.0  # when to fork a spare, if there is none
        self.lost = 0
        signal.set_wakeup_fd(self.wake_in.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self):
        """Never returns in the server. In a fork it returns the request to run."""
        waiting = False
        while True:
            if self.spare is None and (waiting or time.monotonic() >= self.due):
                request = self.fork(waiting)
                if request is not None:
                    return request
            waiting = self.wait()
            self.report()

    def wait(self):
        """Until something happened. True: somebody waits for a spare."""
        poll = select.poll()
        for held in (self.wake_out, self.tether if self.spare else self.listener, *self.exited):
            poll.register(held, select.POLLIN)
        patience = None if self.spare else max(0, round(1000 * (self.due - time.monotonic())))
        ready = {descriptor for descriptor, _ in poll.poll(patience)}
        for connection in [held for held in self.exited if held.fileno() in ready]:
            self.acknowledged(connection)
        if self.wake_out.fileno() in ready:
            self.drain()
        return not self.spare and self.listener.fileno() in ready

    def fork(self, waiting):
        tether, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError:
            tether.close()
            theirs.close()
            if waiting:
                self.listener.accept()[0].close()  # The daemon helps itself.
            self.due = time.monotonic() + 1
            return None
        if pid == 0:
            tether.close()
            return self.stand_by(theirs)
        theirs.close()
        tether.setblocking(False)
        self.spare, self.tether = pid, tether
        return None

    def stand_by(self, tether):
        """The spare's life: all that needs no request is done before one comes."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for held in [self.wake_out, self.wake_in, *self.children.values(), *self.exited]:
            held.close()
        gc.disable()
        os.setsid()
        rehearse()
        gc.freeze()
        tether.send(b"r")
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(tether, select.POLLIN)
        while True:
            if any(descriptor != self.listener.fileno() for descriptor, _ in poll.poll()):
                os._exit(0)  # The server is gone.
            connection, _ = self.listener.accept()
            try:
                line, descriptors = receive(connection)
                request = json.loads(line)
                break
            except (OSError, ValueError):
                connection.close()
        # The server first: from here on it knows whom to tell how the run ended.
        socket.send_fds(tether, [b"t"], [connection.fileno()])
        tether.close()
        self.listener.close()
        self.become(request, descriptors, connection)
        return request

    def become(self, request, descriptors, connection):
        """Take the identity of the run and tell the daemon."""
        try:
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            for descriptor in descriptors:
                os.close(descriptor)
            os.setgroups(request["groups"])
            os.setgid(request["gid"])
            os.setuid(request["uid"])
            os.chdir(request["cwd"])
            answer = b'{"pid": %d}\n' % os.getpid()
        except OSError as error:
            answer = json.dumps({"error": str(error), "errno": error.errno}).encode() + b"\n"
        for address, size in self.marks:
            ctypes.memset(address, 0, size)
        if self.marks:
            mark = b"PANDASTACK_PROCESS_ID=" + os.fsencode(request["env"].get("PANDASTACK_PROCESS_ID", ""))
            address, size = self.marks[0]
            ctypes.memmove(address, mark, min(len(mark), size))
        connection.sendall(answer)
        if b"error" in answer:
            os._exit(1)
        connection.close()

    def report(self):
        """Tell the daemon of children that ended. They stay zombies until it hangs up: till then it may signal them."""
        # In this order: one that has ended has said before whether it was taken.
        over = self.spare and look(self.spare) is not None
        if self.spare:
            self.take()
        for pid, connection in list(self.children.items()):
            ended = look(pid)
            if ended is None:
                continue
            status = ended.si_status << 8 if ended.si_code == os.CLD_EXITED else ended.si_status
            del self.children[pid]
            self.exited[connection] = pid
            try:
                connection.sendall(b'{"status": %d}\n' % status)
            except OSError:
                pass  # The daemon restarted; the end of file below reaps the child.
            self.due = 0.0
        if self.spare and over:
            os.waitpid(self.spare, os.WNOHANG)
            self.tether.close()
            self.spare = None
            self.lost += 1
            if self.lost == MAX_LOST:
                print("pandastack: spares end before they are used", file=sys.stderr, flush=True)
                os._exit(1)

    def take(self):
        """Look whether the spare got a request: then it is a child, whose end the daemon's connection hears of."""
        try:
            _, descriptors, _, _ = socket.recv_fds(self.tether, 16, 1)
        except OSError:
            return
        if descriptors:
            self.children[self.spare] = socket.socket(fileno=descriptors[0])
            self.tether.close()
            self.spare, self.lost = None, 0
            self.due = time.monotonic() + LONG_RUN_S

    def acknowledged(self, connection):
        pid = self.exited.pop(connection)
        connection.close()
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass

    def drain(self):
        try:
            while self.wake_out.recv(4096):
                pass
        except BlockingIOError:
            pass


def look(pid):
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return None


def receive(connection):
    """One line and the three descriptors that came with its first bytes."""
    descriptors = array.array("i")
    line = b""
    while not line.endswith(b"\n"):
        data, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(3 * descriptors.itemsize))
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        line += data
        if not data or len(line) > MAX_REQUEST:
            break
    if len(descriptors) != 3 or not line.endswith(b"\n"):
        for descriptor in descriptors:
            os.close(descriptor)
        raise ValueError("no request")
    return line, list(descriptors)


def marks():
    """Where the environment that /proc shows has room for a run's mark, and where the server's own is: address, size.

    The daemon finds what a run left behind by PANDASTACK_PROCESS_ID in /proc/PID/environ. That text is the memory that
    exec filled, so a fork changes it by writing there.
    """
    if libc is None:
        return []
    found = {}
    environ = ctypes.POINTER(ctypes.c_void_p).in_dll(libc, "environ")
    index = 0
    while environ[index]:
        entry = ctypes.string_at(environ[index])
        found[entry.partition(b"=")[0]] = (environ[index], len(entry))
        index += 1
    names = (b"PANDASTACK_WARM_MARK", b"PANDASTACK_PROCESS_ID")
    return [found[name] for name in names] if found.keys() >= set(names) else []


def rehearse():
    """Go through the motions of a run, so that the pages it writes to are the spare's own before somebody waits."""
    request = json.loads('{"code": "", "env": {"A": "b"}, "groups": [], "uid": 0, "cwd": "/"}')
    renew()
    adopt({**os.environ, **request["env"]})
    adopt({name: value for name, value in os.environ.items() if name not in request["env"]})
    code = "import sys\ndef f(x, *y, **z):\n    return [x for x in y]\nclass A:\n    a = f'{1+1}'\nprint('', end='')"
    exec(compile(code, "<string>", "exec", dont_inherit=True), vars(new_main()))
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()


def renew():
    """What a process has of its own, and forks of one saved state would share: randomness, and the time it began."""
    modules = sys.modules
    if "random" in modules:
        modules["random"].seed()
    if "numpy.random" in modules:
        modules["numpy.random"].seed()
    if "multiprocessing.process" in modules:
        modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    if "logging" in modules:
        began = modules["logging"]._startTime
        modules["logging"]._startTime = time.time_ns() if isinstance(began, int) else time.time()


def adopt(wanted):
    """Make os.environ what is wanted, changing only what differs."""
    zone = os.environ.get("TZ")
    for name in [name for name in os.environ if name not in wanted]:
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if os.environ.get("TZ") != zone:
        time.tzset()


def new_main():
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    main.__dict__["__loader__"] = sys.modules["_frozen_importlib"].BuiltinImporter
    if sys.version_info < (3, 14):
        main.__dict__["__annotations__"] = {}
    return main


def run(request):
    """Run the code in a fresh `__main__` and return how the program ends: an exit code, or a signal as -n.

    No name of this frame may hold `__main__`, or it would outlive the clearing in `finish`.
    """
    adopt(request["env"])
    renew()
    sys.argv = ["-c"]
    sys.orig_argv = ["python3", "-c", request["code"]]
    sys.modules["__main__"] = new_main()
    gc.enable()
    try:
        exec(compile(request["code"], "<string>", "exec", dont_inherit=True), vars(sys.modules["__main__"]))
    except SystemExit as error:
        return exit_code(error)
    except BaseException as error:
        uncaught = [error]
    else:
        return 0
    # Outside of `except`, so that an error in the user's own hook has no context that it would not have in Python.
    return show(uncaught.pop())


def exit_code(error):
    """What Python makes of SystemExit."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF if -(1 << 63) <= error.code < 1 << 63 else 0xFF
    try:
        print(error.code, file=sys.stderr, flush=True)
    except BaseException:
        pass
    return 1


def show(error):
    """Hand an exception that nobody caught to sys.excepthook, which may be the user's own, without our own frame."""
    kind, trace = type(error), error.__traceback__.tb_next
    sys.last_type, sys.last_value, sys.last_traceback = kind, error, trace
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    try:
        sys.excepthook(kind, error.with_traceback(trace), trace)
    except SystemExit as left:
        return exit_code(left)
    except BaseException as second:
        print("Error in sys.excepthook:", file=sys.stderr)
        sys.__excepthook__(type(second), second.with_traceback(second.__traceback__.tb_next), second.__traceback__)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(kind, error, trace)
    return -signal.SIGINT if issubclass(kind, KeyboardInterrupt) else 1


def finish(status):
    """End the process as Python does, in its order: threads, atexit, stdout, what the program holds, libc's own end.

    Python would then free every module there is; here that means to copy the whole heap page by page, for nothing. Only
    what came with the run is let go of. Does not return.
    """
    if "threading" in sys.modules:
        try:
            sys.modules["threading"]._shutdown()
        except BaseException as error:
            ignored(f"in: {sys.modules['threading']!r}", error)
    atexit._run_exitfuncs()
    if not flush():
        status = UNDELIVERED
    foreign = let_go()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)  # So that a shell's loop stops too.
    if libc is not None:
        if foreign:
            libc.exit(status)  # A library that the run loaded may write at the end of the process.
        libc.fflush(None)  # What C code printed. All else in `exit` is freeing.
    os._exit(status)


def ignored(where, error):
    try:
        print(f"Exception ignored {where}", file=sys.stderr)
        sys.__excepthook__(type(error), error.with_traceback(error.__traceback__.tb_next), error.__traceback__)
    except BaseException:
        pass


def flush():
    """False when something written to stdout or stderr could not be delivered."""
    delivered = True
    for name in ("stdout", "stderr"):
        file = getattr(sys, name, None)
        try:
            if file is not None and not getattr(file, "closed", False):
                file.flush()
        except BaseException as error:
            delivered = False
            if name == "stdout":
                ignored("while flushing sys.stdout:" if sys.version_info >= (3, 14) else f"in: {file!r}", error)
    return delivered


def let_go():
    """Free what the run made, so that `__del__` and the closing of files happen; then write out what still lives.

    True: the run loaded compiled code that is not Python's own.
    """
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    # Modules stand in the order of their first import.
    imported = [name for name in list(sys.modules)[_loaded:] if name != "__main__"]
    files = [str(getattr(sys.modules[name], "__file__", "")) for name in imported]
    try:
        sys.modules.pop("__main__", None)
        for name in imported:
            sys.modules.pop(name, None)
        gc.collect()
        written = [sys.stdout, sys.stderr]
        # Text before the buffers below it.
        for kind in ("TextIOWrapper", "BufferedWriter", "BufferedRandom"):
            written += [held for held in gc.get_objects() if type(held).__name__ == kind]
        for file in written:
            try:
                if file is not None and not file.closed:
                    file.flush()
            except BaseException:
                pass
    except BaseException as error:
        ignored("at the end:", error)
    return any(file.endswith(".so") and "lib-dynload" not in file for file in files)


def prepare():
    for name in sys.argv[1:]:
        try:
            importlib.import_module(name)
        except Exception as error:
            # A module that is missing costs speed only.
            print(f"pandastack: {name} was not loaded: {error}", file=sys.stderr, flush=True)
    gc.collect()
    gc.freeze()  # Collections in a fork must not touch, and so copy, what the forks share.
    return Server(os.environ["PANDASTACK_WARM_SOCKET"])


_own = sys.modules["__main__"]  # Kept alive: the code runs with another `__main__`.
_server = prepare()
_loaded = len(sys.modules)
_request = _server.fork(False)
if _request is None:
    if _server.spare:
        select.select([_server.tether], [], [])  # The spare is ready too, so that a saved state has it.
    print("ready", flush=True)
    _request = _server.serve()
finish(run(_request))
