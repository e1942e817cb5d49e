"""`nemo-longctx doctor`: versions, what this machine can use, and what each missing part costs."""

from __future__ import annotations

import argparse
import dataclasses
import json

from nemo_longctx import capability


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    versions, found = capability.package_versions(), capability.capabilities()
    if args.json:
        print(json.dumps({"versions": versions, "capabilities": [dataclasses.asdict(c) for c in found]}, indent=1))
        return 0
    width = max(len(name) for name in (*versions, *(c.name for c in found)))
    for name, version in versions.items():
        print(f"{name:{width}}  {version or 'not installed'}")
    for part in found:
        print(f"{part.name:{width}}  {'yes' if part.available else 'no ':3} {part.detail}")
        if not part.available:
            print(f"{'':{width}}      costs: {part.cost}\n{'':{width}}      get it: {part.remedy}")
    return 0
