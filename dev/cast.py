"""A recorded terminal: what `fedkseed demo` prints, line by line as it came, in one SVG without a script.

    python dev/cast.py

runs the demo and writes docs/images/demo.svg. Nothing is made up: lines are broken as a terminal of 100 columns breaks them,
waits are cut to at most a second, and the folder of the package is shortened. Who wants no motion sees the end at once.
"""

import subprocess
import sys
import tempfile
import textwrap
import time
from html import escape
from pathlib import Path

import fedkseed

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "demo.svg"
COLUMNS, LONGEST_WAIT = 100, 1.0
LINE, CHARACTER, MARGIN, BAR = 19, 8.4, 18, 34  # pixels
Lines = list[tuple[float, str]]
"""When a line came, in seconds, and what it says."""
STYLE = """
text { font: 14px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d7dde6; white-space: pre }
.typed { fill: #7ee0a6 }
.late { opacity: 0; animation: come .01s linear forwards }
@keyframes come { to { opacity: 1 } }
@media (prefers-reduced-motion: reduce) { .late { animation-delay: 0s !important } }
"""


def record(command: list[str], folder: Path) -> Lines:
    """A command's lines, with the times at which they came."""
    begin, lines = time.monotonic(), []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - begin, line.rstrip()))
    if process.returncode:
        raise SystemExit(process.returncode)
    return lines


def shortened(lines: Lines) -> Lines:
    """As it is played: no long wait, no line wider than the terminal."""
    played, last, now = [], 0.0, 0.0
    for at, line in lines:
        now += min(at - last, LONGEST_WAIT)
        last = at
        broken = textwrap.wrap(line, COLUMNS, subsequent_indent="  ", break_long_words=False, drop_whitespace=False)
        played += [(now, part) for part in broken or [""]]
    return played


def drawn(command: str, lines: Lines) -> str:
    """The SVG."""
    width, height = COLUMNS * CHARACTER + 2 * MARGIN, BAR + MARGIN + LINE * (len(lines) + 1)
    dots = "".join(f'<circle cx="{MARGIN + 18 * i}" cy="18" r="5" fill="#46505f"/>' for i in range(3))
    rows = [f'<text class="typed" x="{MARGIN}" y="{BAR + LINE}">$ {escape(command)}</text>']
    for place, (at, line) in enumerate(lines, start=2):
        if line:
            y = BAR + LINE * place
            rows.append(f'<text class="late" style="animation-delay:{at + 1:.2f}s" x="{MARGIN}" y="{y}">{escape(line)}</text>')
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img">'
    title = f"<title>What {escape(command)} prints</title>"
    back = f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#12161d"/>'
    return "\n".join([opening, title, f"<style>{STYLE}</style>", back, dots, *rows, "</svg>", ""])


def main() -> None:
    """Record the demo and draw it."""
    with tempfile.TemporaryDirectory() as folder:
        came = record([sys.executable, "-m", "fedkseed", "demo", "--run", "runs/demo"], Path(folder))
    package = str(Path(fedkseed.__file__).parent)
    lines = shortened([(at, line.replace(package, "fedkseed")) for at, line in came])
    PICTURE.write_text(drawn("fedkseed demo", lines), encoding="utf-8")
    print(f"{PICTURE}: {len(lines)} lines, {lines[-1][0]:.0f} s, {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
