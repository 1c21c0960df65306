"""Prints what a wheel requires, but torch and its companions: those are installed by hand.

python bench/wheel_requirements.py FILE.whl
"""

from __future__ import annotations

import sys
import zipfile
from email.parser import HeaderParser


def requirements(wheel: str) -> list[str]:
    """The unconditional requirements in a wheel's metadata, without any that begins with torch."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    found = metadata.get_all("Requires-Dist") or []
    return [line for line in found if "extra ==" not in line and not line.startswith("torch")]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
