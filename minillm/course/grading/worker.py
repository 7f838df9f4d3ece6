"""The process that runs a student's code and answers calls. It holds no test, no reference, no seed and no other student.

It is trusted until it has said "ready": by then it has imported what the exercises allow and locked itself down. After
that it is the student's. Started by sandbox.py as `main(fd)`, where fd is its end of a socket pair.
"""

import ast
import builtins
import importlib
import os
import re
import socket
import sys
import types

from minillm.course.grading import lockdown, protocol
from minillm.course.grading.ranks import on_ranks


def main(fd: int) -> None:
    """Get ready, load the student's cells, answer until the other end is closed."""
    channel = socket.socket(fileno=fd)
    request = protocol.receive(channel)
    for name in request["packages"]:
        importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    for name in request["bans"]:
        _ban(name)
    held = lockdown.lock_down(*request["lock"])
    protocol.send(channel, {"id": request["id"], "ready": not (trouble := _cannot_import()), "trouble": trouble, "held": held})
    student = Student()
    while True:
        try:
            request = protocol.receive(channel)
        except EOFError:
            os._exit(0)
        try:
            answer = student.load(request) if request["do"] == "load" else student.call(request)
            protocol.send(channel, {"id": request["id"], **answer})
        except TypeError as error:
            protocol.send(channel, {"id": request["id"], "unsendable": str(error)[:300]})


def _cannot_import() -> str:
    """Why Python's own modules cannot be imported any more, if so; a student's code will want some."""
    try:
        importlib.import_module("multiprocessing.popen_fork")
        importlib.import_module("colorsys")
    except ImportError as error:
        return (f"as user {os.getuid()}, {error}: Python lies in a folder that only its owner may enter ({sys.prefix}). Install "
                "bubblewrap, or a Python that all users can read")
    return ""


def _ban(name: str) -> None:
    """Put a refusal in the place of a function that would be the answer."""
    module, _, attribute = name.rpartition(".")

    def refuse(*_, **__):
        raise PermissionError(f"{name} is the answer: write it yourself")
    try:
        setattr(importlib.import_module(module), attribute, refuse)
    except ImportError:
        pass


DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


class Student:
    """The names that a student's cells define, and the exercises' drivers."""

    def __init__(self):
        self.module = types.ModuleType("__main__")
        sys.modules["__main__"] = self.module
        self.drivers = {}

    def load(self, request: dict) -> dict:
        """Run the cells statement by statement, so that a plot that fails does not cost the function below it."""
        self.drivers = request["drivers"]
        problems = []
        for number, source in enumerate(request["cells"]):
            try:
                tree = ast.parse(source)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                problems.append([number, getattr(error, "lineno", None) or 0, type(error).__name__])
                continue
            for statement in tree.body:
                if request["definitions_only"] and not isinstance(statement, DEFINITIONS):
                    continue
                try:
                    code = compile(ast.Module([statement], []), f"<cell {number}>", "exec")
                    exec(code, self.module.__dict__)
                except NotImplementedError:
                    pass
                except BaseException as error:
                    problems.append([number, statement.lineno, _builtin_name(error)])
        return {"problems": problems[:100]}

    def call(self, request: dict) -> dict:
        """One call of an exercise's function, through its driver."""
        function = self.module.__dict__.get(request["exercise"])
        if not callable(function):
            return {"missing": True}
        scope: dict = {}
        exec(self.drivers[request["exercise"]], scope)
        driver = next(v for v in scope.values() if isinstance(v, types.FunctionType))
        inputs = as_given(request["inputs"])
        try:
            if request["ranks"] > 1:
                return {"result": on_ranks(lambda rank: driver(function, rank, *inputs), request["ranks"], request["seconds"])}
            return {"result": driver(function, *inputs)}
        except NotImplementedError:
            return {"unimplemented": True}
        except BaseException as error:
            return {"raised": _builtin_name(error), "place": _place(error)}


def as_given(tagged):
    """Inputs arrive as ["tuple", ...], ["list", ...], ["dict", ...] or ["is", value], because a student's function may need
    a tuple to be one."""
    kind, value = tagged
    if kind == "is":
        return value
    if kind == "dict":
        return {as_given(k): as_given(v) for k, v in value}
    return (tuple if kind == "tuple" else list)(map(as_given, value))


def _builtin_name(error: BaseException) -> str:
    """The nearest exception type that Python itself has: a type of the student's could be named after the input."""
    return next(kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)


def _place(error: BaseException) -> list[int]:
    """Cell and line of the student's that an exception passed last."""
    trace, place = error.__traceback__, []
    while trace:
        if match := re.fullmatch(r"<cell (\d+)>", trace.tb_frame.f_code.co_filename):
            place = [int(match[1]), trace.tb_lineno]
        trace = trace.tb_next
    return place
