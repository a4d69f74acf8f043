"""Write the notebooks as HTML pages with a list of all pages beside them. Needs no quarto.

    python tools/docs.py

nbdev processes the notebooks into _proc/ as it does for quarto: hidden cells go, documentation of what is exported comes
in. Here each becomes a page in _docs/. Nothing runs but imports, exported cells and the documentation; the other
outputs are the stored ones. Mathematics is drawn by MathJax, which a browser loads from the network.
"""
import re
import shutil
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter
from nbdev.config import get_config
from nbdev.serve import proc_nbs

STYLE = """<style>
nav.pages { position: fixed; top: 0; left: 0; bottom: 0; width: 14rem; padding: 1rem; overflow-y: auto; font-family: sans-serif; }
nav.pages a { display: block; padding: 0.2rem 0; } nav.pages a.here { font-weight: bold; }
main { margin-left: 15rem; } @media (max-width: 60rem) { nav.pages { position: static; width: auto; } main { margin-left: 0; } }
</style>"""


def page_name(path): return path.with_name(re.sub(r"^\d+[a-zA-Z]?_", "", path.stem) + ".html")  # nbdev's rule, used in its links


def prepare(notebook):
    "Turn the front matter into a heading, take out the `#|` lines and what they hide; return the title."
    title = ""
    for cell in notebook.cells:
        if cell.cell_type == "raw" and cell.source.startswith("---"):
            front = yaml.safe_load(cell.source.strip().strip("-"))
            title = front.get("title", "")
            lead = f"\n\n> {front['description']}" if "description" in front else ""
            cell.update(cell_type="markdown", source=f"# {title}{lead}")
        if cell.cell_type == "code":
            hidden = re.search(r"^#\| *echo: *false", cell.source, flags=re.MULTILINE)
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
            cell.metadata["transient"] = {"remove_source": bool(hidden)}
    return title


def main():
    config = get_config()
    source, target = proc_nbs(force=True), config.doc_path
    site = config.doc_host + config.doc_baseurl + "/"
    books = {p.relative_to(source): nbformat.read(p, as_version=4) for p in sorted(source.rglob("*.ipynb"))}
    order = sorted(books, key=lambda p: (len(p.parts), p.stem != "index", p))
    titles = {path: prepare(books[path]) or path.stem for path in order}
    exporter = HTMLExporter(embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True)

    shutil.rmtree(target, ignore_errors=True)
    for path in order:
        up = "../" * (len(path.parts) - 1)
        links = "".join(f'<a href="{up}{page_name(p).as_posix()}"{" class=here" if p == path else ""}>{titles[p]}</a>' for p in order)
        html, _ = exporter.from_notebook_node(books[path], resources={"metadata": {"name": titles[path]}})
        html = html.replace(site, up)
        html = re.sub(r'href="(?![a-z]+:)([^"#]*?)(?:\d+[a-zA-Z]?_)?([^"/#]+)\.ipynb', r'href="\1\2.html', html)
        html = html.replace("</head>", STYLE + "</head>", 1).replace("<main", f'<nav class="pages">{links}</nav><main', 1)
        out = target / page_name(path)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    print(f"wrote {len(order)} pages: {(target / 'index.html').relative_to(Path.cwd())}")


if __name__ == "__main__": main()
