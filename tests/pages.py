"""The pages as tests read them: code, what it printed, commands, links. As a script, their mending.

    python tests/pages.py            # runs the chapters at full size, says what has changed
    python tests/pages.py --write    # puts it into them, and mends the lines that links point at

A chapter's blocks share their names, one after the other. What a block printed stands in the next
block, of the kind "text". A link to a line is [`name`](file.py#L12): where `name` is defined.
"""

import argparse
import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "docs" / "reading").glob("[1-8]-*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINE = re.compile(r"\[`(\w+)`\]\(([^)#]+\.py)#L(\d+)\)")


@dataclass
class Block:
    """Code or commands, and what they printed, if the page says it."""

    kind: str  # "python" | "bash"
    text: str
    printed: str | None
    place: tuple[int, int]  # of what was printed, in the page's letters


def blocks(page: Path, *kinds: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text()):
        kind = "bash" if not match[1] and match[2].startswith("python ") else match[1]
        if kind in ("python", "bash"):
            found.append(Block(kind, match[2], None, (0, 0)))
        elif match[1] == "text" and found:
            found[-1].printed, found[-1].place = match[2], match.span(2)
    return [block for block in found if block.kind in (kinds or ("python", "bash"))]


def commands(text: str) -> list[list[str]]:
    """Of a block of bash, each as its words; lines that go on are joined, remarks left out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if words := shlex.split(part, comments=True):
                found.append(words)
    return found


def run_block(text: str, names: dict) -> str:
    """What a block of Python prints; `names` are its page's."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, "a block", "exec"), names)
    return printed.getvalue()


def line_of(file: Path, name: str) -> int:
    """Where a function or class is defined, decorators aside; 0: nowhere."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, kinds) and node.name == name:
            return node.lineno
    return 0


def links(page: Path) -> list[str]:
    """Where its links lead, code aside."""
    return re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text()))


def headings(page: Path) -> set[str]:
    """As links name them, in GitHub's way."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def mend_links(page: Path) -> None:
    def aim(match: re.Match) -> str:
        line = line_of(page.parent / match[2], match[1])
        return f"[`{match[1]}`]({match[2]}#L{line})" if line else match[0]

    page.write_text(LINE.sub(aim, page.read_text()))


def rerun(page: Path, write: bool) -> None:
    """Its blocks that say what they print, in their order."""
    names: dict = {}
    for k, block in enumerate(blocks(page)):
        if block.kind == "python":
            printed = run_block(block.text, names)
        elif block.printed is not None:
            printed = ""
            for words in commands(block.text):
                words = [sys.executable if word == "python" else word for word in words]
                printed += subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
        else:
            continue
        printed = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines()) + "\n"
        if block.printed is not None and printed != block.printed:
            print(f"{page.name}, block {k + 1}:\n{printed}", flush=True)
            if write:
                text, (start, end) = page.read_text(), blocks(page)[k].place
                page.write_text(text[:start] + printed + text[end:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the pages")
    parser.add_argument("--links", action="store_true", help="mend links alone, run nothing")
    parser.add_argument("chapter", nargs="*", type=Path, default=CHAPTERS, help="default: all")
    given = parser.parse_args()
    for page in PAGES if given.write or given.links else ():
        mend_links(page)
    for page in () if given.links else given.chapter:
        rerun(page, given.write)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
