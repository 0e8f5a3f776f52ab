"""The build backend: setuptools', after a look for the torch to compile against.

pip builds in an environment of its own unless told otherwise, where torch is not the one that will
run the extension. So no torch is asked for there (it would be gigabytes, and the wrong one), and a
wheel is refused at once, in one line. A source distribution needs none.

``setup.py`` takes from here what a package index is to show: the README with links that lead
somewhere from there too.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = ["build_sdist", "get_requires_for_build_sdist"]

ROOT = Path(__file__).parent
OLDEST_TORCH: tuple[int, int] = runpy.run_path(str(ROOT / "fuse_ext" / "kernels" / "require.py"))[
    "OLDEST_TORCH"
]
BUILD_HERE = "pip install 'setuptools>=77' ninja && pip install --no-build-isolation ."


def oldest_torch() -> str:
    """In words."""
    return ".".join(map(str, OLDEST_TORCH))


def torch_minor(version: str) -> tuple[int, int]:
    """(2, 14) of "2.14.1+cu130"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def require_torch() -> None:
    """Ends with one line on stderr where there is no torch to compile against."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        if _torch_is_hidden():
            sys.exit(
                "fuse_ext is compiled against the torch that will run it, which build isolation "
                f"hides; build it without: {BUILD_HERE}"
            )
        sys.exit(
            "fuse_ext is compiled against the torch that will run it, and there is none; "
            f"install it first: pip install torch && {BUILD_HERE}"
        )
    if torch_minor(torch.__version__) < OLDEST_TORCH:
        sys.exit(f"fuse_ext needs torch >= {oldest_torch()}, and {torch.__version__} is installed")


def _torch_is_hidden() -> bool:
    """Whether the interpreter's own site-packages have a torch that cannot be imported."""
    return (Path(sysconfig.get_path("platlib")) / "torch" / "__init__.py").is_file()


# --- PEP 517 and 660 ------------------------------------------------------------------------


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What a wheel needs besides torch, if that is there."""
    require_torch()
    return [*build_meta.get_requires_for_build_wheel(config_settings), "ninja"]


def prepare_metadata_for_build_wheel(folder: str, config_settings: Any = None) -> str:
    """As setuptools."""
    require_torch()
    return str(build_meta.prepare_metadata_for_build_wheel(folder, config_settings))


def build_wheel(folder: str, config_settings: Any = None, metadata: str | None = None) -> str:
    """As setuptools."""
    require_torch()
    return str(build_meta.build_wheel(folder, config_settings, metadata))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """As for a wheel."""
    require_torch()
    return [*build_meta.get_requires_for_build_editable(config_settings), "ninja"]


def prepare_metadata_for_build_editable(folder: str, config_settings: Any = None) -> str:
    """As setuptools."""
    require_torch()
    return str(build_meta.prepare_metadata_for_build_editable(folder, config_settings))


def build_editable(folder: str, config_settings: Any = None, metadata: str | None = None) -> str:
    """As setuptools."""
    require_torch()
    return str(build_meta.build_editable(folder, config_settings, metadata))


# --- what a package index shows --------------------------------------------------------------

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def long_description(home: str, tag: str) -> str:
    """The README, for readers who have no files beside it.

    Args:
        home: The repository's address, such as that of a code host; empty where there is none. Then
            the words of a link stay, and a picture goes.
        tag: What the files are to be looked up under.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        if not home:
            return "" if picture else words
        return f"{picture}[{words}]({home}/{'raw' if picture else 'blob'}/{tag}/{target})"

    return _LINK.sub(absolute, (ROOT / "README.md").read_text())


def project_urls(home: str) -> dict[str, str]:
    """Links beside the description."""
    urls = {"Paper": "https://arxiv.org/abs/2503.04204"}
    if home:
        urls |= {"Repository": home, "Documentation": f"{home}/blob/HEAD/docs/index.md"}
        urls |= {"Changelog": f"{home}/blob/HEAD/CHANGELOG.md", "Issues": f"{home}/issues"}
    return urls


def home_address() -> str:
    """The repository's address, as FUSE_EXT_HOME names it."""
    return os.environ.get("FUSE_EXT_HOME", "").rstrip("/")
