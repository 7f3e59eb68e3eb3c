"""Run folders in, one page out: which output layer wins at what, how sure that is, and where each number comes from.

``python -m experiments.report outputs/sotu/* --output outputs/report`` writes

- ``report.html``: one self-contained page that works from a file, offline;
- ``results.csv``, one line per run; ``layers.csv``, ``bands.csv``, ``samples.csv``, ``scaling.csv`` and ``search.csv``,
  what the page's tables show; all unrounded;
- ``figures/*.svg`` and ``*.pdf``: the page's figures, for documents.

A ``study.json`` among the folders adds the runs of that study and its search for learning rates, a benchmark's
``results.csv`` the growth with V. What these runs cannot say (verdicts from one seed, the number of drawn words, growth
with V) is told from the results that ship, and said to be. The same folders give the same bytes. Nothing here imports
torch.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from experiments import drawing, stills, tables, wording
from experiments.advice import advice, is_exact, own_options, script
from experiments.breakdown import Bands, Sweep
from experiments.comparison import Comparison, Row, Survey, survey
from experiments.drawing import MEASURES, Chart
from experiments.glance import Glance
from experiments.reading import conditions, differing
from experiments.scaling import FITTED_FROM, Scaling, holds_step_times
from experiments.sentences import answer, caveats, growth_sentence, overview, sentence, subtitle, winners
from experiments.statistics import SEEDS_FOR_A_VERDICT
from experiments.style import OF_REFERENCE, STYLES, Style, styles
from experiments.tables import text_table

TEMPLATES = Path(__file__).parent / "templates"
SHIPPED = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a figure, as its key shows it."""

    label: str
    style: Style


@dataclasses.dataclass(frozen=True)
class Shown:
    """A setting on the page: its comparison, words and charts."""

    comparison: Comparison
    bands: Bands | None
    charts: dict[str, Chart]

    @classmethod
    def of(cls, comparison: Comparison) -> "Shown":
        """Draw what there is to draw."""
        charts: dict[str, Chart] = {}
        if any(math.isfinite(comparison.level(row)) for row in comparison.finished):
            charts |= {f"frontier-{cost}": drawing.frontier_chart(comparison, cost) for cost in ("seconds", "memory")}
        if any(run.curve for run in comparison.runs):
            charts |= {f"curves-{axis}": drawing.curve_chart(comparison, axis) for axis in ("seconds", "tokens")}
        bands = Bands.of(comparison)
        if bands:
            charts["bands"] = drawing.band_chart(bands)
        return cls(comparison, bands, charts)

    @property
    def slug(self) -> str:
        """Where it is on the page, and the end of its files' names."""
        return self.comparison.setting.slug


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        survey: of the runs given.
        shipped: of the results that ship.
        settings: the comparisons, drawn.
        sweeps: of the number of drawn words; with ``sweeps_shipped`` from the results that ship.
        scaling: growth with V; with ``scaling_shipped`` from the results that ship.
        left_out: ``(name, reason)`` of everything given that could not be used.
    """

    survey: Survey
    shipped: Survey
    settings: list[Shown]
    sweeps: list[Sweep]
    sweeps_shipped: bool
    scaling: Scaling | None
    scaling_shipped: bool
    left_out: list[tuple[str, str]]

    @classmethod
    def of(
        cls, folders: Iterable[Path], title: str, studies: Iterable[Path], benchmarks: Iterable[Path], results: Path
    ) -> "Report":
        """Read everything."""
        found = survey(folders, title, studies)
        scaling, unfit = Scaling.read_all(benchmarks)
        own = {run.folder.resolve() for run in found.runs}
        runs, records, tables_of_benchmarks = shipped_files(results)
        extra = not own & {folder.resolve() for folder in runs}
        shipped = survey(runs, "", records) if extra else Survey("", [], [])
        sweeps = [sweep for comparison in found.comparisons if (sweep := Sweep.of(comparison))]
        sweeps_shipped = not sweeps
        if sweeps_shipped:
            sweeps = [sweep for comparison in shipped.comparisons if (sweep := Sweep.of(comparison))]
        scaling_shipped = scaling is None
        if scaling_shipped:
            scaling, _ = Scaling.read_all(tables_of_benchmarks)
        return cls(
            found, shipped, list(map(Shown.of, found.comparisons)), sweeps, sweeps_shipped and extra, scaling,
            scaling_shipped and extra, sorted([*found.left_out, *unfit]),
        )  # fmt: skip

    @property
    def glance(self) -> Glance | None:
        """The settings side by side."""
        return Glance.of(self.survey.comparisons)

    @property
    def beside(self) -> list[Comparison]:
        """What ships for other settings than those of the runs given."""
        own = {comparison.setting for comparison in self.survey.comparisons}
        return [one for one in self.shipped.comparisons if one.setting not in own and len(one.finished) > 1]

    @property
    def looks(self) -> dict[str, Style]:
        """How each label is drawn: a layer alike everywhere on the page."""
        looks = {row.label: row.style for row in self.survey.rows}
        growths = self.scaling.growths if self.scaling else ()
        taken, beside = set(looks.values()), {looks.get(growth.label) for growth in growths}
        free = itertools.chain(  # best what no layer has, then what none in the same figure has
            (style for style in STYLES if style not in taken),
            (style for style in STYLES if style in taken and style not in beside),
            styles(),
        )
        for growth in growths:
            if growth.label not in looks:
                plain = growth.contestant == "full_softmax" and OF_REFERENCE not in taken
                looks[growth.label] = OF_REFERENCE if plain else next(free)
        return looks

    @property
    def charts(self) -> dict[str, Chart]:
        """Every figure by the name of its file."""
        found = {
            f"{name}{f'-{shown.slug}' if len(self.settings) > 1 else ''}": chart
            for shown in self.settings for name, chart in shown.charts.items()
        }  # fmt: skip
        found |= {f"samples-{index}": drawing.sweep_chart(sweep) for index, sweep in enumerate(self.sweeps, 1)}
        if self.scaling:
            found |= {f"scaling-{name}": drawing.scaling_chart(self.scaling, name, self.looks) for name in MEASURES}
        return {name: chart for name, chart in found.items() if any(line.label for line in chart.lines)}

    @property
    def evidence(self) -> list[tuple[str, Comparison]]:
        """The settings that advice is taken from, and where on the page they are shown."""
        own = [(f"#{shown.slug}", shown.comparison) for shown in self.settings]
        return [*own, *((f"#shipped-{comparison.setting.slug}", comparison) for comparison in self.beside)]


def shipped_files(results: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the run folders, the records of studies and the tables of step times that ship."""
    runs = sorted(folder for folder in results.glob("runs/*/*") if folder.is_dir())
    tables = [path for path in sorted(results.glob("benchmark/*/results.csv")) if holds_step_times(path)]
    return runs, sorted(results.glob("studies/*/study.json")), tables


