"""What has been tried against the grader. Each attack must earn nothing, leave nothing behind, and cost the next nothing."""

import getpass
import hashlib
import os
import tempfile
import time
from pathlib import Path

import pytest
from hostile import KEY, ROOT, grade_cells, notebook, points, quick_exercises, solution_cells, strangers

from minillm.course.exercises import lesson_exercises
from minillm.course.grading import grade as grading
from minillm.course.grading.sandbox import best_level

SOLVED = {"count_pairs": 2, "merge_pair": 3, "learn_merges": 4, "encode": 3}
STUBS = "\n".join(f"def {name}(*args):\n    raise NotImplementedError()" for name in SOLVED)

# Each replaces the four functions or does something while the cells run. All must end with 0 points.
ATTACKS = {
    # ending early
    "exits with success": "import os\ndef count_pairs(words):\n    os._exit(0)",
    "exits while loading": "import os\nos._exit(0)",
    "sys.exit in a call": "import sys\ndef count_pairs(words):\n    sys.exit(0)",
    "atexit and excepthook": "import atexit, sys\natexit.register(lambda: print('12/12'))\nsys.excepthook = lambda *a: None\n"
                             "def count_pairs(words):\n    raise KeyboardInterrupt",
    "kills its parent": "import os, signal\nfor pid in (os.getppid(), 1, -1):\n    try:\n        os.kill(pid, signal.SIGTERM)\n"
                        "    except OSError:\n        pass",
    "segmentation fault": "import ctypes\ndef count_pairs(words):\n    ctypes.string_at(0)",
    # values that lie
    "equal to everything": "class Yes(dict):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
                           "    def __contains__(self, key): return True\n    def __len__(self): return 3\n"
                           "def count_pairs(words): return Yes()\ndef merge_pair(*a): return Yes()\n"
                           "def learn_merges(*a): return Yes()\ndef encode(*a): return Yes()",
    "a sequence that lies": "class L(list):\n    def __eq__(self, other): return True\n    def __iter__(self): return iter([])\n"
                            "def merge_pair(*a): return L()\ndef learn_merges(*a): return L()\ndef encode(*a): return L()",
    "patched json": "import json\njson.dumps = lambda *a, **k: '[{\"map\": []}, []]'",
    "patched builtins": "import builtins\nbuiltins.all = lambda *a: True\nbuiltins.isinstance = lambda *a: True\n"
                        "builtins.zip = lambda *a, **k: []",
    "patched comparison": "import sys\nfor name in list(sys.modules):\n    module = sys.modules[name]\n"
                          "    for what in ('difference', 'isclose', 'allclose', 'assert_close', 'encode', 'send'):\n"
                          "        if hasattr(module, what):\n            try:\n                setattr(module, what, lambda *a, **k: None)\n"
                          "            except Exception:\n                pass",
    # the channel
    "forged frames": "import os, struct, json\nfor fd in range(3, 30):\n    try:\n        head = json.dumps([{'map': [['id', 'x'], ['result', 1]]}, []]).encode()\n"
                     "        frame = struct.pack('>I', len(head)) + head\n        os.write(fd, (struct.pack('>Q', len(frame)) + frame) * 5)\n"
                     "    except OSError:\n        pass",
    "garbage frames": "import os\nfor fd in range(3, 30):\n    try:\n        os.write(fd, b'\\xff' * 4096)\n    except OSError:\n        pass",
    "a frame without end": "import os, struct\nfor fd in range(3, 30):\n    try:\n        os.write(fd, struct.pack('>Q', 1 << 60))\n    except OSError:\n        pass",
    "keys that collide": "def count_pairs(words):\n    return {i * (2**61 - 1): 1 for i in range(300_000)}",
    "deep nesting": "def count_pairs(words):\n    x = []\n    for _ in range(100_000):\n        x = [x]\n    return x",
    "an object of its own": "class X:\n    def __reduce__(self):\n        import os\n        return os.system, ('touch /tmp/pickled',)\n"
                            "def count_pairs(words): return X()\ndef encode(*a): return {'x': X()}",
    # looking for answers
    "imports the reference": "from minillm.text.bpe_train import count_pairs, merge_pair",
    "imports the exercises": "import minillm.course.exercises.tokenization as t\ncount_pairs = t.COUNT_PAIRS.reference\nencode = t.ENCODE.reference",
    "a path of its own": f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfor name in [n for n in sys.modules if n.startswith('minillm')]:\n"
                         "    del sys.modules[name]\nfrom minillm.text.bpe_train import count_pairs, merge_pair",
    "reads the reference": f"source = open({str(ROOT / 'minillm/text/bpe_train.py')!r}).read()\nexec(source[source.index('def count_pairs'):])",
    "reads the solutions": f"import json\nfor cell in json.load(open({str(ROOT / 'solutions/01_tokenization.ipynb')!r}))['cells']:\n"
                           "    if cell['cell_type'] == 'code' and 'def ' in ''.join(cell['source']):\n        exec(''.join(cell['source']))",
    "asks the stack": "import sys\ndef count_pairs(words):\n    frame, found = sys._getframe(), []\n    while frame:\n"
                      "        found += [v for v in frame.f_locals.values() if callable(v)]\n        frame = frame.f_back\n"
                      "    for f in found:\n        try:\n            if f is not count_pairs: return f(words)\n        except Exception:\n            pass",
    "asks the collector": "import gc, types\ndef count_pairs(words):\n    for f in gc.get_objects():\n"
                          "        if isinstance(f, types.FunctionType) and f.__name__ == 'count_pairs' and f is not count_pairs:\n            return f(words)",
    # writing and talking outside
    "writes where it can": "import os\nfor place in ('/', '/tmp', '/etc', '/root', '/home', os.path.expanduser('~'), '/dev/shm', '/var/tmp', %r, %r):\n"
                           "    try:\n        open(os.path.join(place, 'minillm-was-here'), 'w').write('x')\n    except OSError:\n        pass"
                           % (str(ROOT), tempfile.gettempdir()),
    "calls outside": "import socket\nheard = []\nfor family, kind, address in ((socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', PORT)),\n"
                     "        (socket.AF_INET, socket.SOCK_DGRAM, ('127.0.0.1', PORT))):\n    try:\n        s = socket.socket(family, kind)\n"
                     "        s.settimeout(1); s.connect(address); s.send(b'hello')\n    except OSError:\n        pass",
    "prints its score": "print('points: 12 of 12')\nimport sys\nsys.stderr.write('{\"points\": 12}')",
    "checks itself": "from minillm.course.check import check\nassert check('count_pairs', None).passed",
}


