"""Run notebooks and store their outputs in place.

    python tools/run_notebooks.py [NAME...] [--slow]

NAME is a notebook below nbs/, with or without its folder and ending: 00_network, experiments/mnist. Without names, all
run, those whose name begins with "_" excepted. Each runs in a process of its own, in its own folder and with the
repository on sys.path, as under nbdev_test; figures are stored as PNG, and the notebook is then cleaned as nbdev_clean does.

A cell is left alone, its stored output kept, if nbdev_test would skip it: `#| eval: false`, a flag in tst_flags
(`#| slow`, unless --slow is given), a call of nbdev_export. If a cell raises, its traceback is printed, the notebook
stays as it was, and the exit status is 1.
"""
import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def find(names):
    "The notebooks called `names`, or all of them, in the order of their paths."
    there = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
    if not names: return there

    def called(name):
        short = name.removesuffix(".ipynb")
        found = [p for p in there if p == Path(name).resolve() or short in (p.stem, str(p.relative_to(NBS).with_suffix("")))]
        if len(found) == 1: return found[0]
        sys.exit(f"{name}: {len(found)} notebooks have this name; there are {', '.join(str(p.relative_to(NBS)) for p in there)}")

    return [called(name) for name in names]


def tidy(outputs):
    "Keep of each progress bar its last state only: what a terminal would show after the carriage returns."
    for out in outputs:
        if out["output_type"] == "stream":
            text = "".join(out["text"])
            out["text"] = re.sub(r"[^\n]*\r(?=[^\n])", "", text).replace("\r", "").splitlines(True)


def run(path, slow):
    "Run the notebook at `path` in this process and store its outputs; say whether it passed."
    # Imported here, since the parent process only starts others.
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import nbdev_clean
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor, extract_directives

    sys.path[0] = str(ROOT)  # in place of tools/
    os.environ.pop("MPLBACKEND", None)  # any but the inline backend would lose the figures
    os.chdir(path.parent)

    front = getattr(NBProcessor(path, procs=FrontmatterProc, process=True).nb, "frontmatter_", {})
    if str(front.get("skip_exec", False)).lower() == "true": return True
    skipped = set() if slow else set(get_config(path=ROOT).tst_flags.split())

    def leave(cell):
        if cell.cell_type != "code" or "nbdev_export(" in cell.source: return True
        flags = extract_directives(cell, remove=False)
        if flags.get("eval:", [""])[0].lower() == "false" or skipped & flags.keys(): return True
        cell.outputs = []  # execnb keeps the old ones of a cell that prints nothing
        return False

    nb, shell = read_nb(path), CaptureShell(path, mpl_format="png")
    try: shell.run_all(nb, exc_stop=True, preproc=leave, postproc=lambda cell: tidy(cell.outputs))
    except (Exception, SystemExit):
        print(shell.prettytb(fname=path.relative_to(ROOT)), file=sys.stderr)
        return False
    write_nb(nb, path)
    nbdev_clean.__wrapped__(str(path))  # the bare function: the command would read this script's arguments
    for where in {str(ROOT), str(Path.home())}:
        if any(where in str(cell.get("outputs", "")) for cell in nb.cells):
            print(f"note: an output of {path.relative_to(ROOT)} names a path of this machine, {where}", file=sys.stderr)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--slow", action="store_true", help="run the cells with a flag in tst_flags too")
    args = parser.parse_args()
    paths = find(args.names)
    if len(paths) == 1: sys.exit(0 if run(paths[0], args.slow) else 1)

    failed = []
    for path in paths:
        start = time.perf_counter()
        command = [sys.executable, __file__, str(path), *(["--slow"] if args.slow else [])]
        ok = subprocess.run(command).returncode == 0
        print(f"{'ok    ' if ok else 'FAILED'} {path.relative_to(ROOT)} ({time.perf_counter() - start:.1f} s)", flush=True)
        if not ok: failed.append(path)
    sys.exit(1 if failed else 0)


if __name__ == "__main__": main()
