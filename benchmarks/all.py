"""Run benchmarks and put what they print into docs/results.md (make bench).

    python benchmarks/all.py [NAME ...]

Each block of docs/results.md that follows a line `<!-- bench: NAME: COMMAND -->` holds what COMMAND printed
the last time; without names every block is measured anew. A benchmark whose data is absent keeps its block
and says so.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results.md"
BLOCK = re.compile(r"<!-- bench: ([\w-]+): (.+?) -->\n```text\n.*?```\n", re.S)


def measure(match: re.Match, wanted: list[str]) -> str:
    name, command = match.groups()
    if wanted and name not in wanted:
        return match.group()
    words = shlex.split(os.path.expandvars(command))
    missing = [word for word in words[1:] if "/" in word and not (ROOT / word).exists() and "$" not in word]
    if missing or any("$" in word for word in words):
        print(f"{name}: left as it was, it needs {' '.join(missing) or command}")
        return match.group()
    print(f"{name}: {command}", flush=True)
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: failed\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
        return match.group()
    head = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}"
    return f"<!-- bench: {name}: {command} -->\n```text\n# {head}\n{done.stdout.strip()}\n```\n"


def version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    names = [name for name, _ in BLOCK.findall(text)]
    unknown = set(sys.argv[1:]) - set(names)
    if unknown:
        sys.exit(f"no block called {sorted(unknown)[0]!r} in {RESULTS.name}; there are {', '.join(names)}")
    for found in list(BLOCK.finditer(text)):  # write after each, so that an interruption loses one at most
        text = text.replace(found.group(), measure(found, sys.argv[1:]))
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