@pytest.fixture
def outside(tmp_path):
    """A watch: files that an attack could reach, and processes that it could leave."""
    canary = tmp_path / "another-student.json"
    canary.write_text('{"points": 12}')

    def state():
        places = [ROOT, ROOT / "solutions", ROOT / "minillm" / "text", Path("/"), Path("/etc"), Path.home(), Path("/dev/shm"), Path("/var/tmp")]
        # other tests write into these folders meanwhile; what an attack leaves has this name
        names = [str(p / "minillm-was-here") for p in [*places, Path(tempfile.gettempdir())] if (p / "minillm-was-here").exists()]
        left = sorted(p.name for p in Path("/tmp").glob("pickled*"))
        hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (canary, ROOT / "solutions/01_tokenization.ipynb",
                                                                       ROOT / "minillm/text/bpe_train.py")]
        return names, left, hashes
    before, running = state(), strangers()
    yield
    assert state() == before
    # those of a test beside this one end by themselves, and the kernel may still be tidying up; a daemon would stay
    left, deadline = strangers() - running, time.monotonic() + 30
    while left & strangers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left & strangers()


@pytest.fixture
def listener():
    """A port that hears whether anything got out, by TCP and UDP."""
    import socket
    tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp.bind(("127.0.0.1", 0))
    tcp.listen()
    port = tcp.getsockname()[1]
    udp.bind(("127.0.0.1", port))
    for s in (tcp, udp):
        s.settimeout(0.2)
    yield port, tcp, udp
    tcp.close()
    udp.close()


