"""What mkdocs.yml needs besides settings: a hook for the pages, an extension for the docstrings."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
SHOWN = [
    *("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md"),
    *("docs/*.md", "docs/*.json", "docs/images/*"),
    *("configs/README.md", "configs/*/*.md", "configs/*/*.py", "configs/*/*.yaml"),
    *("configs/*/*.jsonl", "configs/*/plots/*", "tools/benchmarks/*", "ohem_mm/*.py"),
]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages consist of and link to: the repository's own files, under their own paths.

    So README.md, docs/ and configs/ link to each other in one way, on GitHub and here.
    """
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            file = File.generated(
                config,
                path.relative_to(ROOT).as_posix(),
                abs_src_path=str(path),
                inclusion=InclusionLevel.INCLUDED,  # .github/ too
            )
            files.append(file)
    return files


class Roles(griffe.Extension):
    """Turns Sphinx's ``:class:`OhemRule` `` into references, and makes examples of ``Example:``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object, if it has one."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            role = r":(?:class|func|meth|mod|data):`~?([\w.]+)`"
            obj.docstring.value = re.sub(role, self._link, text)

    @staticmethod
    def _link(role: re.Match[str]) -> str:
        name = role[1]
        return f"[`{name.removeprefix('ohem_mm.')}`][{name if '.' in name else f'ohem_mm.{name}'}]"
