"""`python -m MODULE`, without waiting for its imports.

Every notebook of the paper runs in a process of its own, and many of them compute for a few seconds only: importing papermill,
PyTorch, timm, matplotlib and the like would take longer than the work. So one process, the zygote, imports them once, and each
papermill and each kernel is a fork of it, which shares its memory and is ready at once.

    python warm.py serve THREADS COMMAND...       becomes COMMAND (Snakemake), with a zygote beside it
    python warm.py MODULE ARGUMENTS...            does what `python -m MODULE ARGUMENTS` does

The second form hands its arguments, folder, environment, stdin, stdout and stderr to the zygote, and then stands for the forked
process: it relays signals to it, ends with its exit status, and takes it along when it is killed. Without a zygote (another
machine of a cluster, another system than Linux, a zygote that died) it runs the module itself. Jupyter finds it through
kernels/python3 in this folder, so that executed notebooks name the kernel that every installation has.
"""
import atexit, gc, importlib, json, os, runpy, signal, socket, struct, sys, threading

LIBRARIES = ("papermill.cli", "papermill.clientwrap", "ipykernel.kernelapp", "torch", "torch._dynamo", "torch.utils.tensorboard",
             "torchvision", "timm", "accelerate", "lpips", "torch_fidelity", "skimage.metrics", "skimage.segmentation",
             "matplotlib.pyplot", "matplotlib.backends.backend_pdf", "pandas", "far_nb.figures")

connection, status = None, 1         # of a forked process: its line to the process that stands for it, and what it will end with


def become(module, arguments):
    "Go on as `python -m module arguments`."
    sys.modules["rfc3987_syntax"] = None     # a grammar of web addresses, two seconds of papermill's start, for a check that can do without
    sys.argv, sys.path[0] = [module, *arguments], os.getcwd()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def same_user(connection):
    "Whether the other side is ours; a socket that is no file has no permissions."
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1] == os.getuid()


# The side of the job: stand for a forked process.

def messages(connection, parent):
    "What the forked process says until it ends; when our own parent ends first, so do we, and with us the forked process."
    connection.settimeout(0.5)
    while os.getppid() == parent:
        try: message = connection.recv(64)
        except TimeoutError: continue
        except OSError: return
        if not message: return
        yield int(message)
    sys.exit(1)


def by_fork(module, arguments):
    "Exit status of a forked process that became `module`; None when no zygote takes the job."
    parent, connection = os.getppid(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    job = {"module": module, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    try:
        connection.connect("\0" + os.environ["FAR_WARM"])
        if not same_user(connection): return None
        socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
    except OSError:
        return None
    said = messages(connection, parent)
    pid = next(said, None)
    if pid is None: return None
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    connection.send(b"go")
    return [1, *said][-1]                    # a killed process had no time to say its status


# The side of the zygote.

def serve(threads, command):
    "Become `command` and leave a zygote beside it; returns in each process that the zygote forks, with its job."
    parent, name, listener = os.getpid(), f"far_nb-{os.urandom(8).hex()}", socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + name)               # after a zero byte the name is no file's: nothing is left over, however the processes end
    listener.listen(128)
    if os.fork():
        paths = os.path.dirname(os.path.abspath(__file__)), os.environ.get("JUPYTER_PATH")
        os.environ.update(FAR_WARM=name, JUPYTER_PATH=os.pathsep.join(filter(None, paths)))
        os.execvp(command[0], command)
    null, loaded = os.open(os.devnull, os.O_RDWR), False
    for number in range(3): os.dup2(null, number)            # who reads the command's output should not wait for the zygote's end
    listener.settimeout(0.5)
    while os.getppid() == parent:
        try: caller, _ = listener.accept()
        except TimeoutError: continue
        job, files = receive(caller)
        # Libraries read the number of threads when they are loaded: a job with another number has to load its own.
        if job and job["environment"].get("OMP_NUM_THREADS") == threads:
            if not loaded: load(job["environment"])
            loaded = True
            if os.fork() == 0:
                listener.close()
                adopt(job, files, caller)
                return job
        for file in files: os.close(file)
        caller.close()
    os._exit(0)


def receive(caller):
    "The job of a caller and its three files; None for a stranger's and for one that was killed meanwhile."
    caller.settimeout(5)
    try: message, files, *_ = socket.recv_fds(caller, 2 ** 20, 3)
    except OSError: return None, []
    return json.loads(message) if message and same_user(caller) else None, files


def load(environment):
    """Import the libraries as a kernel with this environment would, with its threads and its way to show figures.

    Nothing may run yet that does not survive a fork: threads, parallel loops, sockets of ZeroMQ, anything on a GPU."""
    os.environ.clear()
    os.environ.update({"MPLBACKEND": "module://matplotlib_inline.backend_inline"} | environment)
    os.environ["JPY_PARENT_PID"] = "1"                       # ipykernel need not watch a parent, the forked process does so itself
    atexit.register(leave)
    for library in LIBRARIES: importlib.import_module(library)
    gc.collect(); gc.freeze()                                # the collector's marks would copy the shared memory page by page
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)            # no zombies


def adopt(job, files, caller):
    "Take over, in a forked process, what the caller would have had as a process of its own; end when the caller does."
    global connection
    for number, file in enumerate(files): os.dup2(file, number); os.close(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.modules["numpy"].random.seed()                       # from the system anew, as Python's own generator is after a fork
    if "torch" in sys.modules: sys.modules["torch"].default_generator.seed()
    def follow():
        try: caller.recv(1)                                  # nothing more is sent: it returns when the other side is gone
        finally: os.kill(os.getpid(), signal.SIGKILL)
    caller.settimeout(None)
    caller.send(b"%d" % os.getpid())
    if not caller.recv(2): os._exit(1)                       # "go": from here on the caller relays its signals
    threading.Thread(target=follow, daemon=True).start()
    connection = caller


def leave():
    "Registered first and so called last: end without taking half a million objects apart, which takes half a second."
    if connection is None: return                            # the zygote itself
    connection.send(b"%d" % status)
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(status)


def main(module, *arguments):
    global status
    if module == "serve":
        threads, *command = arguments
        if sys.platform != "linux": os.execvp(command[0], command)
        job = serve(threads, command)
        module, arguments = job["module"], job["arguments"]
    elif "FAR_WARM" in os.environ and (code := by_fork(module, arguments)) is not None:
        sys.exit(code)
    try: become(module, arguments); status = 0
    except SystemExit as end: status = end.code if isinstance(end.code, int) else int(end.code is not None); raise


if __name__ == "__main__": main(*sys.argv[1:])
