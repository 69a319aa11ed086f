"""The report: one HTML file with the tables of a benchmark run, and the same as data."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from bayesinf._scores import text_labels, versions
from bayesinf.plots._page import framed, make_page, save_page
from bayesinf.plots._report_html import figure_html, settings_html, sheet_html
from bayesinf.plots._report_tables import read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Report", "report"]

_IMAGES = {".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Report:
    """An HTML page and its content; the last expression of a notebook cell shows it.

    Attributes
    ----------
    html
        The whole page: one string, which needs no other file and no network.
    dataset
        The tables by name, whole, with what the page leaves out; ``attrs`` hold ``title``,
        ``configuration`` (JSON) and versions. ``dataset.to_zarr(path)`` keeps it.
    """

    html: str = field(repr=False)
    dataset: xr.DataTree

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file and return its path."""
        return save_page(self.html, path)

    def _repr_html_(self) -> str:
        return framed(self.html, str(self.dataset.attrs["title"]))


def report(
    tables: Mapping[str, xr.Dataset],
    *,
    title: str,
    figures: Mapping[str, Figure | Axes | str | os.PathLike[str]] | None = None,
    configuration: Mapping[str, Any] | None = None,
) -> Report:
    """Put the tables of judges, figures and settings of a run into one HTML page.

    Every estimate stands with its interval, in figures and drawn, beside what the scores cost in
    seconds, examples passed forward and backward, and memory; under each table is what is random in
    its intervals, and how it was made. A column's header sorts by it, by pointer or by Enter.

    Parameters
    ----------
    tables
        By title, as the judges of :mod:`bayesinf.evaluation` return them: by ``scorer`` and further
        dimensions, or single numbers. Columns of the page are variables of the same dimensions;
        variables by query are named there and kept in ``dataset``.
    title
        Of the page.
    figures
        By caption: matplotlib figures or axes, or paths of PNG and SVG files.
    configuration
        Settings of the run by name; mappings are shown line by line.

    Returns
    -------
    Report
        With ``.save(path)`` and ``.dataset``. Versions of what computed are added.

    Raises
    ------
    ValueError
        If there are no tables, a name holds ``/``, a table has nothing to show (scores that are not
        judged yet), or an image is neither PNG nor SVG.
    TypeError
        If a table is no Dataset or a figure no figure.

    Examples
    --------
    >>> import xarray as xr
    >>> from bayesinf import plots
    >>> table = xr.Dataset(
    ...     {"lds": ("scorer", [0.4]), "lower": ("scorer", [0.3]), "upper": ("scorer", [0.5])},
    ...     coords={"scorer": ["EK-FAC"]},
    ...     attrs={"confidence": 0.95, "random": "subsets, seeds, queries"},
    ... )
    >>> page = plots.report({"LDS": table}, title="digits", configuration={"threads": 1})
    >>> float(page.dataset["LDS"]["lds"].sel(scorer="EK-FAC"))
    0.4
    """
    _require_names(tables)
    settings = dict(configuration or {})
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [sheet_html(name, read_table(table, name)) for name, table in tables.items()]
    if figures:
        parts.append("<section><h2>Figures</h2>")
        parts += [figure_html(caption, _address(one, caption)) for caption, one in figures.items()]
        parts.append("</section>")
    if settings:
        parts.append(settings_html("Configuration", settings))
    parts.append(settings_html("Versions", versions()))
    attrs = {"title": title, "configuration": json.dumps(settings, default=str), **versions()}
    tree = xr.DataTree(
        xr.Dataset(attrs=attrs),
        children={name: xr.DataTree(_storable(table)) for name, table in tables.items()},
    )
    return Report(make_page("report", title=escape(title), body="\n".join(parts)), tree)


def _require_names(tables: Mapping[str, xr.Dataset]) -> None:
    if isinstance(tables, xr.Dataset) or not isinstance(tables, Mapping):
        raise TypeError(
            f"tables are given by title; got {type(tables).__name__}. "
            f"Write report({{'LDS': table}}, title=…)."
        )
    if not tables:
        raise ValueError(
            "a report needs at least one table; got none. "
            "Write report({'LDS': lds_table(scores, bank)}, title=…)."
        )
    wrong = [name for name in tables if not name or "/" in name or name in (".", "..")]
    if wrong:
        raise ValueError(
            f"titles of tables name the groups of a dataset, which cannot be empty or hold '/'; "
            f"got {wrong}. Write 'LDS per second' for 'LDS/second'."
        )


def _storable(table: xr.Dataset) -> xr.Dataset:
    """The same with text that Zarr has a specification for."""
    text = {
        key: (array.dims, text_labels(array.values), array.attrs)
        for key, array in table.variables.items()
        if array.dtype.kind == "U" and array.ndim
    }
    return table.assign_coords({key: text[key] for key in text if key in table.coords}).assign(
        {key: text[key] for key in text if key not in table.coords}
    )


def _address(figure: Any, caption: str) -> str:
    """A figure as a data URI."""
    if isinstance(figure, (str, os.PathLike)):
        path = Path(figure)
        kind = _IMAGES.get(path.suffix.lower())
        if kind is None:
            raise ValueError(
                f"figure {caption!r}: an image must be a .png or .svg file; got {path.name!r}. "
                f"Save it as PNG, or pass the matplotlib figure."
            )
        return _data(kind, path.read_bytes())
    whole = figure.figure.get_figure(root=True) if hasattr(figure, "get_xaxis") else figure
    if not hasattr(whole, "savefig"):
        raise TypeError(
            f"figure {caption!r} must be a matplotlib figure or axes, or the path of a PNG or SVG "
            f"file; got {type(figure).__name__}. Functions of bayesinf.plots return axes."
        )
    buffer = io.BytesIO()
    whole.savefig(buffer, format="png", dpi=150)
    return _data("image/png", buffer.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
