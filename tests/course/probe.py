import importlib
import os
import re


def probe():
    """Import every module of the course, read every text file, search all of this process's memory."""
    found = {"imports": [], "files": [], "memory": [], "looked at": 0, "regions": 0}
    for name in NAMES:  # noqa: F821  (written above this file by the test)
        try:
            importlib.import_module(name)
            found["imports"].append(name)
        except ImportError:
            pass
    # "[x]yz" finds "xyz" without being it
    patterns = [re.compile((re.escape(a) + "[" + re.escape(b[0]) + "]" + re.escape(b[1:])).encode()) for a, b in HALVES]  # noqa: F821
    for folder, folders, files in os.walk("/"):
        folders[:] = [f for f in folders if os.path.join(folder, f) not in ("/proc", "/sys", "/dev")]
        for name in files:
            path = os.path.join(folder, name)
            if name.endswith((".py", ".pyc", ".ipynb", ".json", ".txt", ".md")):
                try:
                    with open(path, "rb") as file:
                        data = file.read()
                except OSError:
                    continue
                found["looked at"] += 1
                found["files"] += [path for p in patterns if p.search(data)][:1]
    control = re.compile(b"Import every module of the [c]ourse")
    found["control"] = False
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
        for line in maps:
            span, rights = line.split()[:2]
            start, end = (int(x, 16) for x in span.split("-"))
            if rights[0] == "r" and end - start < 1 << 28 and not line.rstrip().endswith((".so", "[vvar]", "[vsyscall]")):
                try:
                    memory.seek(start)
                    data = memory.read(end - start)
                except (OSError, ValueError, OverflowError):
                    continue
                found["regions"] += 1
                found["control"] = found["control"] or control.search(data) is not None
                found["memory"] += [str(p.pattern) for p in patterns if p.search(data)][:3]
    return found
