"""The command line of `ternary`. Nothing heavy is imported until a command runs."""

from __future__ import annotations

from pallas_kernels.command_line import App, before_commands
from ternary.commands.adapt import adapt
from ternary.commands.calibrate import calibrate
from ternary.commands.distill import distill
from ternary.commands.inspect import inspect
from ternary.commands.quantize import quantize
from ternary.commands.report import report

app = App(
    name="ternary",
    help="1.58-bit FLUX: quantise a transformer to -1, 0 and +1, and look into the result.",
    no_args_is_help=True,
)

app.callback()(before_commands)
app.command()(calibrate)
app.command()(distill)
app.command()(adapt)
app.command()(report)
app.command()(quantize)
app.command()(inspect)
