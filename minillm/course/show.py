"""`show(thing)`: the source of a module, class or function, live, so that a lesson cannot drift from the code.

The notebook stores a highlighted page; nbval compares only the plain text, which names the thing and its file and does
not change when a line of it does.
"""

import html
import inspect
from pathlib import Path
from types import ModuleType

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

PACKAGE = Path(__file__).resolve().parents[1]
FOLDED = 70  # lines; what is longer opens on a click

# Colours that keep 4.5:1 contrast on white and on JupyterLab's dark background.
CSS = """<style>
.minillm-source { border-left: 3px solid #0072B2; padding: 0 .8em; font-size: 12.5px; line-height: 1.4; }
.minillm-source pre { font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace; background: none; white-space: pre; overflow-x: auto; margin: .3em 0; color: inherit; }
.minillm-source .where { font-family: sans-serif; opacity: .75; }
.minillm-source .k, .minillm-source .kn, .minillm-source .kc, .minillm-source .ow { color: #2E7BCF; font-weight: 600; }
.minillm-source .s1, .minillm-source .s2, .minillm-source .sd, .minillm-source .sa, .minillm-source .si { color: #2D8A57; }
.minillm-source .c1 { color: #8A6D3B; font-style: italic; }
.minillm-source .nf, .minillm-source .nc, .minillm-source .nd { color: #B3569B; font-weight: 600; }
.minillm-source .mi, .minillm-source .mf { color: #C25E1A; }
</style>"""


class Source:
    """What `show` returns: a page in a notebook, one line elsewhere."""

    def __init__(self, thing):
        thing = inspect.unwrap(thing)  # behind decorators
        module = thing if isinstance(thing, ModuleType) else inspect.getmodule(thing)
        lines, first = inspect.getsourcelines(thing)
        self.code, self.first = inspect.cleandoc("\n" + "".join(lines)) if first else "".join(lines), max(1, first)
        self.name = thing.__name__ if isinstance(thing, ModuleType) else f"{module.__name__}.{thing.__qualname__}"
        path = Path(inspect.getsourcefile(thing)).resolve()
        self.path = path.relative_to(PACKAGE.parent).as_posix() if path.is_relative_to(PACKAGE) else path.name

    def __repr__(self) -> str:
        return f"source of {self.name} ({self.path})"

    def _repr_html_(self) -> str:
        count = self.code.count("\n") + 1
        body = highlight(self.code, PythonLexer(), HtmlFormatter(nowrap=True))
        where = f"{html.escape(self.path)}, from line {self.first}"
        opened = "" if count > FOLDED else " open"
        return (f"{CSS}<details class='minillm-source'{opened}><summary class='where'><b>{html.escape(self.name)}</b> "
                f"&nbsp; {where} ({count} lines)</summary><pre>{body}</pre></details>")


def show(thing) -> Source:
    """Show the source of a module, class, method or function as it is now. Raises: TypeError for anything else."""
    try:
        return Source(thing)
    except (TypeError, AttributeError):
        raise TypeError(f"show() takes a module, class or function of minillm, not {type(thing).__name__} "
                        f"{thing!r}. For a value, show its class: show(type(value)).") from None
