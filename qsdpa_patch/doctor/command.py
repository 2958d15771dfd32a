"""The command ``qsdpa doctor``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from qsdpa_patch.doctor import architectures
from qsdpa_patch.doctor.findings import Finding, all_findings

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Say what is installed, what would be patched, which kernels serve which shapes, and what is wrong, with its "
        "fix. The exit status is 1 when something is."
    )
    architectures.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings, or the table of architectures; 1 when one is a problem."""
    if args.architectures is not None:
        return architectures.run(args.architectures, as_json=args.json)
    findings = list(all_findings())
    problems = [finding for finding in findings if finding.is_problem]
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings, problems)
    return 1 if problems else 0


def _print(findings: list[Finding], problems: list[Finding]) -> None:
    width = max(len(finding.topic) for finding in findings)
    topic = ""
    for finding in findings:
        print(f"{finding.topic if finding.topic != topic else '':{width}}  {finding.text}")
        topic = finding.topic
    print()
    if not problems:
        print("No problems found.")
    for finding in problems:
        print(f"Problem: {finding.text}\n    Fix: {finding.fix}")
