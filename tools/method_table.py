"""The README's table of pruning methods, from their docstrings and settings.

python tools/method_table.py            # print it
python tools/method_table.py --write    # put it into README.md, between its two comments
"""

import argparse
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.pruning import GUARDS, METHODS, settings_of  # noqa: E402
from model.pruning.describe import shown, summary  # noqa: E402
from run import as_command  # noqa: E402

BEGIN, END = "<!-- methods: python tools/method_table.py --write -->", "<!-- end of methods -->"


def table():
    """Markdown: a row for each method, and what they all have in common below it."""
    lines = ["| `--prune` | what stays | settings |", "|---|---|---|"]
    for name, method in METHODS.items():
        if method is None:
            lines.append(f"| `{name}` | Everything. | |")
            continue
        file = Path(inspect.getsourcefile(method)).relative_to(ROOT)
        what = re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", summary(method))
        settings = ", ".join(f"`{k}={shown(v)}`" for k, v in settings_of(method).items())
        lines.append(f"| [`{name}`]({file.as_posix()}) | {what} | {settings} |")
    guards = ", ".join(f"`{k}={v}`" for k, v in GUARDS.items())
    lines += ["", f"Every method also has {guards}: how many tokens no head may drop, of the first of the prompt,"]
    lines += ["of the last, and of those that the head's last 32 rows attend to most."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--write", action="store_true", help="into README.md")
    args = parser.parse_args()
    if not args.write:
        return print(table())
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    path.write_text(f"{text[:before]}\n{table()}\n{text[after:]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(as_command(main))
