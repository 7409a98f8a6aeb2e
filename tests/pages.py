"""The blocks of code in the documents, each with the mark that stands above it.

`<!-- usage -->`: its commands run, `<!-- usage: exit 2 -->` where they shall fail so, and
`<!-- usage: hub -->` where they speak with the Hub, as the user `you`.
`<!-- example: plan here -->`: a recipe without mistakes, once the commands above it have run.
`<!-- example: plan -->`: a recipe without mistakes; `<!-- example: error -->`: one with some. With
`, file: NAME` the page's commands find it under that name.
`<!-- not run: WHY -->`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:^<!-- (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = ("console", "bash", "sh", "shell", "python")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def runs(self):
        return self.mark.partition(":")[0] == "usage"

    @property
    def waits(self):
        return self.mark == "example: plan here"

    @property
    def asks_the_hub(self):
        return self.mark == "usage: hub"

    @property
    def exit_code(self):
        return int(self.mark.partition("exit ")[2] or 0)

    @property
    def file(self):
        return self.mark.partition("file: ")[2]

    @property
    def is_command(self):
        return self.language in COMMANDS or bool(re.search(r"^\$ ", self.text, re.MULTILINE))

    def commands(self):
        """Yield each command with the lines that it shall print; … stands for any."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            lines = [" ".join(line.split()) for line in output.splitlines()]
            yield command.split(" #")[0].strip(), [line for line in lines if line not in ("", "…")]


def blocks(page):
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1] or "", match[2], match[3])
        for match in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
