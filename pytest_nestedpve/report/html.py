"""The report as HTML: a complete page, or a section of pytest-html's page. All values are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.report.audit_model import RunReport, Step
from pytest_nestedpve.report.timeline import duration, timeline

if TYPE_CHECKING:
    from jinja2 import Environment

VERDICTS = {
    "passed": "passed, no leftovers",
    "tests": "set up, tests failed, no leftovers",
    "failed": "failed",
    "interrupted": "interrupted",
    "left": "leftovers on the host",
    "kept": "kept for later sessions",
    "up": "no teardown",
}

WORDS = {
    "done": "done",
    "proved": "found done",
    "attached": "attached",
    "failed": "failed",
    "interrupted": "interrupted",
}


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def load(name: str) -> str:
        return files("pytest_nestedpve.report").joinpath("templates", name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["clock"] = _clock
    return environment


def _clock(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _render(template: str, reports: Sequence[RunReport], **values: Any) -> str:
    from markupsafe import Markup

    def picture(report: RunReport) -> Markup:
        # timeline() escapes its values.
        return Markup(timeline((*report.steps, *report.teardown_steps), report.ended or 0.0))

    return (
        _templates()
        .get_template(template)
        .render(reports=reports, picture=picture, verdicts=VERDICTS, words=WORDS, describe=describe, **values)
    )


def describe(step: Step) -> str:
    """One line: what the step did."""
    if step.did:
        return step.did
    facts = [f"{name} {step.facts[name]}" for name in _HEADLINE.get(step.name, ()) if step.facts.get(name)]
    return ", ".join(facts)


#: Facts in the line of a step that recorded no text `did`.
_HEADLINE = {
    "provision": ("name", "vmid", "node", "storage"),
    "wait_ip": ("ip",),
    "ensure_pve": ("action", "version"),
    "setup_network": ("ip", "mode"),
    "setup_repos": ("sources", "token_id"),
    "download_image": ("volid",),
    "leaf_provision": ("name", "vmid", "node"),
    "leaf_wait_ip": ("ip",),
    "verify_ssh_chain": ("hops",),
}


def standalone(report: RunReport) -> str:
    """A complete HTML page for one run, without external resources."""
    return _render("page.html.j2", [report])


def section(reports: Sequence[RunReport], links: Sequence[str] = ()) -> str:
    """HTML for pytest-html's summary, a section per run. `links` are the paths of their pages, in order."""
    return _render("embedded.html.j2", reports, links=list(links) + [""] * (len(reports) - len(links)))
