"""pytest plugin: print a failure's report when it happens, not at the end of the run.

    pytest -p bench.failures_at_once

A run that is stopped for want of time has told what failed until then. With xdist the process that
collects the workers' reports prints.
"""

from __future__ import annotations

import pytest


class _AtOnce:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def _print(self, what: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f">>> {what} of {report.nodeid}\n{report.longreprtext}\n<<<")
            terminal.flush()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._print(f"failure in {report.when}", report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._print("failed collection", report)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_AtOnce(config), "failures_at_once")
