"""The console script ``neuron-lightning``: one file per subcommand, found here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from neuron_lightning.cli import checkpoint, convert, env
from neuron_lightning.errors import NeuronLightningError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the subcommand; an error made on purpose is one line, not a traceback."""
    parser = argparse.ArgumentParser(
        prog="neuron-lightning", description="Tools around training with neuron_lightning."
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {env.version_of('neuron-lightning')}"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help=env.HELP).set_defaults(run=lambda _: env.run())
    parts = (
        ("convert", convert.HELP, convert.add_arguments, convert.run),
        ("checkpoint", checkpoint.HELP, checkpoint.add_arguments, checkpoint.run),
        ("merge", convert.MERGE_HELP, convert.add_merge_arguments, convert.run_merge),
    )
    for name, text, add_arguments, run in parts:
        command = commands.add_parser(name, help=text)
        add_arguments(command)
        command.set_defaults(run=run)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except NeuronLightningError as error:
        print(f"neuron-lightning: {error}", file=sys.stderr)
        return 1
    return status
