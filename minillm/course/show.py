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

# No colour keeps a contrast of 4.5:1 both on white and on a dark page, so each theme has its own five.
CSS = """<style>
.minillm-source { --word: #1F66B0; --text: #1E7145; --note: #7A5C26; --name: #9C3F86; --number: #A84A0F;
  border-left: 3px solid var(--word); padding: 0 .8em; font-size: 12.5px; line-height: 1.4; }
[data-jp-theme-light="false"] .minillm-source, .vscode-dark .minillm-source {
  --word: #7DB8F0; --text: #74CFA0; --note: #D3B47A; --name: #E59BD0; --number: #F0A070; }
.minillm-source pre { font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace; background: none; white-space: pre;
  overflow-x: auto; margin: .3em 0; color: inherit; }
.minillm-source .where { font-family: sans-serif; cursor: pointer; }
.minillm-source :is(.k, .kn, .kc, .ow) { color: var(--word); font-weight: 600; }
.minillm-source :is(.s1, .s2, .sd, .sa, .si) { color: var(--text); }
.minillm-source .c1 { color: var(--note); font-style: italic; }
.minillm-source :is(.nf, .nc, .nd) { color: var(--name); font-weight: 600; }
.minillm-source :is(.mi, .mf) { color: var(--number); }
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
