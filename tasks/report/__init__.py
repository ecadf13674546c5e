"""The report: a run's tables and manifests as one page to look at, and as figures for Prefect."""

from schemas.config import RLConfig
from schemas.run_store import RunStore
from tasks.report.findings import read_findings
from tasks.report.page import report_html
from tasks.report.rl_findings import read_rl_findings
from tasks.report.rl_page import rl_report_html
from tasks.report.samples import samples_to_read


def run_report(store: RunStore) -> str:
    """Return the report of a run of any kind as HTML.

    Raises:
        ArtifactError: there is no run, or a manifest or table is damaged.
    """
    config = store.settings
    if isinstance(config, RLConfig):
        return rl_report_html(read_rl_findings(store, config))
    findings = read_findings(store)
    return report_html(findings, samples_to_read(store, findings.config, [ledger.round for ledger in findings.ledgers]))


def write_report(store: RunStore) -> str:
    """Write the run's `report.html`, whole or not at all, and return where it lies.

    Raises:
        ArtifactError: there is no run, or a manifest or table is damaged.
        StorageError: the place cannot be written to.
    """
    return store.write_report(run_report(store))
