"""The site: `make docs` builds it from the checkout, and warnings are errors.

The sources are the whole checkout, so that a link from a page to a report or a program
is the same here and in an editor.
"""

import html
import os
import re
import resource
import subprocess
import tomllib
from pathlib import Path
from urllib.parse import unquote

import latex2mathml.converter
from docutils.nodes import SkipNode
from sphinx.util import logging

import mora_jax

ROOT = Path(__file__).parents[1]

project = "mora_jax"
author = "The founders of mora_jax"
version = release = mora_jax.__version__
copyright = f"2026, {author}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/**.md", "*.md"]
exclude_patterns = [".*", "build", "out", "docs/notebooks/*.ipynb"]

# The menu is in index.md. Below a page that it has are, where the page is open:
BELOW = {
    "docs/start": ["Overview <../README>"],
    "docs/gallery": ["All pages, by question <README>"],
    "docs/operators": ["lora"],
    "docs/what-is-adapted": ["trace-check"],
    "docs/training": ["training-script", "training-nnx"],
    "docs/files": ["checkpoints"],
    "docs/vllm": ["rollouts"],
    "docs/results": [
        "Learning, the report <../benchmarks/quality/REPORT>",
        "Cost and scale, all benchmarks <../benchmarks/README>",
    ],
    "docs/api/mora_jax": [
        "linen",
        "nnx",
        "qwix",
        "sharding",
        "remora",
        "diagnostics",
        "io",
        "mixing",
        "serving",
        "operators",
        "products",
    ],
    "CONTRIBUTING": ["SECURITY"],
}

# Pages
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
# Reports may begin deeper. Without a run of the notebooks their language is not known.
suppress_warnings = ["myst.header", "myst-nb.lexer", "misc.highlighting_failure"]
nb_execution_mode = "cache"
nb_execution_cache_path = os.environ.get("MORA_JAX_NOTEBOOKS", "build/notebooks")
nb_execution_raise_on_error = True
# A busy machine takes longer, and that is not an error: each notebook's process may use
# an hour of the processors, however long it waits for them.
nb_execution_timeout = -1
if (hard := resource.getrlimit(resource.RLIMIT_CPU)[1]) == resource.RLIM_INFINITY:
    resource.setrlimit(resource.RLIMIT_CPU, (3600, hard))
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, and what XLA says of itself

# API
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style"), ("Warns", "params_style")]
python_maximum_signature_line_length = 80
viewcode_line_numbers = False

# Look
html_theme = "sphinx_book_theme"
html_math_renderer = "mathml"
html_title = "mora_jax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "forward.html"}
templates_path = ["templates"]
html_copy_source = False
html_show_sourcelink = False
html_logo = html_favicon = "static/logo.svg"
html_theme_options = {
    "logo": {"text": f"mora_jax {release}"},
    "show_toc_level": 2,
    "navbar_persistent": [],  # the menu has a search
    "navigation_with_keys": False,
    "use_download_button": False,
    "collapse_navbar": True,  # pages below a page are shown there alone
}

# Where the repository is: buttons and the way to install follow this one setting.
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
repository = SETTINGS.get("urls", {}).get("Source")
branch = "main"
if not repository and os.environ.get("GITHUB_REPOSITORY"):
    # A workflow of the repository knows where it is.
    repository = f"https://github.com/{os.environ['GITHUB_REPOSITORY']}"
    branch = os.environ.get("GITHUB_REF_NAME", branch)
if repository:
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": branch,
        "use_repository_button": True,
        "use_edit_page_button": True,
        "secondary_sidebar_items": ["page-toc.html", "edit-this-page.html"],
    }

# The sources, for those who have the site alone. Without git there are none.
archive = f"mora_jax-{release}.tar.gz"
(ROOT / "build").mkdir(exist_ok=True)
pack = ["git", "archive", "--prefix=mora_jax/", f"--output=build/{archive}", "HEAD"]
pack += [".", ":!tests", ":!benchmarks"]
if not subprocess.run(pack, cwd=ROOT, stderr=subprocess.DEVNULL).returncode:
    html_extra_path = [f"../build/{archive}"]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


MARKUP = re.compile(r":math:`[^`]+`|`[^`]+`|(?<!\w)\*\w+\*|[*|]|_(?!\w)")


def as_rst(match):
    """Code as reStructuredText has it; and what is no markup to us none to it."""
    text = match[0]
    if text[0] == "`":
        return f"`{text}`\\ "  # which lets a letter follow
    return text if len(text) > 1 else f"\\{text}"


def docstring_to_rst(app, what, name, obj, options, lines):
    """Our docstrings are plain text with `code`, formulas, examples and tables."""
    # Napoleon takes what precedes a colon for a type, here and after "Returns:".
    if what in ("attribute", "property") and lines:
        lines[0] = f":{lines[0]}"
    table = None  # the indentation of a line that ends in "::", before its block
    doctest = False  # until the next empty line
    for k, line in enumerate(lines):
        doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
        indent = len(line) - len(line.lstrip())
        if lines[k - 1].strip() == "Returns:":
            line = lines[k] = f"{line[:indent]}:{line[indent:]}"
        if table is not None and line.strip() and indent <= table:
            table = None
        if table is None and not doctest and not line.lstrip().startswith(".."):
            lines[k] = MARKUP.sub(as_rst, line)
        if table is None and line.endswith("::"):
            table = indent


