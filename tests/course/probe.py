import importlib
import os
import re

NEEDLES = [(first.encode(), second.encode()) for first, second in PARTS]  # noqa: F821  (written above this file by the test)


def held(data):
    """The needles in it, told by their first parts. Whole ones are never made, or they would be found in this memory."""
    found = []
    for first, second in NEEDLES:
        at = data.find(first)
        while at >= 0 and not data.startswith(second, at + len(first)):
            at = data.find(first, at + 1)
        found += [repr(first)] if at >= 0 else []
    return found


def probe():
    """Import every module of the course, read every text file, search all of this process's memory."""
    found = {"imports": [], "files": [], "memory": [], "looked at": 0, "regions": 0}
    for name in NAMES:  # noqa: F821  (written above this file by the test)
        try:
            importlib.import_module(name)
            found["imports"].append(name)
        except ImportError:
            pass
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
                found["files"] += [path] if held(data) else []
    control = re.compile(b"Import every module of the [c]ourse")  # finds the sentence above without being it
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
                found["memory"] += held(data)[:3]
    return found
