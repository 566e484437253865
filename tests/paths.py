"""Paths of files that tests use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "assets" / "demo"
DEMO_PICTURE = ROOT / "assets" / "demo.png"
