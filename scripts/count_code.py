"""Compares counts that show how easy the code is to change, at two revisions of the repository.

    python scripts/count_code.py BEFORE [AFTER]      git revisions; AFTER defaults to the working tree

Python is counted in fastattn/ and kernels/; repeated lines and long files in C++ and CUDA as well, and in tests/.
"""

import ast
import collections
import io
import itertools
import pathlib
import statistics
import subprocess
import sys
import tarfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("fastattn/", "kernels/", "csrc/", "tests/", "benchmarks/", "scripts/", "setup.py")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh", ".inc")
MOST_PARAMETERS, MOST_LINES, LONGEST_FILE = 12, 60, 400
REPEATED_LINES = 6  # this many equal lines in a row are a repetition

# rooms of the package, lowest first; those on one line import nothing from one another
FLOORS = [
    ("_autocast", "_imports", "_needs_torch"),
    ("reference",),
    ("ops",),
    ("kernels",),
    ("_native", "integrations.transformers_versions"),
    ("nn", "integrations.transformers", "integrations.sdpa"),
    ("drop_in",),
    ("",),  # fastattn itself: what `import fastattn` offers
    ("models", "_info"),
    ("integrations",),
    ("training.messages",),
    ("training.files",),
    ("training.settings",),
    ("training.config",),
    ("training.data",),
    ("training.inspect",),
    ("training.tasks",),
    ("training.runs",),
    ("training.evaluation",),
    ("training",),  # a module outside these rooms; its imports are not checked
    ("commands",),
    ("cli",),
    ("__main__",),
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def read_sources(revision):
    """{path: text} of the files to count, at a git revision, or in the working tree if the revision is None."""
    if revision is None:
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        paths = [ROOT / name for name in names.splitlines() if is_counted(name)]
        return {str(p.relative_to(ROOT)): p.read_text() for p in paths if p.is_file() and not p.is_symlink()}
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [member for member in tar if member.isfile() and is_counted(member.name)]
        return {member.name: tar.extractfile(member).read().decode() for member in members}


def is_counted(name):
    return name.startswith(FOLDERS) and name.endswith(SUFFIXES)


def module_of(path):
    """The module of a file: "fastattn.kernels.norm" for kernels/norm.py."""
    parts = pathlib.PurePosixPath(path).with_suffix("").parts
    parts = ("fastattn", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions_of(trees):
    for tree in trees.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def parameters_of(function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [*named, *filter(None, (arguments.vararg, arguments.kwarg))]


def lines_of_code(function):
    """The lines of code: without docstrings, comments and empty lines."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    lines = set()
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, (ast.expr, ast.stmt, ast.keyword)):
                lines |= {node.lineno, node.end_lineno}
    return len(lines) + 1


def is_annotated(function):
    parameters = [p for p in parameters_of(function) if p.arg not in ("self", "cls")]
    return function.returns is not None and all(p.annotation is not None for p in parameters)


def import_arrows(trees):
    """{(module, module that it imports)}, including imports inside functions."""
    modules = {module_of(path): path for path in trees}
    arrows = set()
    for module, path in modules.items():
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*base, *filter(None, [node.module])])
                names = [f"{base}.{alias.name}" for alias in node.names]
                targets = [name if name in modules else base for name in names]
            else:
                continue
            arrows |= {(module, target) for target in targets if target in modules and target != module}
    return arrows


def circles(arrows):
    """Groups of several nodes in which each node reaches all others (strongly connected components)."""
    following = collections.defaultdict(set)
    for start, end in arrows:
        following[start].add(end)

    def reached(start):
        seen, waiting = set(), [start]
        while waiting:
            new = following[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {node: reached(node) for node in list(following)}
    groups = {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in reach}
    return [group for group in groups if len(group) > 1]


def room_of(module):
    """The entry of FLOORS that a module belongs to."""
    name = module.removeprefix("fastattn").removeprefix(".")
    while name not in FLOOR_OF:
        name, dot, _ = name.rpartition(".")
        if not dot:
            raise SystemExit(f"{module} is on none of the FLOORS; add it to one")
    return name


def arrows_up(arrows):
    """Imports from a floor above, or from another room of the same floor."""
    found = []
    for start, end in arrows:
        rooms = room_of(start), room_of(end)
        if "training" not in rooms and rooms[0] != rooms[1] and FLOOR_OF[rooms[0]] <= FLOOR_OF[rooms[1]]:
            found.append((start, end))
    return sorted(found)


def repeated_pairs(sources):
    """Pairs of places that share REPEATED_LINES lines of code or more; a longer run counts once."""
    places = collections.defaultdict(list)
    for path, text in sources.items():
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if len(line) > 3 and not line.startswith(("#", "//", "import ", "from "))]
        for start in range(len(lines) - REPEATED_LINES + 1):
            places[tuple(lines[start : start + REPEATED_LINES])].append((path, start))
    shared = {pair for found in places.values() for pair in itertools.combinations(found, 2)}
    return [
        ((path, start), (other, there))
        for (path, start), (other, there) in shared
        if ((path, start - 1), (other, there - 1)) not in shared
    ]


def parse_package(sources):
    """{path: syntax tree} of the package, including the Triton kernels."""
    return {
        path: ast.parse(text)
        for path, text in sources.items()
        if path.startswith(("fastattn/", "kernels/")) and path.endswith(".py")
    }


def count(sources):
    """{what: number}"""
    trees = parse_package(sources)
    functions = list(functions_of(trees))
    lengths = list(map(lines_of_code, functions))
    arrows = import_arrows(trees)
    return {
        "Python functions": len(functions),
        f"with more than {MOST_PARAMETERS} parameters": sum(len(parameters_of(f)) > MOST_PARAMETERS for f in functions),
        f"with more than {MOST_LINES} lines of code": sum(length > MOST_LINES for length in lengths),
        "median lines of code": statistics.median(lengths),
        "annotated, parameters and result": sum(map(is_annotated, functions)),
        "imports between modules": len(arrows),
        "circles of imports": len(circles(arrows)),
        "imports from a floor above": len(arrows_up(arrows)),
        "files": len(sources),
        f"files of more than {LONGEST_FILE} lines": sum(t.count("\n") > LONGEST_FILE for t in sources.values()),
        f"pairs of {REPEATED_LINES} repeated lines or more": len(repeated_pairs(sources)),
    }


def main(before, after=None):
    sources = [read_sources(revision) for revision in (before, after)]
    old, new = map(count, sources)
    width = max(map(len, old))
    print(f"{'':{width}}  {before:>12}  {after or 'working tree':>12}")
    for what in old:
        print(f"{what:{width}}  {old[what]:>12}  {new[what]:>12}")
    arrows = import_arrows(parse_package(sources[1]))
    for start, end in arrows_up(arrows):
        print(f"from a floor above: {start} imports {end}")
    for group in circles(arrows):
        print("circle:", ", ".join(sorted(group)))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
