"""The report for GitHub Actions: annotations on the run, as workflow commands on standard output.

The commands and their escapes: https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands
and `ActionCommand.cs` of actions/runner. GitHub shows ten annotations of a step and drops the rest without a word.
"""

from __future__ import annotations

from lora_export.check.results import CheckReport
from lora_export.report import summary
from lora_export.report.as_json import Report
from lora_export.report.summary import Finding
from lora_export.verdict import Verdict

MOST_ANNOTATIONS = 10
_COMMANDS = {Verdict.FAIL: "error", Verdict.AMBIGUOUS: "warning"}


def annotations(report: Report) -> list[str]:
    """One workflow command for each finding, the failures first, at most `MOST_ANNOTATIONS`; the last counts the rest.

    Empty where everything passed.
    """
    kind = "check" if isinstance(report, CheckReport) else "bench"
    findings = summary.check_findings(report) if kind == "check" else summary.bench_findings(report)
    if not findings and report.verdict is Verdict.FAIL:  # nothing was compared
        findings = (Finding("nothing was compared", Verdict.FAIL, (summary.check_summary(report),)),)
    shown = findings if len(findings) <= MOST_ANNOTATIONS else findings[: MOST_ANNOTATIONS - 1]
    commands = [
        _command(_COMMANDS[finding.verdict], f"lora-export {kind}: {finding.name}", " ".join(finding.sentences))
        for finding in shown
    ]
    rest = findings[len(shown) :]
    if rest:
        worst = "error" if any(finding.verdict is Verdict.FAIL for finding in rest) else "warning"
        commands.append(_command(worst, f"lora-export {kind}", f"{len(rest)} more; see reports/{kind}.html"))
    return commands


def _command(name: str, title: str, message: str) -> str:
    return f"::{name} title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