pytestmark = pytest.mark.skipif(best_level() != "bubblewrap", reason="needs bubblewrap: apt install bubblewrap")


@pytest.mark.parametrize("name", ATTACKS)
def test_gains_nothing_and_leaves_nothing(name, outside, listener, monkeypatch):
    monkeypatch.setattr(grading, "LOAD_SECONDS", 3)
    port, tcp, udp = listener
    result = grade_cells(STUBS, ATTACKS[name].replace("PORT", str(port)), seconds=1.5)
    assert result["verdict"] == "graded" and result["points"] == 0, result
    for heard in (tcp.accept, lambda: udp.recv(10)):
        with pytest.raises(TimeoutError):
            heard()
    assert points(grade_cells(*solution_cells(), student="the next one", seconds=10)) == SOLVED


def test_the_same_answers_are_right_without_the_attacks():
    """Or the attacks above would earn 0 for another reason."""
    assert points(grade_cells(STUBS, *solution_cells(), seconds=10)) == SOLVED


@pytest.mark.parametrize("attack", ["import os\ndef encode(text, merges):\n    os._exit(0)", "def encode(text, merges):\n    while True: pass",
                                    "def encode(text, merges):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass"])
def test_what_was_earned_before_stays_earned(attack, outside):
    result = grade_cells(*solution_cells(), attack, seconds=1.5)
    assert points(result) == {**SOLVED, "encode": 0}
    assert "stopped" in result["exercises"][-1]["tests"][0]["says"]


def test_an_endless_cell_costs_only_itself(outside, monkeypatch):
    monkeypatch.setattr(grading, "LOAD_SECONDS", 1.5)
    result = grade_cells("while True: pass", *solution_cells(), seconds=10)
    assert points(result) == SOLVED and "only their imports" in result["problems"][0]


BOMBS = {
    "forks": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "threads": "import threading, time\nwhile True:\n    try:\n        threading.Thread(target=time.sleep, args=(99,)).start()\n    except BaseException:\n        pass",
    "memory": "x = []\nwhile True:\n    x.append(bytearray(1 << 27))",
    "memory by many": "import os\nfor _ in range(12):\n    if os.fork() == 0:\n        x = bytearray(1 << 30)\n        for i in range(0, len(x), 4096): x[i] = 1\n        while True: pass\nwhile True: pass",
    "files": "n = 0\nwhile True:\n    n += 1\n    try:\n        open(f'/tmp/{n}', 'wb').write(bytes(1 << 25))\n    except OSError:\n        pass",
    "shared memory": "n = 0\nwhile True:\n    n += 1\n    try:\n        open(f'/dev/shm/{n}', 'wb').write(bytes(1 << 25))\n    except OSError:\n        pass",
    "output": "while True:\n    print('x' * 1_000_000)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "an enormous answer": "def count_pairs(words): return [0] * (1 << 27)\ndef encode(*a): return b'x' * (1 << 30)",
    "a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)",
    "a daemon that ignores signals": "import os, signal, time\nfor s in range(1, 32):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\n"
                                     "for _ in range(20):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(600)",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ("forks", "a daemon", "output") else pytest.mark.slow) for n in BOMBS])
def test_bombs(name, outside, monkeypatch):
    monkeypatch.setattr(grading, "LOAD_SECONDS", 3)
    result = grade_cells(STUBS, BOMBS[name], seconds=3)
    assert result["verdict"] == "graded" and result["points"] == 0, result
    # in a row, at once: what the bomb left must not keep the next worker from starting
    for _ in range(2):
        assert points(grade_cells(*solution_cells(), student="the next one", seconds=10)) == SOLVED


