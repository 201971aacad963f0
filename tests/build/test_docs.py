"""The documents: links and named files exist, and speeds match the result files."""

import functools
import itertools
import re
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
SOURCES = ("fastattn", "kernels", "csrc", "benchmarks", "scripts", "recipes", "tests", "docs")
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh", ".sh", ".yaml", ".md"}
NUMBERS = {"one": 1, "two": 2}
SPEED = re.compile(r"\d+\.\d+ \(\d+\.\d+\)")  # ratio of medians (of minima)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def texts():
    """(file, text) of all documents and sources."""
    files = {ROOT / name for name in DOCUMENTS}
    files |= {file for folder in SOURCES for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES}
    return [(file, file.read_text(encoding="utf-8")) for file in sorted(files)]


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """The anchors that GitHub generates for the headings."""
    headings = re.findall(r"^#+ (.*)", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables(text):
    """(the lines of the level-2 section before a table, its header, its rows), cells as text."""
    before, table = [], []
    for line in [*text.split("\n"), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if table:
            yield "\n".join(before), table[0], table[2:]
            table = []
        before = [line] if line.startswith("## ") else [*before, line]


@functools.cache
def results(name):
    """{(benchmark, implementation): (median in us, "ratio of medians (of minima)")} of a result file."""
    return {
        (row[0], row[1]): (float(row[2]), f"{row[3]} ({row[4]})")
        for _, header, rows in tables(read(name))
        if header[0] == "benchmark"
        for row in rows
    }


def speed(found, benchmark, column):
    """What the result files say for a benchmark in a column such as "fp32", "fp32 fwd", "torch.compile, fp32"."""
    *implementation, form = column.split(", ")
    key = benchmark.replace("*", form.replace(" ", "-")), *(implementation or ["fastattn"])
    assert key in found, f"no linked result file has a row for {key}"
    return found[key][1]


def test_the_walk_from_the_public_function_to_a_kernel_names_what_is_there():
    block = re.search(r"there are four hops.*?^```\n(.*?)^```", read("docs/architecture.md"), re.DOTALL | re.MULTILINE)
    rows = [re.split(r"\s{2,}", line.strip()) for line in block[1].splitlines()]
    assert len(rows) == 9
    for *_, functions, file in rows:
        for function in functions.removeprefix("1 ").split(" → "):
            pattern = rf"\b{function}(<.*>)?\("
            assert re.search(pattern, read(file)), f"{file} neither calls nor defines {function}"


def test_the_places_of_a_feature_and_the_hops_of_an_op_are_there():
    """In tables with a column "place" or "op": what a row quotes stands in the files that it quotes."""
    checked = 0
    for _, header, rows in tables(read("docs/architecture.md")):
        for row in rows if header[0] in ("place", "op") else ():
            quoted = re.findall(r"`([^`]+)`", " ".join(row))
            names = {name for name in quoted if Path(name).suffix in SUFFIXES}
            files = [
                file for folder in SOURCES[:3] for name in names for file in (ROOT / folder).rglob(Path(name).name)
            ]
            text = "".join(file.read_text(encoding="utf-8") for file in files)
            for word in re.findall(r"[A-Za-z_]\w+", " ".join(set(quoted) - names)):
                assert re.search(rf"\b{word}\b", text), f"{row[0]}: {word} is in none of {names}"
                checked += 1
    assert checked > 30


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(name))):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name}: {target} has no such heading"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_of_python_are_python(name):
    for code in re.findall(r"^```python\n(.*?)^```$", read(name), re.DOTALL | re.MULTILINE):
        compile(code, name, "exec")


def test_named_files_exist():
    """Every file of ours that another file names by its path exists. Placeholders are in capitals."""
    folders = "docs|benchmarks|scripts|recipes|tests|kernels|csrc"
    named = re.compile(rf"(?<![\w./-])(?:{folders})/[\w./-]+\.(?:md|py|sh|yaml|h|cpp|cuh?)\b")
    absent = "kernels/__init__.py"  # a test requires that there is none
    missing = {
        f"{file.relative_to(ROOT)}: {path}"
        for file, text in texts()
        for path in named.findall(text)
        if not (ROOT / path).exists() and not re.search(r"[A-Z]{4}\.", path) and path != absent
    }
    assert not missing


NOTEBOOK = [name for name in DOCUMENTS if name.startswith("docs/lab/") and name != "docs/lab/README.md"]


@pytest.mark.parametrize("name", NOTEBOOK)
def test_every_entry_of_the_notebook_ends_with_its_commit_and_its_command(name):
    _, *entries = re.split(r"^## ", read(name), flags=re.MULTILINE)
    for entry in entries:
        title, *paragraphs = entry.strip().split("\n\n")
        if not paragraphs[0].startswith("See "):
            source = r"\*\*Source\.\*\* Commits? [^.]*\b[0-9a-f]{7}\b[^.]*\. \S"
            assert re.match(source, paragraphs[-1]), f"{name}: {title} has no commit or no command"


def test_no_file_has_two_sides_of_a_merge():
    marks = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
    assert [file for file, text in texts() if marks.search(text)] == []


@pytest.mark.parametrize("page", ["docs/torch-nn.md", "docs/flash-attn.md", "docs/architecture.md"])
def test_every_difference_names_a_test_that_exists(page):
    """In tables with a column "test". Names are looked up in the files of their cell and of the text before."""
    path = re.compile(r"tests/\w+/\w+\.py")
    found = [(before, row) for before, header, rows in tables(read(page)) if header[-1] == "test" for row in rows]
    assert found
    for before, row in found:
        tests = re.findall(r"`((?:tests/|[Tt]est)[\w/.:]+)`", row[-1])
        assert tests, f"{row[0]}: no test"
        source = "".join(read(file) for file in {*path.findall(row[-1]), *path.findall(before)})
        for name in "::".join(tests).split("::"):
            if not path.fullmatch(name):
                assert re.search(rf"(?:def|class) {name}\b", source), f"{row[0]}: there is no {name}"


