"""`%%ranks`: run a notebook cell on every rank of a live session, each with variables of its own that stay.

    %load_ext minillm.course.ranks_magic
    ranks = Ranks(4)                       # from minillm.parallel.live
    %%ranks                                # or the session's name, if it is not `ranks`: %%ranks mine
    x = torch.ones(2) * me.rank
    x                                      # a last expression is shown, rank by rank

The variables are the ranks' own: those of the notebook are not there, and `me` is the rank (see parallel/rank.py).
"""

import ast
import linecache
import sys

from minillm.parallel.live import Ranks
from minillm.parallel.rank import Rank

FILE = "<ipython-input-ranks>"  # what tracebacks call the cell


def load_ipython_extension(shell) -> None:
    """What %load_ext calls."""
    def ranks(line: str, cell: str) -> None:
        """Run the cell on the ranks of the session that the line names."""
        name = line.strip() or "ranks"
        live = shell.user_ns.get(name)
        if not isinstance(live, Ranks):
            raise NameError(f"{name!r} is no session of ranks here: make one first, {name} = Ranks(4).")
        live.run(run_cell, cell)

    shell.register_magic_function(ranks, "cell", "ranks")


def run_cell(me: Rank, source: str) -> None:
    """Run source with the variables that earlier cells left on this rank, and print the value of its last expression."""
    variables = me.state.setdefault("cell", {"__name__": "__ranks__"})
    variables["me"] = me
    linecache.cache[FILE] = (len(source), None, source.splitlines(keepends=True), FILE)
    body = ast.parse(source, FILE).body
    shown = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), FILE, "exec"), variables)
    value = eval(compile(shown, FILE, "eval"), variables) if shown else None
    if value is not None:
        sys.stdout.write(f"{value!r}\n")
