"""The site: docstrings become Markdown, and it builds from the repository without warnings."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from script_loader import load_script

ROOT = Path(__file__).parents[2]
for package in ("mkdocs", "material", "mkdocstrings", "griffe"):
    pytest.importorskip(package, reason="needs the packages of fastattn[docs]")


@pytest.fixture(scope="module")
def site():
    return load_script("mkdocs_hooks")


def test_sections_of_docstrings(site):
    text = """What it does with `a_b` and a * b * c.

    Args:
        x_y: (n,), float32;
            goes on here.
        q, k: both.
    Returns: y, of shape
        [n] <like x>.
    Example:
        >>> f(1)
        2
    """
    assert [part.strip() for part in site.docstring_markdown(text).split("\n\n")] == [
        r"What it does with `a_b` and a \* b \* c.",
        "**Args**",
        "- **x\\_y**: (n,), float32; goes on here.\n- **q, k**: both.",
        r"**Returns**: y, of shape \[n\] &lt;like x&gt;.",
        "**Example**",
        "```pycon\n>>> f(1)\n2\n```",
    ]


def test_code_and_pictures_on_a_narrow_screen(site):
    html = '<p><code>pip -e .</code> <code>python a/b.c --lf-a.b</code> <img alt="a" src="b.svg" /></p>'
    html += '<pre><span></span><code>pip -e .\n</code></pre><h2><span class="doc doc-object-name x">f.a_b</span>'
    done = '<p><code class="whole">pip -e .</code> <code>python a/<wbr>b.<wbr>c '
    done += '<span class="whole">--lf</span>-a.<wbr>b</code> <a href="b.svg"><img alt="a" src="b.svg" /></a></p>'
    done += "<pre><span></span><code>pip -e .\n</code></pre>"
    done += '<h2><span class="doc doc-object-name x">f.<wbr>a_<wbr>b</span>'
    assert site.on_page_content(html, None, None, None) == done


def test_a_new_page_is_in_the_navigation(site, tmp_path):
    for name in ("start.md", "new.md", "lab/new.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config = types.SimpleNamespace(
        docs_dir=str(tmp_path), nav=[{"Start": "start.md"}, {"Project": ["contributing.md"]}]
    )
    assert site.on_config(config).nav[-1] == {"Project": ["contributing.md", "lab/new.md", "new.md"]}


def test_the_site_builds_without_warnings_and_shows_what_is_public(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in tmp_path.rglob("*.html"):  # a list that was not rendered as one: MkDocs does not warn
        assert not re.search(r"<p>(?:(?!</p>).)*\n- ", path.read_text(), re.DOTALL), path
    page = (tmp_path / "api/ops.html").read_text()
    assert 'id="fastattn.attention"' in page
    assert "cu_seqlens_q" in page  # the signature of the function, not the text of the module of its name
    for path in (tmp_path / "api").glob("*.html"):
        _, *parts = re.split(r'<h[23] id="(fastattn[\w.]+)"', path.read_text())
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            assert "&gt;&gt;&gt; " in text, f"{name} has no example"
    assert page.count('<h2 id="fastattn.') == 9
    results = {path.stem for path in (ROOT / "benchmarks/results").glob("*.md")}
    assert {path.stem for path in (tmp_path / "results").glob("*.html")} == results
    fetched = re.findall(r"""(?:src|<link[^>]* href)=["'](https?:[^"']*)""", (tmp_path / "index.html").read_text())
    assert not fetched  # the site loads nothing from other hosts
