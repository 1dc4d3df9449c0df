"""A run's plots and final figures: report.png, and report.html that needs no other file."""

from pathlib import Path

from longcat_jax.report.page import render_page
from longcat_jax.report.plots import render
from longcat_jax.report.run import read_run

PNG_FILE = "report.png"
HTML_FILE = "report.html"


def write_report(workdir: str | Path) -> tuple[Path, Path]:
    """Write report.png and report.html into a workdir.

    Returns:
      The two paths, png first.

    Raises:
      OSError: a file is missing.
      ValueError: a file is empty or corrupt.
    """
    workdir = Path(workdir)
    run = read_run(workdir)
    png = render(run)
    page = render_page(run, png)
    paths = workdir / PNG_FILE, workdir / HTML_FILE
    for path, data in zip(paths, (png, page.encode("utf-8")), strict=True):
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(data)
        partial.replace(path)
    return paths