def pages_of_the_site(app, page, source):
    """Give a page what the site alone has.

    A link that has the name of a file has the title of its page here. The first steps
    say where the sources are, and notebooks have buttons.
    """
    text = re.sub(r"\[[\w/-]+\.md\]\((?!http)", "[](", source[0])
    text = text.replace("<!-- sources -->", sources())
    if page.startswith("docs/notebooks/"):
        title = re.compile(r"^# .*\n", re.MULTILINE)
        text = title.sub(lambda found: found[0] + buttons(page), text, count=1)
    if below := BELOW.get(page):
        text += "\n\n```{toctree}\n:hidden:\n" + "\n".join(below) + "\n```\n"
    source[0] = text


def sources():
    """The ways to get a checkout, as Markdown."""
    ways = []
    if repository:
        ways.append(f"    git clone {repository} mora_jax\n    cd mora_jax\n")
    if globals().get("html_extra_path"):
        do = "Or download" if repository else "Download"
        link = f'<a href="../{archive}">{archive}</a>'
        lines = f"    tar xzf {archive}\n    cd mora_jax\n"
        ways.append(f"{do} {link}, the sources that this site was made of:\n\n{lines}")
    return "\n".join(ways)


def buttons(page):
    """Links that open a notebook in Colab and download it."""
    name = f"{page.rpartition('/')[2]}.ipynb"
    links = [f"{{download}}`Download the notebook <{name}>`"]
    if repository and repository.startswith("https://github.com/"):
        colab = repository.replace("github.com", "colab.research.google.com/github")
        links.insert(0, f"[Open in Colab]({colab}/blob/{branch}/docs/notebooks/{name})")
    return f"\n:::{{container}} buttons\n{' '.join(links)}\n:::\n\n"


def links_back(app, page, template, context, doctree):
    """Source links to the name that its page has.

    Sphinx takes the first module that has a function, and the last page.
    """
    if not page.startswith("_modules/") or "body" not in context:
        return
    objects = app.env.get_domain("py").get_objects()
    known = {(document, anchor) for _, _, _, document, anchor, _ in objects}

    def mended(link):
        document, anchor = link.groups()
        end = f".{anchor.rpartition('.')[2]}"
        there = sorted(a for d, a in known if d == document and a.endswith(end))
        wrong = there and (document, anchor) not in known
        return f"{document}.html#{there[0] if wrong else anchor}"

    link = re.compile(r"(docs/api/\w+)\.html#([\w.]+)")
    context["body"] = link.sub(mended, context["body"])


def dead_links(app, error):
    """Warn of each link within the site whose file or anchor is not there."""
    if error:
        return
    site, anchors = Path(app.outdir).resolve(), {}
    modules = [
        f"_modules/{name.replace('.', '/')}" for name in app.env._viewcode_modules
    ]
    names = [*app.env.found_docs, *modules, "genindex", "index", "py-modindex"]
    pages = [site / f"{name}.html" for name in names]  # and not what is left of others
    texts = {page: page.read_text() for page in pages if page.exists()}
    for page, text in texts.items():
        anchors[page] = {"", *re.findall(r'\b(?:id|name)="([^"]*)"', text)}
    for page, text in texts.items():
        for link in set(re.findall(r'\bhref="(?!\w+:)([^"]*)"', text)):
            path, _, anchor = unquote(html.unescape(link)).partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            if not target.exists() or anchor not in anchors.get(target, {anchor}):
                logging.getLogger(__name__).warning("%s: dead link %s", page, link)


def skip_aliases(app, what, name, obj, skip, options):
    """The fields of a named tuple are among its attributes."""
    return skip or type(obj).__name__ == "_tuplegetter"


def readable_signature(app, what, name, obj, options, signature, returns):
    """Defaults as one would write them, and not the pages of a pattern."""
    if signature:
        signature = re.sub(r"<class '([\w.]+)'>", r"\1", signature)
        signature = re.sub(r"\('\(\?i\).*?',\)|<\w[^<>]* at 0x\w+>", "...", signature)
    return signature, returns


def math_inline(self, node):
    """MathML, which browsers draw without a script from elsewhere."""
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise SkipNode


def math_block(self, node):
    """An equation of its own lines."""
    equation = latex2mathml.converter.convert(node.astext(), display="block")
    self.body.append(f'<div class="math">{equation}</div>')
    raise SkipNode


def setup(app):
    """Called by Sphinx."""
    for name in ("BELOW", "branch", "repository"):  # pages depend on them
        app.add_config_value(name, None, "env", [dict, str])
    app.add_html_math_renderer("mathml", (math_inline, None), (math_block, None))
    app.connect("build-finished", dead_links)
    app.connect("source-read", pages_of_the_site)
    app.connect("html-page-context", links_back)
    # Before napoleon, which connects at 500.
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=400)
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("autodoc-skip-member", skip_aliases)