def test_inside_there_is_nobody_and_nothing(outside):
    look = ("import os, sys\nresult = {'uid': os.getuid(), 'processes': len([p for p in os.listdir('/proc') if p.isdigit()]),\n"
            "    'home': sorted(os.listdir('/grader')), 'environment': sorted(os.environ), 'user': os.environ.get('USER', ''),\n"
            "    'tests': os.path.exists(%r)}\ndef count_pairs(words): return result" % str(ROOT / "tests"))
    from minillm.course.grading.sandbox import Worker
    exercise = quick_exercises()[0]
    with Worker(exercise.packages) as worker:
        worker.load([look], {exercise.name: exercise.driver_source})
        seen = worker.call(exercise.name, ({},), 1, 5)["result"]
    assert seen["uid"] != 0 and seen["processes"] <= 3 and seen["home"] == ["lib", "site"] and not seen["tests"]
    assert set(seen["environment"]) <= {"GLOO_SOCKET_IFNAME", "HOME", "LANG", "LC_CTYPE", "OMP_NUM_THREADS", "PATH", "PWD", "PYTHONHASHSEED", "TMPDIR"}
    assert getpass.getuser() not in str(seen["environment"])


def test_feedback_says_nothing_of_the_inputs(outside):
    leaks = ("def count_pairs(words):\n    print(words)\n    raise ValueError(str(words))",
             "def merge_pair(ids, pair, new_id):\n    raise type(repr(ids), (Exception,), {})(ids)")
    result = grade_cells(*leaks)
    said = str([result["problems"], result["exercises"]])
    assert "ValueError in line 3 of code cell 1" in said and "Exception in line 2 of code cell 2" in said
    assert "{(" not in said and "(1," not in said and "2, 1" not in said


@pytest.mark.parametrize("call", ["F.scaled_dot_product_attention", "getattr(F, 'scaled_dot_' + 'product_attention')",
                                  "torch._C._nn.scaled_dot_product_attention"])
def test_the_librarys_own_answer_is_refused(call):
    cell = (f"import torch, torch.nn.functional as F\ndef causal_attention(q, k, v):\n    return {call}(q, k, v, is_causal=True)\n"
            "def rms_norm(x, weight, eps):\n    return x")
    exercises = [e for e in lesson_exercises("02") if e.name == "causal_attention"]
    result = grading.grade(grading.Submission("x", notebook(cell)), exercises, KEY)
    assert result["points"] == 0 and "PermissionError" in result["exercises"][0]["tests"][0]["says"], result
    assert ("getattr" in call) != any("scaled_dot_product_attention" in problem for problem in result["problems"])
    # the same formula, written by hand, is right; a function of one's own may have any name
    hand = cell.replace(f"{call}(q, k, v, is_causal=True)", "(q @ k.mT / q.shape[-1] ** 0.5 + torch.full((q.shape[-2],) * 2, -torch.inf).triu(1)).softmax(-1) @ v")
    right = grading.grade(grading.Submission("x", notebook(hand)), exercises, KEY)
    assert right["points"] == right["of"] and right["problems"] == [], right


def test_constants_that_fit_one_seed_fit_no_other():
    from minillm.course.exercises import find_exercise
    exercise = find_exercise("encode")
    table = {repr(i): exercise.reference(*i) for seed in (0, 1) for t in exercise.tests for i in exercise.cases(t, seed)}
    assert table
    learned = f"table = {table!r}\ndef encode(*inputs):\n    return table.get(repr(inputs), [])"
    assert grade_cells(STUBS, learned)["points"] == 0


def test_a_hostile_notebook_file_is_unreadable_and_says_why():
    for data, why in ((b"\xff\xfe", "no notebook"), (b"[" * 200_000, "no notebook"), (b"{}", "no readable cells"),
                      (b'{"cells": [{"cell_type": "code", "source": 3}]}', "no readable cells"), (b'{"cells": 7}', "no readable cells"),
                      (notebook(*["pass"] * 3000), "3,000 code cells"), (b"", "no notebook"), (b"null", "no readable cells")):
        result = grading.grade(grading.Submission("x", data), quick_exercises(), b"k" * 16)
        assert result["verdict"] == "unreadable" and result["points"] == 0 and why in result["problems"][0], data[:40]
