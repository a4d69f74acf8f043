"""Make README.md from nbs/index.ipynb, with the outputs that are stored there. Needs no quarto: the standard library only.

    python tools/readme.py [--check]

Left out: cells with `#| hide` or `#| include: false`, code with `#| echo: false`, outputs with `#| output: false`, lines
that begin with `#|`, and what went to stderr (warnings, progress bars). Figures go to index_files/. Links are made
relative to the repository: `00_network.ipynb` becomes `nbs/00_network.ipynb`. With --check nothing is written, and the
exit status is 1 if README.md or a figure is out of date.
"""
import base64
import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "index.ipynb"
FIGURES = "index_files"
BANNER = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->"


def split_directives(source):
    "The names and values of the `#|` lines of a cell, and its source without them."
    lines = source.split("\n")
    found = [re.match(r"\s*#\s*\|\s*([\w-]+):?\s*(.*)", line) for line in lines]
    code = "\n".join(line for line, match in zip(lines, found) if not match)
    return {m[1]: m[2].strip().lower() for m in found if m}, code.strip("\n")


def from_root(markdown):
    "Rewrite relative links, outside code fences, from nbs/ to the root of the repository."
    def link(match): return "](" + posixpath.normpath("nbs/" + match[1]) + ")"
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(p if i % 2 else re.sub(r"\]\((?!\w+:|[#/])([^)\s]+)\)", link, p) for i, p in enumerate(parts))


def front_matter(source):
    "A raw cell between lines of `---`: its title and description, as markdown."
    fields = dict(re.findall(r"^(title|description):\s*['\"]?(.*?)['\"]?\s*$", source, flags=re.MULTILINE))
    return "\n\n".join(mark + fields[key] for key, mark in (("title", "# "), ("description", "> ")) if key in fields)


def indent(text): return "\n".join("    " + line if line else "" for line in text.rstrip("\n").split("\n"))


def output_text(out, name, figures):
    "One stored output as markdown; a figure is added to `figures` as `name`.png."
    if out["output_type"] == "stream": return indent("".join(out["text"])) if out["name"] == "stdout" else ""
    data = {kind: "".join(text) for kind, text in out.get("data", {}).items()}
    if "image/png" in data:
        figures[f"{name}.png"] = base64.b64decode(data["image/png"])
        return f"![]({FIGURES}/{name}.png)"
    if "text/markdown" in data: return data["text/markdown"].strip()
    return indent(data["text/plain"]) if "text/plain" in data else ""


def render(notebook):
    "The text of the README, and its figures by file name."
    parts, figures = [BANNER], {}
    for i, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "raw": parts.append(front_matter(source))
        if cell["cell_type"] == "markdown": parts.append(from_root(source.strip()))
        if cell["cell_type"] != "code": continue
        options, code = split_directives(source)
        if "hide" in options or options.get("include") == "false": continue
        if code and options.get("echo") != "false": parts.append(f"```python\n{code}\n```")
        if options.get("output") == "false": continue
        parts += [output_text(out, f"output_{i}_{j}", figures) for j, out in enumerate(cell["outputs"])]
    return "\n\n".join(part for part in parts if part) + "\n", figures


def main():
    if sys.argv[1:] not in ([], ["--check"]): sys.exit(__doc__)
    text, figures = render(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    readme, folder = ROOT / "README.md", ROOT / FIGURES
    stored = {p.name: p.read_bytes() for p in folder.glob("*")} if folder.exists() else {}
    if "--check" in sys.argv:
        if not readme.exists() or readme.read_text(encoding="utf-8") != text or stored != figures:
            sys.exit("README.md is not what nbs/index.ipynb makes: run `make readme`")
        return
    readme.write_text(text, encoding="utf-8")
    for name in stored.keys() - figures.keys(): (folder / name).unlink()
    if figures: folder.mkdir(exist_ok=True)
    elif folder.exists(): folder.rmdir()
    for name, data in figures.items(): (folder / name).write_bytes(data)


if __name__ == "__main__": main()
