"""The file keeps its own rules: it reads from top to bottom, in short functions."""
import ast
import re

import rustinfer
from harness import ROOT

SOURCE = (ROOT / "rustinfer.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)


def defined_names() -> dict[str, int]:
    """Top-level classes, functions and constants, and the line each is defined on."""
    names = {}
    for node in TREE.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names[node.name] = node.lineno
        for target in getattr(node, "targets", []):
            names.update((name.id, node.lineno) for name in ast.walk(target) if isinstance(name, ast.Name))
    return names


class RuntimeNames(ast.NodeVisitor):
    """The names that code reads when it runs, annotations aside."""

    def __init__(self):
        self.found: list[tuple[str, int]] = []

    def visit_Name(self, node: ast.Name) -> None:
        self.found.append((node.id, node.lineno))

    def visit_arg(self, node: ast.arg) -> None:
        pass

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(part)


def test_nothing_is_used_before_it_is_defined():
    names, visitor = defined_names(), RuntimeNames()
    visitor.visit(TREE)
    assert [(name, line) for name, line in visitor.found if names.get(name, 0) > line] == []


def test_functions_are_short():
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 40} == {}


def test_every_section_says_what_it_uses():
    sections = [(SOURCE.count("\n", 0, match.start()), *match.groups()) for match in re.finditer(
        r"^# ([A-Z][A-Za-z ]+) -- .+\n# uses: (.+)$", SOURCE, re.MULTILINE)]
    section_of = lambda line: next((name for start, name, _ in reversed(sections) if start < line), None)
    names, visitor, used = defined_names(), RuntimeNames(), {None: set()}
    visitor.visit(TREE)
    for name, line in visitor.found:
        used.setdefault(section_of(line), set()).add(section_of(names.get(name, line)))
    seen: list[str] = []
    for _, name, uses in sections:
        said = {"nothing": [], "everything above": seen}.get(uses, uses.split(", "))
        assert used[name] - {None, name} <= set(said) <= set(seen), name
        seen.append(name)
    assert seen == [
        "Errors", "Settings", "Tokenizer", "Chat template", "Checkpoint", "Backend", "CUDA", "CPU", "Model", "Sampler",
        "Grammar", "KV cache", "Scheduler", "Metrics", "Runner", "Engine", "API", "Responses",
        "Messages", "Access", "LLM", "Server", "CLI"]


def test_public_things_have_docstrings():
    public = [node for node in TREE.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
    assert all(getattr(rustinfer, name).__doc__ for name in rustinfer.__all__)
