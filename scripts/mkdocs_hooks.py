"""What MkDocs needs to make the site from the repository as it is; mkdocs.yml names this file.

- The README, the result files and other pages that lie outside docs/ become pages of the site, and links between all of
  them are rewritten, so a link works in the repository and on the site.
- A new page of docs/ is part of the navigation without an entry in mkdocs.yml.
- Docstrings become Markdown: their sections, lists of arguments and examples.
"""

import html
import inspect
import posixpath
import re
from pathlib import Path

from griffe import Alias, Extension
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# pages outside docs/ → where they are on the site
OUTER = {
    "README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md", "examples/README.md": "examples.md", "scripts/README.md": "scripts.md",
}  # fmt: skip
OUTER |= {
    path.relative_to(ROOT).as_posix(): f"results/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.md")
}
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Source|Example):(?: (.*))?$")


def on_config(config):
    """Add the pages of docs/ that mkdocs.yml does not name to the last part of the navigation."""
    (last,) = config.nav[-1].values()
    named = set(re.findall(r"[\w./-]+\.md", repr(config.nav)))
    pages = (path.relative_to(config.docs_dir).as_posix() for path in sorted(Path(config.docs_dir).rglob("*.md")))
    last += [page for page in pages if page not in named]
    return config


def on_files(files, config):
    for source, target in OUTER.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for picture in (ROOT / "benchmarks/results").rglob("*.svg"):
        target = f"results/{picture.relative_to(ROOT / 'benchmarks/results').as_posix()}"
        files.append(File.generated(config, target, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between pages of the site."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    if page.file.src_uri.startswith("api/"):
        page.meta["search"] = {"boost": 4}  # a search for a name should find its reference first
    inner = {target: source for source, target in OUTER.items()}
    here = inner.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    start = posixpath.dirname(page.file.src_uri)

    def rewrite(match):
        target, anchor = match[1], match[2] or ""
        if re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        moved = OUTER.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if moved is None and path.startswith("benchmarks/results/"):
            moved = path.removeprefix("benchmarks/")
        return match[0] if moved is None else f"]({posixpath.relpath(moved, start)}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    for index in range(0, len(parts), 2):
        text = re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", rewrite, parts[index])
        # GitHub begins a list at its first line, Python-Markdown only after an empty line
        parts[index] = re.sub(r"^(?!- |\||\s)(.+)\n(?=- )", r"\1\n\n", text, flags=re.MULTILINE)
    return "".join(parts)


def on_page_content(html, page, config, files):
    """Keep short code on one line, let long names break at their parts, and open a picture in full by a click."""
    html = re.sub(r"<code>([^<\n]+)</code>", _inline_code, html)
    html = re.sub(r'(class="doc doc-object-name[^>]*>)([\w.]+)', lambda m: m[1] + _breakable(m[2]), html)
    return re.sub(r'(?<!">)<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', html)


def _inline_code(match):
    if len(match[1]) <= 20:  # about half of the width of a telephone
        return f'<code class="whole">{match[1]}</code>'
    text = re.sub(r"(?<![\w-])--?\w+", r'<span class="whole">\g<0></span>', match[1])  # or lines end with the hyphens
    return f"<code>{_breakable(text)}</code>"


def _breakable(text):
    return re.sub(r"(?<=\w)[./_=]+(?=\w)", r"\g<0><wbr>", text)


class Docstrings(Extension):
    """Turns the docstrings of the repository into Markdown."""

    def on_package(self, *, pkg, **_):
        """Let fastattn.attention be the function, not the module of its name, nor the assignment in fastattn.ops."""
        if pkg.path == "fastattn":
            text = (ROOT / "fastattn/ops/__init__.py").read_text()
            for name, module in re.findall(r"^(\w+) = _(\w+)\.\1$", text, re.MULTILINE):
                pkg.set_member(name, Alias(name, f"fastattn.ops.{module}.{name}"))

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = docstring_markdown(obj.docstring.value)


def docstring_markdown(text):
    """The Markdown of a docstring: bold names of sections, lists of arguments, fenced examples."""
    done, section, lines = [], None, inspect.cleandoc(text).split("\n")
    body: list[str] = []

    def finish():
        if section is not None:
            done.append(f"**{section}**" + _section(section, body))
        else:
            done.append(_escape("\n".join(body)).strip("\n"))
        body.clear()

    for line in lines:
        match = SECTION.match(line)
        if match or (section is not None and line and not line.startswith(" ")):
            finish()
            section = match[1] if match else None
            body.extend([match[2]] if match and match[2] else [] if match else [line])
        else:
            body.append(line)
    finish()
    return "\n\n".join(done)


def _section(name, body):
    if name == "Example":
        return "\n\n```pycon\n" + inspect.cleandoc("\n" + "\n".join(body)) + "\n```"
    if name in ("Returns", "Source"):
        return ": " + _escape(" ".join(line.strip() for line in body))
    entries: list[str] = []
    for line in inspect.cleandoc("\n" + "\n".join(body)).split("\n"):
        if line.startswith(" ") and entries:
            entries[-1] += " " + line.strip()
        elif line.strip():
            entries.append(line)
    return "\n\n" + "\n".join(map(_entry, entries))


def _entry(text):
    """An item of a list, with the names before the colon in bold."""
    match = re.fullmatch(r"([\w, *()]+?): (.*)", text)
    return f"- **{_escape(match[1])}**: {_escape(match[2])}" if match else f"- {_escape(text)}"


def _escape(text):
    """Text without what Markdown would take for HTML or for emphasis, outside of code."""
    parts = re.split(r"(`[^`]*`|^    .*$)", text, flags=re.MULTILINE)
    parts[::2] = (re.sub(r"([*_\[\]])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2])
    return "".join(parts)