def html(report: Report) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = report.survey
    compared = found.comparisons
    figures = {name: Markup(script(drawing.to_plotly(chart))) for name, chart in report.charts.items()}
    unlike = differing(found.runs)
    shared = conditions(found.runs[0]) if found.runs else {}
    context = {
        "report": report,
        "title": found.title,
        "overview": overview(found),
        "answer": answer(found),
        "figures": figures,
        "suffix": lambda shown: f"-{shown.slug}" if len(report.settings) > 1 else "",
        "shown_first": drawing.shown_first(compared),
        "scaling_rows": scaling_rows(report.scaling),
        "scaling_key": [Entry(growth.label, report.looks[growth.label]) for growth in _growths(report)],
        "growth": growth_sentence({row[0]: row[1]["seconds"].exponent for row in scaling_rows(report.scaling)
                                   if row[1]["seconds"]}),
        "measures": MEASURES,
        "fitted_from": FITTED_FROM,
        "advice": Markup(script(advice(report.evidence, report.scaling))),
        "differing": [name for name in unlike if name not in ("optim.learning_rate", "revision", "dirty", "processor",
                                                              "device", "threads")],
        "shared": {key: value for key, value in sorted(shared.items()) if key not in unlike},
        "needed": SEEDS_FOR_A_VERDICT,
        "judged": any(comparison.has_verdicts for comparison in compared),
        "plotly": Markup(plotly.offline.get_plotlyjs()) if figures else "",
        "style": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "script": Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        "adviser": Markup((TEMPLATES / "advice.js").read_text(encoding="utf-8")),
    }  # fmt: skip
    functions = (caveats, conditions, is_exact, options_of, sentence, subtitle, winners)
    context |= {function.__name__: function for function in functions} | {"wording": wording}
    return environment.get_template("report.html.j2").render(context)


def _growths(report: Report) -> Sequence[Any]:
    return report.scaling.growths if report.scaling else []


def scaling_rows(scaling: Scaling | None) -> list[tuple[str, dict[str, Any], dict[int, Any]]]:
    """Return each layer's label, its fitted powers by measure, and its points by V."""
    if scaling is None:
        return []
    return [
        (growth.label, {name: growth.power(name) for name in MEASURES}, {point.vocab: point for point in growth.points})
        for growth in scaling.growths
    ]


def options_of(row: Row) -> str:
    """Return a layer's settings, those of its yaml that it keeps left out."""
    return ", ".join(f"{key}={value}" for key, value in own_options(row.runs[0]).items()) or "as in its yaml"


def write(
    folders: Iterable[Path],
    output: Path,
    title: str,
    studies: Iterable[Path] = (),
    benchmarks: Iterable[Path] = (),
    results: Path = SHIPPED,
) -> Survey:
    """Write the page, tables and figures about run folders into ``output``.

    Args:
        folders: of runs.
        output: where to.
        title: of the page.
        studies: files ``study.json``; a study's own runs take part.
        benchmarks: files ``results.csv`` of benchmarks.
        results: what ships, for what these runs cannot say.
    """
    report = Report.of(folders, title, studies, benchmarks, results)
    found = report.survey
    files = {
        "report.html": html(report),
        "results.csv": tables.results_csv(found),
        "layers.csv": tables.layers_csv(found),
        "bands.csv": tables.bands_csv(found),
        "samples.csv": tables.sweeps_csv(report.sweeps),
        "search.csv": tables.search_csv(found),
    }
    if report.scaling:
        files["scaling.csv"] = report.scaling.table()
    (output / "figures").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
    for name, chart in report.charts.items():
        for kind, content in stills.to_files(chart).items():
            (output / "figures" / f"{name}.{kind}").write_bytes(content)
    return dataclasses.replace(found, left_out=report.left_out)


def main() -> None:
    """Write the report of the folders named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="run folders, study.json files, benchmarks' results.csv")
    parser.add_argument("--output", type=Path, default=Path("outputs/report"), help="where to write (%(default)s)")
    parser.add_argument("--title", default="Output layers compared", help="the page's title")
    arguments = parser.parse_args()
    studies = [path for path in arguments.paths if path.suffix == ".json"]
    benchmarks = [path for path in arguments.paths if path.suffix == ".csv"]
    folders = [path for path in arguments.paths if path.suffix not in (".json", ".csv")]
    found = write(folders, arguments.output, arguments.title, studies, benchmarks)
    print(text_table(found))
    for name, reason in found.left_out:
        print(f"left out: {name}: {reason}")
    print(arguments.output / "report.html")


if __name__ == "__main__":
    main()
