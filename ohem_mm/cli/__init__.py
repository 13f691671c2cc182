"""What the tools share: options, configs, checks and the process around it all.

The checks run before anything is built. A mistake that a user can make ends in one sentence
(:class:`UserError`) instead of a traceback from deep inside the framework.
"""

import sys

try:
    import mmengine.registry
    import mmengine.runner  # noqa: F401
except ImportError as error:
    print(
        f"error: the tools need mmengine and mmseg ({error}); "
        "install them with: pip install 'ohem-mm[mmseg]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

# "As" the same name: part of this package's own.
from ohem_mm.cli.checks import check_amp_device as check_amp_device
from ohem_mm.cli.checks import check_checkpoint as check_checkpoint
from ohem_mm.cli.checks import check_datasets as check_datasets
from ohem_mm.cli.checks import check_hooks as check_hooks
from ohem_mm.cli.checks import check_losses as check_losses
from ohem_mm.cli.checks import check_pretrained as check_pretrained
from ohem_mm.cli.checks import check_work_dir as check_work_dir
from ohem_mm.cli.checks import is_local as is_local
from ohem_mm.cli.configs import apply_options as apply_options
from ohem_mm.cli.configs import iter_dicts as iter_dicts
from ohem_mm.cli.configs import keep_two_checkpoints as keep_two_checkpoints
from ohem_mm.cli.configs import load_config as load_config
from ohem_mm.cli.configs import settings_of as settings_of
from ohem_mm.cli.configs import type_name as type_name
from ohem_mm.cli.configs import use_amp as use_amp
from ohem_mm.cli.configs import use_bf16 as use_bf16
from ohem_mm.cli.configs import use_channels_last as use_channels_last
from ohem_mm.cli.options import ConfigOptions as ConfigOptions
from ohem_mm.cli.options import add_common_arguments as add_common_arguments
from ohem_mm.cli.options import add_config_argument as add_config_argument
from ohem_mm.cli.options import add_config_options as add_config_options
from ohem_mm.cli.options import parse_value as parse_value
from ohem_mm.cli.process import allow_mmengine_checkpoints as allow_mmengine_checkpoints
from ohem_mm.cli.process import build_runner as build_runner
from ohem_mm.cli.process import run as run
from ohem_mm.errors import UserError as UserError
from ohem_mm.errors import warn as warn
