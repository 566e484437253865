"""Paths of files that tests use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "assets" / "demo"
DEMO_PICTURE = ROOT / "assets" / "demo.png"

_FOLDERS = ("assets", "benchmarks", "kernels", "model", "tools")
PAGES = [*sorted(ROOT.glob("*.md")), *(page for f in _FOLDERS for page in sorted((ROOT / f).rglob("*.md")))]  # of prose
