"""A report as one HTML file that needs nothing else: pictures are inside, light and dark follow the reader's system."""

import base64
import html
import math

STYLE = """
:root { color-scheme: light dark; --line: #8884; --head: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem; text-align: left; }
th { background: var(--head); } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figcaption { margin-top: .25rem; }
img { max-width: 100%; height: auto; background: white; }
pre { background: var(--head); padding: 1rem; overflow-x: auto; }
pre.text { white-space: pre-wrap; } td:last-child { overflow-wrap: anywhere; }
td.number { white-space: nowrap; }
@media (max-width: 36rem) { body { padding: 0 .5rem; } th, td { padding: .2rem; font-size: .72rem; } }
"""


def shown(value):
    """A value as one line of text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split())


def page(title, tables, pictures, texts):
    """The HTML of a report.

    Args:
        title: str.
        tables: list of (title or None, header or None, rows), rows of values for `shown`.
        pictures: list of (title, what it shows, bytes of a PNG).
        texts: list of (title, text, whether it is code and folded).
    """
    parts = [_table(*table) for table in tables]
    parts += [_picture(*picture) for picture in pictures]
    parts += [_text(*text) for text in texts]
    name = _escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{name}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _table(title, header, rows):
    heading = f"<h2>{_escape(title)}</h2>\n" if title else ""
    if not rows:
        return f"{heading}<p>None.</p>"
    rows = [tuple(row) for row in rows]
    text = [any(isinstance(value, str) for value in column) for column in zip(*rows, strict=True)]

    def line(values, tag):
        kinds = ("" if is_text else ' class="number"' for is_text in text)
        cells = (f"<{tag}{kind}>{_escape(shown(v))}</{tag}>" for v, kind in zip(values, kinds, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line(header, "th")] if header else []
    lines += [line(row, "td") for row in rows]
    return f'{heading}<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _picture(title, caption, content):
    data = base64.b64encode(content).decode()
    return (
        f'<h2>{_escape(title)}</h2>\n<figure><img alt="{_escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_escape(caption)}</figcaption></figure>"
    )


def _text(title, text, folded):
    if folded:
        return f"<details>\n<summary>{_escape(title)}</summary>\n<pre>{_escape(text)}</pre>\n</details>"
    return f'<h2>{_escape(title)}</h2>\n<pre class="text">{_escape(text)}</pre>'


def _escape(text):
    return html.escape(str(text)).encode("utf-8", "backslashreplace").decode()
