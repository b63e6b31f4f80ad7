"""How Sphinx makes the site, by one command from the root of the repository, which is where its sources begin:

    sphinx-build -W -c docs . build/site

So README.md, the notebooks (shown as they are stored, not executed) and the pages of kernels_cu/ are pages where they
lie, and their links to each other are those that GitHub follows. A warning, such as a link to nothing or a public name
without an entry that something refers to, fails the build.
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import typer.cli  # noqa: E402
from docutils import nodes  # noqa: E402
from prose import to_rst  # noqa: E402
from sphinx.util.docutils import SphinxDirective  # noqa: E402

import cuflash  # noqa: E402
import cuflash.cli  # noqa: E402

project, author = "cuflash", "the cuflash authors"
version = release = cuflash.__version__
project_copyright = "%Y, " + author

extensions = ["myst_nb", "sphinx.ext.autodoc"]
include_patterns = ["docs/**.md", "docs/**.rst", "notebooks/*.ipynb", "kernels_cu/*.md", "CHANGELOG.md"]
exclude_patterns = ["**/.*", ".*", "build", "dist", "cuflash", "tests", "benchmarks"]  # not even looked into
root_doc = "docs/index"
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nitpicky = True
nitpick_ignore = [("py:class", "cuflash.jit.emulated.Buffer")]
nitpick_ignore_regex = [("py:.*", r"(?!cuflash\b).*")]  # types of others, and words for arrays
smartquotes = False
autodoc_type_aliases = {name: name for name in ("Arch", "Array", "IndexArray", "Mask", "Mod", "Score")}
autodoc_member_order = "bysource"
maximum_signature_line_length = 100
python_display_short_literal_types = True
add_module_names = False

html_theme = "furo"
html_title = f"cuflash {version}"
html_extra_path = ["redirect"]
html_copy_source = False


class Commands(SphinxDirective):
    """The options of every command, as the commands have them."""

    def run(self) -> list[nodes.Node]:
        command = typer.main.get_command(cuflash.cli.app())
        context = command.make_context("cuflash", [], resilient_parsing=True)
        text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="cuflash").replace(f"{ROOT}/", "")
        return self.parse_text_to_nodes(text[text.index("## ") :], allow_section_headings=True)


def setup(app: Any) -> None:
    def read(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        lines[:] = to_rst(lines)

    def sign(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
        alias = r"TypeAliasForwardRef\('(\w+)'\)"  # as Sphinx 9 writes one beside `| None`
        if what == "class" and "<factory>" in (signature or ""):  # made by others; what it holds, its text has
            return "", None
        return signature and (re.sub(alias, r"\1", signature), returns and re.sub(alias, r"\1", returns))

    def color(app: Any, doctree: nodes.document) -> None:
        for block in doctree.findall(nodes.literal_block):
            if app.env.docname.startswith("notebooks/") and block.astext().startswith("%%cuflash_"):  # CUDA C
                block["language"] = "c++"

    app.add_directive("commands", Commands)
    app.connect("doctree-read", color)
    app.connect("autodoc-process-docstring", read)
    app.connect("autodoc-process-signature", sign)
