"""Batches: what is found, what is written, starting again; and the protocol's refusals."""

import csv
import io
import json
import os
import stat
import struct
import zipfile

import pytest
import torch
from hostile import ROOT, notebook, solution_cells

from minillm.course.exercises import lesson_exercises
from minillm.course.grading import batch, protocol, reports, sandbox
from minillm.course.grading.grade import seed_for
from minillm.course.grading.submission import find_submissions, without_magics

STUB = (ROOT / "exercises" / "01_tokenization.ipynb").read_bytes()
SOLVED = notebook(*solution_cells())
needs_walls = pytest.mark.skipif(sandbox.best_level() == "limits", reason="no sandbox here: apt install bubblewrap")


@pytest.fixture
def handed_in(tmp_path):
    folder = tmp_path / "in"
    (folder / "carol" / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "alice.ipynb").write_bytes(SOLVED)
    (folder / "bob.ipynb").write_bytes(STUB)
    (folder / "carol" / "my 01 work.ipynb").write_bytes(SOLVED)
    (folder / "carol" / "notes.ipynb").write_bytes(STUB)
    (folder / "carol" / ".ipynb_checkpoints" / "my 01 work.ipynb").write_bytes(STUB)
    with zipfile.ZipFile(folder / "dave.zip", "w") as archive:
        archive.writestr("x/hand-in.ipynb", SOLVED)
    (folder / "=cmd()|'x'.ipynb").write_bytes(STUB)
    (folder / "broken.ipynb").write_bytes(b"{")
    (folder / "thief.ipynb").symlink_to(folder / "alice.ipynb")
    return folder


@needs_walls
def test_a_whole_class(handed_in, tmp_path, capsys):
    out = tmp_path / "out"
    results = batch.grade_all(handed_in, "01", out, jobs=2, with_gradescope=True, gradebook={"SIS ID": "student", "Points": "points", "Part": "=7"})
    points = {r["student"]: (r["verdict"], r.get("points")) for r in results}
    assert points == {"alice": ("graded", 12), "bob": ("graded", 0), "carol": ("graded", 12), "dave": ("graded", 12),
                      "=cmd()|'x'": ("graded", 0), "broken": ("unreadable", 0), "thief": ("unreadable", 0)}
    rows = list(csv.DictReader(io.StringIO((out / "grades.csv").read_text())))
    assert {r["student"]: r["points"] for r in rows}["alice"] == "12" and rows[0]["student"].startswith("'=")
    assert rows[1].keys() >= {"verdict", "percent", "count_pairs", "encode"}
    assert (out / "gradebook.csv").read_text().splitlines()[:2] == ["SIS ID,Points,Part", "'=cmd()|'x',0,7"]
    page = (out / "feedback" / "bob.html").read_text()
    assert "Not implemented yet" in page and "<script" not in page and "http" not in page
    scope = json.loads((out / "gradescope" / "alice" / "results.json").read_text())
    assert scope["score"] == 12 and sum(t["score"] for t in scope["tests"]) == 12 and scope["stdout_visibility"] == "hidden"
    assert stat.S_IMODE((out / "key").stat().st_mode) == 0o600
    # again: nothing is done twice, and nothing changes; a new key grades anew
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    stamps = {p: p.stat().st_mtime_ns for p in (out / "results").iterdir()}
    batch.grade_all(handed_in, "01", out, jobs=2, with_gradescope=True, gradebook={"SIS ID": "student", "Points": "points", "Part": "=7"})
    graded = {p for p, t in stamps.items() if p.stat().st_mtime_ns == t}
    assert len(graded) == 5 and {p: p.read_bytes() for p in before if p.name == "grades.csv"}[out / "grades.csv"]
    (handed_in / "bob.ipynb").write_bytes(SOLVED)
    assert {r["student"]: r["points"] for r in batch.grade_all(handed_in, "01", out)}["bob"] == 12


@needs_walls
def test_the_same_key_grades_the_same_and_variants_pay_their_own(handed_in, tmp_path):
    key = tmp_path / "key"
    key.write_text("a secret of more than sixteen bytes")
    one, two = (batch.grade_all(handed_in / "alice.ipynb", "01", tmp_path / name, key=key)[0] for name in ("one", "two"))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    other = batch.grade_all(handed_in / "alice.ipynb", "01", tmp_path / "one", key=key, variants={"merge_pair": "from_the_right"})[0]
    assert {e["name"]: e["points"] for e in other["exercises"]}["merge_pair"] < 3


