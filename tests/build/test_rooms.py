"""The packages of fastattn: which may import which, as listed in scripts/count_code.py."""

import fnmatch
import importlib.util
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "count_code.py"


@pytest.fixture(scope="module")
def count_code():
    spec = importlib.util.spec_from_file_location("count_code", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(**files):
    return {name.replace("__", "/") + ".py": text for name, text in files.items()}


def arrows(count_code, **files):
    return count_code.import_arrows(count_code.parse_package(sources(**files)))


def test_no_module_imports_in_a_circle_or_from_a_floor_above(count_code):
    files = [*count_code.ROOT.glob("fastattn/**/*.py"), *count_code.ROOT.glob("kernels/*.py")]
    trees = count_code.parse_package({str(path.relative_to(count_code.ROOT)): path.read_text() for path in files})
    assert len(trees) > 80
    found = count_code.import_arrows(trees)
    assert not count_code.circles(found)
    assert not count_code.arrows_up(found)


def test_arrows_are_found_in_every_way_of_importing(count_code):
    for text in (
        "import fastattn.nn.norm",
        "from fastattn.nn import norm",
        "from fastattn.nn.norm import LayerNorm",
        "from ..nn import norm",
        "from ..nn.norm import LayerNorm",
        "def f():\n    from fastattn.nn.norm import LayerNorm",
    ):
        found = arrows(count_code, fastattn__ops__norm=text, fastattn__nn__norm="")
        assert found == {("fastattn.ops.norm", "fastattn.nn.norm")}, text
        assert count_code.arrows_up(found) == sorted(found)
        assert not count_code.circles(found)


def test_circles_and_floors(count_code):
    found = arrows(
        count_code, fastattn__nn__a="from . import b", fastattn__nn__b="from .c import x",
        fastattn__nn__c="from . import a", fastattn__nn__d="from . import a", kernels__norm="import fastattn.nn.d",
    )  # fmt: skip
    (circle,) = count_code.circles(found)
    assert circle == {"fastattn.nn.a", "fastattn.nn.b", "fastattn.nn.c"}
    assert count_code.arrows_up(found) == [("fastattn.kernels.norm", "fastattn.nn.d")]


def test_functions_and_repeated_lines(count_code):
    body = "".join(f"    x{i} = {i} + 1\n" for i in range(70))
    text = f'def long(a: int, *b: int) -> int:\n    """A docstring\n    of two lines."""\n    # a comment\n\n{body}'
    counted = count_code.count(sources(fastattn__nn__a=text, fastattn__nn__b=text.replace("a: int", "a")))
    assert counted["Python functions"] == counted["with more than 60 lines of code"] == 2
    assert counted["annotated, parameters and result"] == 1
    assert counted["median lines of code"] == 71
    assert counted["pairs of 6 repeated lines or more"] == 1


def test_pytest_enters_every_room_of_the_tests(request):
    """pytest skips folders with certain names, and "build" is one of them by default."""
    left_out = request.config.getini("norecursedirs")
    for folder in pathlib.Path(__file__).parents[1].iterdir():
        assert not folder.is_dir() or not any(fnmatch.fnmatch(folder.name, name) for name in left_out), folder