def test_speeds_are_those_of_the_result_files():
    """Each cell of docs/performance.md is in a result file linked above its table; a section has one machine."""
    checked = 0
    for before, header, rows in tables(read("docs/performance.md")):
        if header[-1] != "row of the file":
            assert not SPEED.search(str(rows)), f"the table {header} does not say where its speeds come from"
            continue
        found = {}
        for name in re.findall(r"\]\(\.\./(benchmarks/results/[\w.-]+)\)", before):
            machine, threads = re.match(r"## (.*), (\w+) thread", before).groups()
            assert machine in read(name)
            assert re.search(rf", {NUMBERS[threads]} threads?(, \w+ kernels)?; torch", read(name))
            found |= results(name)
        for *cells, benchmark in rows:
            benchmark = benchmark.strip("`")
            for column, cell in list(zip(header, cells, strict=False))[1:]:
                if "µs" in column:  # of one call out of 100
                    implementation = {"PyTorch": "torch", "fastattn": "fastattn"}[column.split(",")[0]]
                    assert cell == f"{found[benchmark, implementation][0] / 100:.1f}", (benchmark, column)
                else:
                    assert cell == speed(found, benchmark, column), (benchmark, column)
                checked += 1
    assert checked > 100


def ratios(name):
    """All (ratio of medians, ratio of minima) of a result file: to the first row of a benchmark, and between rows."""
    rows = {}
    for (benchmark, _), (_, cell) in results(name).items():
        rows.setdefault(benchmark, []).append([float(number) for number in re.findall(r"[\d.]+", cell)])
    return [
        (a / c, b / d)
        for group in rows.values()
        for (a, b), (c, d) in itertools.product(group, [(1.0, 1.0), *group])
        if c and d
    ]


USERS_PAGES = [name for name in DOCUMENTS if not name.startswith(("docs/lab/", "benchmarks/", "CHANGELOG"))]


@pytest.mark.parametrize("name", USERS_PAGES)
def test_every_speed_is_in_a_result_file_that_its_section_links(name):
    """A speed is written "1.23 (1.34)", in the text or in a table."""
    for section in re.split(r"^(?=## )", read(name), flags=re.MULTILINE):
        linked = set(re.findall(r"\]\((?:\.\./)*(benchmarks/results/[\w.-]+\.md)\)", section))
        found = [pair for file in linked for pair in ratios(file)]
        for speed in re.findall(r"(\d+\.\d\d)\s+\((\d+\.\d\d)\)", section):
            medians, minima = map(float, speed)  # those of the files are rounded too
            close = [pair for pair in found if abs(pair[0] - medians) < 0.011 and abs(pair[1] - minima) < 0.011]
            assert close, f"{section.splitlines()[0]}: {speed} is in none of {linked or 'no file'}"


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md", "docs/models.md"])
def test_every_measured_number_is_in_a_linked_file(name):
    """Numbers with a unit of speed, memory or quality; the time of one call out of 100 has a test above."""
    text = without_code(read(name))
    linked = {(ROOT / name).parent / path for path in re.findall(r"\]\(([\w./-]*results/[\w.-]+\.md)", text)}
    found = " ".join(path.read_text(encoding="utf-8") for path in linked)
    unit = r"(?<![\w.])(\d+(?:\.\d+)?)(?: \(\d+\.\d+\))?\s(?:times|%|ms|MB|tokens/s|GFLOP/s)(?!\w)"
    numbers = set(re.findall(unit, text))
    assert numbers
    assert not {n for n in numbers if not re.search(rf"(?<![\d.]){re.escape(n)}(?!\d)", found)}


PICTURES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/results/*/*.svg"))


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_show_their_result_file(picture):
    """FILE/FUNCTION.svg has the ratios of the fp32 rows of a function in FILE.md, and a document shows it."""
    path = Path(picture)
    found = results(f"{path.parent}.md")
    rows = {key: cell.split()[0] for key, (_, cell) in found.items() if key[0].startswith(f"test_{path.stem}[")}
    rows = {key: ratio for key, ratio in rows.items() if "fp32" in key[0]}
    shown = re.findall(r"<!-- ([\d.]+) -->", read(picture))  # matplotlib writes each text as a comment
    assert sorted(shown) == sorted(ratio for (_, name), ratio in rows.items() if name not in ("torch", "torch eager"))
    assert any(picture in read(name) for name in DOCUMENTS)


def test_the_readme_describes_its_picture():
    description, picture = re.search(r"!\[([^]]*)\]\((benchmarks/results/[^)]*)\)", read("README.md")).groups()
    assert picture in PICTURES
    for dropout in ("0.0", "0.1"):
        rows = results(f"{Path(picture).parent}.md").items()
        ours = [
            cell.split()[0] for (case, name), (_, cell) in rows if name == "fastattn" and f"fp32-{dropout}-" in case
        ]
        assert f"{min(ours)} to {max(ours)}" in description.replace("\n", " ")


def test_the_version_is_the_same_everywhere():
    assert re.search(r"^version: (.*)$", read("CITATION.cff"), re.MULTILINE)[1] == fastattn.__version__
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == fastattn.__version__
