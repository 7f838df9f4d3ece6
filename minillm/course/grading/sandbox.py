"""Starting a worker behind the best walls that this machine has, and talking to it from the safe side.

The walls, best first: "bubblewrap" (own files, processes and network, and the worker's lockdown within), "landlock" (the
kernel keeps files shut; the network is cut when the system lets us), "limits" (time and memory only: not safe for code
that you do not trust). Sources: bwrap(1), landlock(7).
"""

import importlib.metadata
import importlib.util
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import cache
from pathlib import Path

from minillm.course.grading import lockdown, protocol

LEVELS = ("bubblewrap", "landlock", "limits")
WARNING = {"bubblewrap": "",
           "landlock": "bubblewrap is missing or not allowed here, so submissions can see which processes run, and where the "
                       "system gives no network of their own they can send UDP. Install bubblewrap.",
           "limits": "NOT SAFE for code that you do not trust: this system offers neither bubblewrap nor landlock, so a "
                     "submission can read and write whatever you can, the tests too. Grade on Linux with bubblewrap."}
PACKAGE = Path(__file__).resolve().parents[2]
INSIDE = ("course/grading/protocol.py", "course/grading/ranks.py", "course/grading/lockdown.py", "course/grading/worker.py")
STAND_IN = """
class Nothing:
    passed, points, results = True, 0, ()


def check(*args, **kwargs):
    return Nothing()


def hint(*args, **kwargs):
    return ""
"""
START = "import sys; sys.path[:0] = {path!r}; from minillm.course.grading.worker import main; main({fd})"
MEMORY = 4 << 30  # bytes, of all processes of a submission together
LIMITS = {"AS": 3 << 30, "CPU": 300, "FSIZE": 32 << 20, "NPROC": 128, "NOFILE": 256, "CORE": 0}
OUTPUT = 20_000  # bytes of what was printed that the instructor gets to see


LIVING: set[int] = set()  # the processes of workers in use


class InfrastructureError(Exception):
    """The sandbox did not start, before any of the student's code ran: never a reason for a score of 0."""


class WorkerGone(Exception):
    """The worker hung, died, or sent what no honest one sends; the text says which, to the student."""


@cache
def best_level() -> str:
    """The best walls that work here, tried out once."""
    if sys.platform == "linux" and shutil.which("bwrap"):
        probe = [*_bwrap([]), "--ro-bind", "/", "/", "true"]
        if subprocess.run(probe, capture_output=True, timeout=30).returncode == 0:
            return "bubblewrap"
    return "landlock" if lockdown.landlock_abi() else "limits"


def _bwrap(folders: list[str]) -> list[str]:
    """bubblewrap's first options. Root stays root until the worker drops it; anybody else needs a user namespace."""
    own = [] if os.getuid() == 0 else ["--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns"]
    return ["bwrap", *own, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
            "--die-with-parent", "--new-session", "--clearenv", *folders]


