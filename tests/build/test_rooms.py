"""The packages of fastattn: which may import which, as listed in scripts/count_code.py."""

import ast
import fnmatch
import pathlib

import pytest
from script_loader import load_script


@pytest.fixture(scope="module")
def count_code():
    return load_script("count_code")


def sources(**files):
    return {name.replace("__", "/") + ".py": text for name, text in files.items()}


def arrows(count_code, **files):
    return count_code.import_arrows(count_code.parse_package(sources(**files)))


@pytest.fixture(scope="module")
def trees(count_code):
    """{path: syntax tree} of this checkout."""
    files = [*count_code.ROOT.glob("fastattn/**/*.py"), *count_code.ROOT.glob("kernels/*.py")]
    found = count_code.parse_package({str(path.relative_to(count_code.ROOT)): path.read_text() for path in files})
    assert len(found) > 80
    return found


def test_no_module_imports_in_a_circle_or_from_a_floor_above(count_code, trees):
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


# Why functions have more parameters than count_code.MOST_PARAMETERS; docs/architecture.md explains the reasons.
MANY_PARAMETERS = {
    "another library's signature": {
        "fastattn/integrations/flash_attn.py": "flash_attn_varlen_func flash_attn_varlen_kvpacked_func"
        " flash_attn_with_kvcache",
        "fastattn/integrations/transformers.py": "attention_forward",
        "fastattn/nn/attention.py": "__init__",
        "fastattn/nn/decoder.py": "__init__",
        "fastattn/nn/encoder.py": "__init__",
        "fastattn/nn/transformer.py": "__init__",
    },
    "public": {
        "fastattn/ops/attention.py": "attention",
        "fastattn/ops/_attention_call.py": "attention_call",
        "fastattn/ops/attention_decode.py": "attention_decode",
        "fastattn/reference.py": "attention attention_decode",
    },
    "settings of a model": {"fastattn/models/backbone.py": "__init__", "fastattn/models/block.py": "__init__"},
    "launcher": {
        "kernels/attention_call.py": "__init__ prepare",
        "kernels/attention_decode.py": "attention_decode_fwd",
    },
}


def test_a_function_with_many_parameters_has_a_reason(count_code, trees):
    listed = [entry for entries in MANY_PARAMETERS.values() for entry in entries.items()]
    allowed = {(path, name) for path, names in listed for name in names.split()}
    for path, tree in trees.items():
        for function in count_code.functions_of({path: tree}):
            kernel = any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)
            if len(count_code.parameters_of(function)) > count_code.MOST_PARAMETERS and not kernel:
                place = path.replace("fastattn/kernels/", "kernels/"), function.name
                assert place in allowed, "make the arguments a value, or name the reason here"


def test_no_function_is_too_long(count_code, trees):
    lengths = {function.name: count_code.lines_of_code(function) for function in count_code.functions_of(trees)}
    assert not {name: lines for name, lines in lengths.items() if lines > count_code.MOST_LINES}


def test_pytest_enters_every_room_of_the_tests(request):
    """pytest skips folders with certain names, and "build" is one of them by default."""
    left_out = request.config.getini("norecursedirs")
    for folder in pathlib.Path(__file__).parents[1].iterdir():
        assert not folder.is_dir() or not any(fnmatch.fnmatch(folder.name, name) for name in left_out), folder
