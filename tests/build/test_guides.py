"""The Python code of the README and of the guides runs as it is written, page by page."""

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["../README.md", "start.md", *sorted(f"guides/{page.name}" for page in (DOCS / "guides").glob("*.md"))]
NEEDS = {"../README.md": "transformers", "guides/hugging-face.md": "transformers", "guides/timm.md": "timm"}
WITHOUT_CODE = ["guides/README.md"]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in WITHOUT_CODE])
def test_code_runs(page, tmp_path):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"{NEEDS[page]} is not installed", exc_type=ImportError)
    code = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert code
    script = tmp_path / "guide.py"  # a file, because replace reads the source of modules
    script.write_text("\n".join(code))
    runpy.run_path(str(script))


def test_pages_without_code():
    for page in WITHOUT_CODE:
        assert "```python" not in (DOCS / page).read_text()