class Worker:
    """One process for one submission. Use as a context manager: leaving it ends everything that was started in it.

    Raises: InfrastructureError when it does not get ready in three tries.
    """

    def __init__(self, packages=(), allows=(), bans=(), level: str | None = None):
        self.level = level or best_level()
        self.packages, self.allows, self.bans = tuple(packages), tuple(allows), tuple(bans)
        self.folder = Path(tempfile.mkdtemp(prefix="minillm-grade-"))
        self.process = None
        trouble = ""
        for attempt in range(3):
            try:
                self._start()
                return
            except (OSError, EOFError, TimeoutError, protocol.ProtocolError) as error:
                trouble = f"{type(error).__name__}: {error}. {self.printed()[-600:]}"
                self.stop(keep=True)
                time.sleep(1 + 2 * attempt)  # what was there before may still be dying
        self.stop()
        raise InfrastructureError(f"the {self.level} sandbox did not start: {trouble}")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self) -> None:
        library, site, scratch = self.folder / "lib", self.folder / "site", self.folder / "scratch"
        _copy_library(library, self.allows)
        entries = site_entries(self.packages)
        site.mkdir(exist_ok=True)
        scratch.mkdir(exist_ok=True)
        for path in (self.folder, library, site):
            path.chmod(0o755)
        scratch.chmod(0o777)
        ours, theirs = socket.socketpair()
        self.channel = ours
        system = _system_folders()
        environment = {"OMP_NUM_THREADS": "1", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin",
                       "PYTHONHASHSEED": "0", "GLOO_SOCKET_IFNAME": "lo"}
        if self.level == "bubblewrap":
            inside_library, inside_site = "/grader/lib", "/grader/site"
            command = _bwrap(_walls(system, library, entries)) + [part for k, v in environment.items() for part in ("--setenv", k, v)]
            command += ["--chdir", "/tmp"]
            readable, writable = ["/"], ["/tmp", "/dev/shm", "/dev/null"]
        else:
            for name, real in entries.items():
                if not (site / name).exists():
                    (site / name).symlink_to(real)
            inside_library, inside_site, command = str(library), str(site), []
            environment["HOME"] = environment["TMPDIR"] = str(scratch)
            readable = [str(self.folder), *system, *map(str, entries.values()), "/dev/urandom"]
            writable = [str(scratch), "/dev/null"]
        start = START.format(path=[inside_library, inside_site], fd=theirs.fileno())
        command += [_python(), "-I", "-S", "-B", "-c", start]
        _become_subreaper()
        self.before = _descendants(os.getpid(), _processes())
        with (self.folder / "printed").open("ab") as printed:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, env=environment,
                                            cwd=scratch, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        LIVING.add(self.process.pid)
        limits = {**LIMITS, "NPROC": LIMITS["NPROC"] + (0 if self.level == "bubblewrap" or os.getuid() == 0 else _own_threads())}
        lock = [_unused_uid(), limits, readable, writable, self.level != "bubblewrap"]
        if self.level == "limits":
            lock[2:4] = [["/"], ["/"]]
        ready = self._exchange({"packages": list(self.packages), "bans": list(self.bans), "lock": lock}, 60)
        if ready.get("ready") is not True:
            raise protocol.ProtocolError(str(ready.get("trouble")))
        self.held = ready["held"]

    def load(self, cells: list[str], drivers: dict[str, str], definitions_only: bool = False, seconds: float = 30) -> dict:
        """Run the cells. Raises: WorkerGone."""
        return self.ask({"do": "load", "cells": cells, "drivers": drivers, "definitions_only": definitions_only}, seconds)

    def call(self, exercise: str, inputs: tuple, ranks: int, seconds: float) -> dict:
        """What the student's function makes of inputs: {"result": ...} or what happened. Raises: WorkerGone."""
        message = {"do": "call", "exercise": exercise, "inputs": tagged(inputs), "ranks": ranks, "seconds": seconds}
        return self.ask(message, seconds)

    def ask(self, message: dict, seconds: float) -> dict:
        """One request and its answer. Raises: WorkerGone with the reason."""
        try:
            return self._exchange(message, seconds)
        except TimeoutError:
            reason = f"it took longer than {seconds:.0f} seconds"
        except MemoryError:
            reason = f"it used more than {MEMORY >> 30} GB of memory"
        except (EOFError, OSError):
            reason = "it ended the process"
        except protocol.ProtocolError:
            reason = "its answer could not be read"
        self.stop(keep=True)
        raise WorkerGone(reason)

    def _exchange(self, message: dict, seconds: float) -> dict:
        number = secrets.token_hex(8)  # an answer that does not carry it was made before it was asked for
        deadline = time.monotonic() + seconds
        protocol.send(self.channel, {"id": number, **message}, seconds)
        while not select.select([self.channel], [], [], 0.25)[0]:
            if time.monotonic() > deadline:
                raise TimeoutError
            if memory_of(self.process.pid) > MEMORY:
                raise MemoryError
        answer = protocol.receive(self.channel, max(0.05, deadline - time.monotonic()))
        if not isinstance(answer, dict) or answer.get("id") != number:
            raise protocol.ProtocolError("an answer to nothing")
        return answer

    def printed(self) -> str:
        """The beginning of what was printed, for the instructor alone: it may hold the inputs."""
        try:
            with (self.folder / "printed").open("rb") as file:
                return file.read(OUTPUT).decode("utf-8", "replace")
        except OSError:
            return ""

    def stop(self, keep: bool = False) -> None:
        """End the worker and all its children, daemons too; without `keep`, its folder goes as well."""
        if self.process:
            for kill in (lambda: os.killpg(self.process.pid, signal.SIGKILL), self.process.kill):
                try:
                    kill()
                except (ProcessLookupError, PermissionError):
                    pass
            self.process.wait()
            self.channel.close()
            LIVING.discard(self.process.pid)
            if self.level != "bubblewrap":
                _kill_orphans(self.before)
            self.process = None
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def tagged(value) -> list:
    """Inputs in a form that keeps tuples apart from lists; see worker.as_given."""
    if isinstance(value, dict):
        return ["dict", [[tagged(k), tagged(v)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return ["tuple" if isinstance(value, tuple) else "list", [tagged(v) for v in value]]
    return ["is", value]


def _copy_library(folder: Path, allows: tuple[str, ...]) -> None:
    """A `minillm` that has the worker, the allowed modules, and nothing else."""
    wanted = [*INSIDE, *(name.removeprefix("minillm.").replace(".", "/") + ".py" for name in allows)]
    for name in wanted:
        target = folder / "minillm" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / name, target)
        for parent in target.relative_to(folder).parents:
            if parent.name:
                (folder / parent / "__init__.py").touch()
    (folder / "minillm" / "course" / "check.py").write_text(STAND_IN)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


@cache
def site_entries(packages: tuple[str, ...]) -> dict[str, Path]:
    """The files and folders of installed packages and of all that they require: name -> where it is.

    Raises: InfrastructureError for one that is not installed.
    """
    entries, waiting, seen = {}, [p for p in packages if p not in sys.stdlib_module_names], set()
    names = importlib.metadata.packages_distributions()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(names.get(name, [name])[0])
        except importlib.metadata.PackageNotFoundError:
            if name in packages:
                raise InfrastructureError(f"the package {name}, which an exercise allows, is not installed") from None
            continue  # required on other systems only
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            path = Path(distribution.locate_file(top))
            if path.exists() and not top.startswith("minillm"):
                entries[top] = path.resolve()
        for required in distribution.requires or []:
            if "extra ==" not in required:
                waiting.append("".join(c if c.isalnum() or c in "-_." else " " for c in required).split()[0])
    return entries


def _python() -> str:
    """The interpreter behind the virtual environment, which knows nothing of it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def _system_folders() -> list[str]:
    """What Python and its C libraries are made of."""
    base = Path(sys.base_prefix).resolve()
    folders = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", str(base / "lib"), _python()]
    return [folder for folder in dict.fromkeys(folders) if os.path.exists(folder)]


def _walls(system: list[str], library: Path, entries: dict[str, Path]) -> list[str]:
    """What can be seen inside: Python without its installed packages, then the few that are allowed."""
    walls = []
    targets = [*system, "/grader/lib", "/grader/site/x"]  # bubblewrap makes the folders above them for root alone
    for folder in sorted({str(parent) for target in targets for parent in Path(target).parents} - {"/"}):
        walls += ["--perms", "0755", "--dir", folder]
    for folder in system:
        walls += ["--symlink", os.readlink(folder), folder] if os.path.islink(folder) else ["--ro-bind", folder, folder]
    for folder in system:
        for hidden in _package_folders(folder):
            walls += ["--tmpfs", hidden, "--remount-ro", hidden]
    walls += ["--ro-bind", str(library), "/grader/lib"]
    for name, real in entries.items():
        walls += ["--ro-bind", str(real), f"/grader/site/{name}"]
    return walls + ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(64 << 20), "--tmpfs", "/tmp",
                    "--perms", "1777", "--size", str(64 << 20), "--tmpfs", "/dev/shm", "--remount-ro", "/dev", "--remount-ro", "/"]


@cache
def _package_folders(folder: str) -> list[str]:
    """Folders of installed packages below a folder of the system."""
    if not os.path.isdir(folder) or os.path.islink(folder):
        return []
    found = {str(p) for pattern in ("python*/site-packages", "python*/dist-packages") for p in Path(folder).glob(pattern)}
    return sorted(found | {p for p in [sysconfig.get_paths()["purelib"]] if p.startswith(folder + "/") and os.path.isdir(p)})


def _unused_uid() -> int | None:
    """For root: a user without a name or a file, another one for each worker, so that each has its own limits."""
    _unused_uid.count = getattr(_unused_uid, "count", os.getpid()) + 1
    return 61_184 + _unused_uid.count % 4_000 if os.getuid() == 0 else None


def _processes() -> dict[int, tuple[int, int]]:
    """pid -> (parent's pid, bytes in memory that it shares with no file)."""
    found = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            try:
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
                pages = Path(f"/proc/{name}/statm").read_text().split()
                found[int(name)] = (parent, (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE"))
            except (OSError, ValueError, IndexError):
                continue
    return found


def _descendants(root: int, processes: dict) -> set[int]:
    tree, grew = {root}, True
    while grew:
        more = {pid for pid, (parent, _) in processes.items() if parent in tree} - tree
        tree |= more
        grew = bool(more)
    return tree - {root}


def memory_of(pid: int) -> int:
    """Bytes that a process and all below it use."""
    processes = _processes()
    return sum(processes[p][1] for p in _descendants(pid, processes) | {pid} if p in processes)


def _own_threads() -> int:
    """How many threads this user runs already, because a user's limit counts them all."""
    mine = [p for p in Path("/proc").glob("[0-9]*") if _is_mine(p)]
    return sum(len(os.listdir(p / "task")) for p in mine if (p / "task").exists())


def _is_mine(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


def _become_subreaper() -> None:
    """Daemons of a worker become our children, not init's, so that they can be found."""
    if sys.platform == "linux":
        lockdown.libc().prctl(lockdown.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_orphans(before: set[int]) -> None:
    """Kill what an ended worker has left. Without a pid namespace, its daemons have become children of this process: those
    that were not there `before`, belong to no living worker, and are not in this process's session.
    """
    for _ in range(100):
        processes = _processes()
        spared = before | LIVING | {pid for worker in LIVING for pid in _descendants(worker, processes)}
        left = [pid for pid in _descendants(os.getpid(), processes) - spared if _session(pid) != os.getsid(0)]
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError, PermissionError):
                pass
        time.sleep(0.02)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return os.getsid(0)