@needs_walls
def test_infrastructure_is_no_zero(handed_in, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "START", "raise SystemExit  # {path} {fd}")
    monkeypatch.setattr(sandbox.time, "sleep", lambda _: None)
    from minillm.course.grading.grade import grade
    from minillm.course.grading.submission import Submission
    result = grade(Submission("alice", SOLVED), lesson_exercises("01"), b"k" * 16)
    assert result["verdict"] == "infrastructure" and "points" not in result and "did not start" in result["trouble"]
    text = reports.grades_csv([result], lesson_exercises("01"))
    assert text.splitlines()[1].startswith("alice,infrastructure,,12,,")
    assert "costs you nothing" in reports.feedback_html(result, lesson_exercises("01")) and "score" not in reports.gradescope(result)


def test_requests_that_make_no_sense(handed_in, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    short = tmp_path / "short"
    short.write_text("abc")
    for arguments, error, why in (((tmp_path / "no", "01", tmp_path / "o"), FileNotFoundError, "does not exist"),
                                  ((empty, "01", tmp_path / "o"), ValueError, "holds no notebook"), ((handed_in, "77", tmp_path / "o"), ValueError, "these have")):
        with pytest.raises(error, match=why):
            batch.grade_all(*arguments)
    for more, why in (({"variants": {"x": "y"}}, "variants are given for x"), ({"gradebook": {"a": "b"}}, "column 'a'"), ({"key": short}, "could be guessed")):
        with pytest.raises(ValueError, match=why):
            batch.grade_all(handed_in, "01", tmp_path / "o", **more)


def test_what_is_found(tmp_path):
    with zipfile.ZipFile(tmp_path / "class.zip", "w") as archive:
        archive.writestr("ann/01.ipynb", b"1")
        archive.writestr("ben/01.ipynb", b"2")
        archive.writestr("../../etc/evil.ipynb", b"3")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.ipynb", bytes(200 << 20))
    (tmp_path / "no.zip").write_bytes(b"no zip")
    (tmp_path / "ANN.ipynb").write_bytes(b"4")
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.ipynb").write_bytes(b"5")
    found = {s.student: (s.data[:1], s.trouble) for s in find_submissions(tmp_path, "01")}
    assert found["ANN"] == (b"4", "") and found["ann (2)"] == (b"1", "") and found["ben"] == (b"2", "")
    assert "larger than 20 MB" in found["bomb"][1] and "no readable zip" in found["no"][1] and "there are 2" in found["two"][1]
    assert all("/" not in reports.file_name(s) and reports.file_name(s).strip(".") for s in [*found, "..", "../../etc/passwd", "a\0b", ""])
    assert reports.file_name("é/a") != reports.file_name("é_a")


def test_magics_do_nothing():
    assert without_magics("%matplotlib inline\n!ls\nif x:\n    %time f()") == "pass\npass\nif x:\n    pass"
    assert without_magics("%%time\nf()") == "\nf()" and without_magics("%%bash\nrm x") == ""


VALUES = [None, True, -5, 1 << 80, 1.5, float("inf"), "é\ud800", b"\0x", [1, [2]], {"a": {(1, 2): 3}}, {1, 2}, torch.arange(6).reshape(2, 3),
          torch.tensor(1.5), torch.zeros(0, 3), torch.tensor([True, False]), torch.tensor([0.5, -2.0, 3.0], dtype=torch.bfloat16)]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_arrive_as_they_were(value):
    got = protocol.decode(protocol.encode(value))
    if isinstance(value, torch.Tensor):
        assert torch.equal(got, value) and got.dtype is value.dtype
    else:
        assert got == value and type(got) is type(value)


def framed(tree, sizes=(), data=b"") -> bytes:
    head = json.dumps([tree, list(sizes)]).encode()
    return struct.pack(">I", len(head)) + head + data


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff" * 8, struct.pack(">I", 5) + b"[[[[[", framed({"kind": 1}), framed({"bytes": 0}),
    framed({"tensor": 0, "dtype": "float32", "shape": [3]}, [4], b"1234"), framed({"tensor": 0, "dtype": "object", "shape": [1]}, [4], b"1234"),
    framed({"tensor": 0, "dtype": "float32", "shape": [-1, -1]}, [4], b"1234"), framed({"tensor": 0, "dtype": "float32", "shape": [1 << 62, 0]}, [0]),
    framed({"tensor": 0, "dtype": "float32", "shape": [True]}, [4], b"1234"), framed(1, [9]), framed(1, [-1]), framed(1, (), b"more"),
    framed({"map": [[{"map": []}, 1]]}), framed({"map": [[i, 1] for i in range(30_000)]}), framed({"int": "zz"}), framed({}), framed({"bytes": -1}, [1], b"x")])
def test_bytes_that_no_honest_worker_sends(data):
    with pytest.raises(protocol.ProtocolError):
        protocol.decode(data)


def test_a_bool_tensor_holds_only_bools():
    tensor = protocol.decode(framed({"tensor": 0, "dtype": "bool", "shape": [3]}, [3], b"\x02\x00\xff"))
    assert tensor.tolist() == [True, False, True]


@pytest.mark.skipif(sandbox.lockdown.landlock_abi() == 0, reason="this kernel has no landlock")
def test_landlock_alone_keeps_files_and_network_shut(monkeypatch, tmp_path):
    """Without bubblewrap. Root stays root here, because its Python may lie where only root may read."""
    monkeypatch.setattr(sandbox, "_unused_uid", lambda: None)
    secret = tmp_path / "secret"
    secret.write_text("12 of 12")
    look = (f"import os, socket\ndef f():\n    seen = {{}}\n    for name, what in (('read', lambda: open({str(secret)!r}).read()),\n"
            f"            ('list', lambda: os.listdir({str(ROOT)!r})), ('write', lambda: open({str(tmp_path / 'new')!r}, 'w')),\n"
            "            ('kill', lambda: os.kill(os.getppid(), 0)), ('run', lambda: os.execv('/bin/ls', ['ls'])),\n"
            "            ('tcp', lambda: socket.create_connection(('127.0.0.1', 9), 1))):\n        try:\n            seen[name] = repr(what())\n"
            "        except OSError as error:\n            seen[name] = type(error).__name__\n    return seen")
    with sandbox.Worker(("numpy",), level="landlock") as worker:
        folder = worker.folder
        assert worker.held["files"]
        assert worker.load([look], {"f": "def call(answer):\n    return answer()"})["problems"] == []
        seen = worker.call("f", (), 1, 5)["result"]
    assert seen["read"] == seen["list"] == seen["write"] == seen["run"] == "PermissionError"
    assert seen["tcp"] in ("PermissionError", "ConnectionRefusedError") and not (tmp_path / "new").exists() and not folder.exists()
    assert seen["kill"] == "PermissionError" or sandbox.lockdown.landlock_abi() < 6


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_daemons_are_found_without_a_pid_namespace(monkeypatch):
    monkeypatch.setattr(sandbox, "_unused_uid", lambda: None)
    daemon = ("import os, time\ndef f():\n    if os.fork() == 0:\n        os.setsid()\n        pid = os.fork()\n        if pid == 0:\n            time.sleep(600)\n"
              "        open(os.environ['TMPDIR'] + '/pid', 'w').write(str(pid))\n        os._exit(0)\n"
              "    os.wait()\n    return int(open(os.environ['TMPDIR'] + '/pid').read())")
    with sandbox.Worker((), level="limits") as worker:
        worker.load([daemon], {"f": "def call(answer):\n    return answer()"})
        pid = worker.call("f", (), 1, 5)["result"]
        os.kill(pid, 0)  # alive
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_inputs_depend_on_student_and_key():
    seeds = {seed_for(key, student) for key in (b"one key", b"another") for student in ("ann", "ben")}
    assert len(seeds) == 4 and seed_for(b"one key", "ann") in seeds
    exercise = lesson_exercises("01")[0]
    drawn = {repr(exercise.cases(exercise.tests[0], seed)) for seed in seeds}
    assert len(drawn) == 4


@needs_walls
def test_an_answer_to_nothing_ends_the_worker():
    """A frame that is whole and well formed, but was made before anything was asked."""
    forged = ("import os, struct, json\nhead = json.dumps([{'map': [['id', 'made up'], ['problems', []]]}, []]).encode()\n"
              "frame = struct.pack('>I', len(head)) + head\nfor fd in range(3, 30):\n    try:\n"
              "        os.write(fd, struct.pack('>Q', len(frame)) + frame)\n    except OSError:\n        pass")
    with sandbox.Worker(()) as worker, pytest.raises(sandbox.WorkerGone, match="could not be read"):
        worker.load([forged], {})
