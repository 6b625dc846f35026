"""The embedded task: digit scenes with captions, in place of photographs."""

from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"  # handwriting, embedded networks
